"""R2D2's value function h and its inverse, in forms in which nothing cancels."""

from torch import Tensor

EPSILON = 1e-3


def signed_hyperbolic(x: Tensor) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x: it flattens large values, and its inverse is Lipschitz.

    Kapturowski et al. (2019), Recurrent Experience Replay in Distributed Reinforcement Learning; Pohlen et al. (2018),
    https://arxiv.org/abs/1805.11593. Computed as x (1 / (sqrt(|x| + 1) + 1) + epsilon).
    """
    return x * (1 / ((x.abs() + 1).sqrt() + 1) + EPSILON)


def signed_parabolic(x: Tensor) -> Tensor:
    """The inverse of h.

    With t = sqrt(|y| + 1) - 1 an x = h(y) is t + epsilon t (t + 2) for y = t (t + 2), both with the sign of x. So t is
    the root of epsilon t^2 + (1 + 2 epsilon) t - x, here as 2 c / (b + sqrt(b^2 - 4 a c)).
    """
    b = 1 + 2 * EPSILON
    t = 2 * x / ((4 * EPSILON * x.abs() + b * b).sqrt() + b)
    return (t * (t.abs() + 2)).where(~x.isinf(), x)
