"""Draw the gradient matrix of a small worked example: ``python docs/gradient.py docs/gradient.png``."""

import sys

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dqn_fused import fused_dqn_loss

Q = [[4.0, 2.5, 2.9], [1.2, 1.5, 1.9], [5.0, 5.5, 5.9], [4.8, 2.5, 2.9], [4.0, 2.8, 3.9]]
ACTIONS = [2, 1, 1, 0, 1]
REWARDS = [1.0, 2.0, 0.5, 0.0, 1.0]
NEXT_Q = [[1.0, 3.0, 2.0], [0.5, 0.0, 1.0], [4.0, 2.0, 1.0], [3.0, 6.0, 2.0], [9.0, 9.0, 9.0]]
TERMINATED = [False, False, False, False, True]


def draw(path: str) -> None:
    q = torch.tensor(Q, requires_grad=True)
    terminated = torch.tensor(TERMINATED)
    loss = fused_dqn_loss(q, torch.tensor(ACTIONS), torch.tensor(REWARDS), torch.tensor(NEXT_Q), terminated, gamma=0.9)
    (grad,) = torch.autograd.grad(loss, q)

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(Q, cmap="Greys", vmin=0, vmax=14)
    left.set_title("q: the action taken in a frame")
    limit = grad.abs().max().item()
    image = right.imshow(grad, cmap="RdBu_r", vmin=-limit, vmax=limit)
    right.set_title("gradient of the loss by q")
    figure.colorbar(image, ax=right)
    for axes, values in ((left, Q), (right, grad.tolist())):
        axes.set(xlabel="action", ylabel="sample", xticks=range(3), yticks=range(5))
        for row, taken in enumerate(ACTIONS):
            for column in range(3):
                value = values[row][column]
                dark = axes is right and abs(value) > 0.6 * limit
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color="white" if dark else "black")
            axes.add_patch(Rectangle((taken - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(sys.argv[1])
