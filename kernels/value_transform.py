"""R2D2's value function h and its inverse, in forms in which nothing cancels: see dqn_fused/value_transform.py."""

import triton
import triton.language as tl


@triton.jit
def signed_hyperbolic(x):
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x."""
    return x * (1.0 / (tl.sqrt(tl.abs(x) + 1.0) + 1.0) + 1e-3)


@triton.jit
def signed_parabolic(x):
    """The inverse of h: t (t + 2) with the root t of 0.001 t^2 + 1.002 t - x."""
    t = 2.0 * x / (tl.sqrt(4e-3 * tl.abs(x) + 1.004004) + 1.002)
    return tl.where(tl.abs(x) == float("inf"), x, t * (tl.abs(t) + 2.0))
