"""Make mistakes.md: common mistakes, and what the library says to each, by running the calls.

python docs/mistakes.py docs/mistakes.md
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dqn_fused

# The mistake and the call, which runs with the names of prepared().
MISTAKES = [
    ("networks instead of their outputs", "fused_dqn_loss(q_network, actions, rewards, target_network)"),
    ("arrays of NumPy", "fused_dqn_loss(q, actions.numpy(), rewards, next_q)"),
    ("Q-values that are gathered already", "fused_dqn_loss(taken, actions, rewards, next_q)"),
    ("next values that are maxima already", "fused_dqn_loss(q, actions, rewards, next_q.amax(1))"),
    ("rewards for each action", "fused_dqn_loss(q, actions, rewards.unsqueeze(1).expand(-1, 4), next_q)"),
    ("actions as floats", "fused_dqn_loss(q, actions.float(), rewards, next_q)"),
    ("one-hot actions", "fused_dqn_loss(q, nn.functional.one_hot(actions, 4), rewards, next_q)"),
    ("an action out of range", "fused_dqn_loss(q, actions + 3, rewards, next_q)"),
    ("keywords of other libraries", "fused_dqn_loss(q, actions, rewards, next_q, done=terminated)"),
    ("keywords of other libraries, in a module", "FusedDQNLoss(discount=0.99)"),
    ("`q` and `next_q` exchanged", "fused_dqn_loss(next_q, actions, rewards, q)"),
    (
        "`terminated` and `non_final_mask`",
        "fused_dqn_loss(q, actions, rewards, next_q, terminated, non_final_mask=final)",
    ),
    ('`loss="mae"`', 'fused_dqn_loss(q, actions, rewards, next_q, loss="mae")'),
    ("`target_q` without Munchausen", "fused_dqn_loss(q, actions, rewards, next_q, target_q=q)"),
]


def prepared() -> dict[str, object]:
    """Names that the calls use: a batch of five samples and four actions."""
    torch.manual_seed(0)
    q, next_q = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    actions, final = torch.tensor([0, 3, 1, 2, 0]), torch.tensor([True, False, True, True, True])
    return {
        **{name: getattr(dqn_fused, name) for name in dqn_fused.__all__},
        "np": np, "nn": nn, "q": q, "next_q": next_q, "actions": actions, "rewards": torch.randn(5),
        "final": final, "terminated": ~final, "next_action_mask": torch.ones(5, 4, dtype=torch.bool),
        "taken": q.detach().gather(1, actions.unsqueeze(1)).squeeze(1),
        "q_network": nn.Linear(8, 4), "target_network": nn.Linear(8, 4),
    }  # fmt: skip


def message(call: str) -> str:
    """What the call raises, or warns of."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = eval(call, prepared())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"{caught[0].category.__name__}: {caught[0].message}" if caught else f"no error: {result}"


def page() -> str:
    """The page: a table."""
    lines = [
        "# Mistakes and messages",
        "",
        "Mistakes that people make, and what the call says to each. The batch has five samples and four actions. This",
        "page is made by running the calls (`python docs/mistakes.py docs/mistakes.md`).",
    ]
    for what, call in MISTAKES:
        lines += ["", f"## {what[0].upper()}{what[1:]}", "", f"    {call}", "", f"> {message(call)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
