"""Running error analysis: a number in float64, and how far floating-point arithmetic may be from it.

Each operation adds the rounding of its own result, |result| times the unit roundoff, to what its operands carry
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.3). A sum is thus measured by the absolute
values of its terms, not by what is left when they cancel. No order of summation is promised: up to 36 terms the bound
holds for every order; beyond, where the worst case is far from anything seen, it holds with a probability of
1 - 2 n exp(-18) for n terms (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
"""

import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype

TRUNCATES = os.environ.get("TRITON_INTERPRET") == "1"  # to bfloat16, which a GPU rounds to the nearest
EXP, LOG = 4, 4  # units of roundoff: GPUs compute powers and logarithms of two to 2 ulp, and multiply
SQRT, QUOTIENT = 2, 4  # of a GPU's fast square root, 2^-23 of float32, and of its quotient, 2 ulp
AGREEMENT = 2.0**-36  # of float64: 2^17 units of roundoff, and far less than a mistake changes
ARGUMENT = 5  # of an exponential: a difference, a temperature inverted and multiplied, the base changed and rounded


class Number(NamedTuple):
    """A number, and the absolute error that arithmetic may make in it."""

    value: float
    error: float = 0.0


class Values(NamedTuple):
    """Numbers of any shape, with their errors."""

    value: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, numbers: Iterable[Number], shape: tuple[int, ...]) -> "Values":
        """Collect numbers."""
        both = np.array([*numbers], dtype=np.float64).reshape(-1, 2)
        return cls(both[:, 0].reshape(shape), both[:, 1].reshape(shape))


def roundings(n: int) -> float:
    """Units of roundoff by which the sum of n terms may be off, in parts of the sum of their absolute values."""
    return min(max(n - 1, 0), 6 * math.sqrt(n))


class Arithmetic:
    """Operations as a dtype rounds them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.unit = torch.finfo(dtype).eps / 2

    def conversion(self, x: np.ndarray) -> np.ndarray:
        """Error of inputs that have to be rounded to the dtype first."""
        if self.dtype is torch.float64:
            return np.zeros_like(x)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(np.abs(x.astype(np.float32) - x), posinf=0.0)

    def given(self, x: float) -> Number:
        """An input of one number."""
        return Number(float(x), float(self.conversion(np.float64(x))))

    def rounded(self, value: float, error: float) -> Number:
        """A result that is rounded once more."""
        return Number(value, error + self.unit * abs(value))

    def add(self, a: Number, b: Number) -> Number:
        """a + b."""
        return self.rounded(a.value + b.value, a.error + b.error)

    def subtract(self, a: Number, b: Number) -> Number:
        """a - b."""
        return self.rounded(a.value - b.value, a.error + b.error)

    def multiply(self, a: Number, b: Number) -> Number:
        """a * b."""
        error = abs(a.value) * b.error + abs(b.value) * a.error + a.error * b.error
        return self.rounded(a.value * b.value, error)

    def divide(self, a: Number, b: Number) -> Number:
        """a / b, where the relative error of b is small."""
        if b.value == 0:
            return Number(math.nan)
        value = a.value / b.value
        return self.rounded(value, (a.error + abs(value) * b.error) / abs(b.value))

    def total(self, terms: Iterable[Number]) -> Number:
        """Sum in any order."""
        terms = [*terms]
        values = [x.value for x in terms]
        if not all(map(math.isfinite, values)):
            return Number(sum(values))
        error = math.fsum(x.error for x in terms)
        return Number(math.fsum(values), error + roundings(len(terms)) * self.unit * math.fsum(map(abs, values)))

    def product(self, a: np.ndarray, b: np.ndarray) -> Values:
        """Matrix product a @ b. Small integers are multiplied and added without an error, in any order."""
        size = np.abs(a) @ np.abs(b)
        exact = all((x == np.rint(x)).all() for x in (a, b)) and size.max(initial=0) < 1 / self.unit
        return Values(a @ b, size * (0 if exact else (roundings(a.shape[-1]) + 1) * self.unit))

    def rounded_to(self, dtype: torch.dtype, x: Values) -> Values:
        """Results that are rounded to a dtype; exact ones by as much as they are, others by half a unit."""
        half_a_unit = torch.finfo(dtype).eps / 2 * np.abs(x.value)
        exact = np.abs(torch.from_numpy(x.value).to(dtype).double().numpy() - x.value)
        return Values(x.value, x.error + np.where(x.error == 0, exact, half_a_unit))


class LogSum(NamedTuple):
    """temperature * log(sum of exp(x / temperature)), and the exponentials it was made of."""

    number: Number
    powers: np.ndarray  # exp(x - largest), 0 where illegal
    errors: np.ndarray  # of them, relative
    total: Number  # of the powers


def log_sum(
    arithmetic: Arithmetic, row: np.ndarray, errors: np.ndarray, legal: np.ndarray | None, temperature: float = 1.0
) -> LogSum:
    """Log-sum-exp over the legal actions, by differences to the largest; NaN without one.

    A difference z is exact to its own roundoff, so exp(z) is off by |z| of them and the function's own. The maximum may
    be found late: a power is then multiplied by others, by as many as a tree has levels, whose exponents add up to z.
    """
    found = row if legal is None else row[legal]
    if np.isnan(found).any() or not found.size:
        return LogSum(Number(math.nan), np.full_like(row, math.nan), np.zeros_like(row), Number(math.nan))
    largest = float(found.max())
    if not math.isfinite(largest):
        value = math.nan if largest < 0 and legal is not None else largest
        return LogSum(Number(value), np.full_like(row, math.nan), np.zeros_like(row), Number(math.nan))
    z = (np.where(True if legal is None else legal, row, -math.inf) - largest) / temperature
    powers = np.exp(z)
    size = np.where(np.isfinite(z), np.abs(z), 0)
    unit, n = arithmetic.unit, int((powers > 0).sum())
    rescaled = 1 + math.log2(n)
    known = np.where(powers > 0, errors / temperature, 0)
    relative = unit * (ARGUMENT * size + rescaled * (EXP + 1)) + np.expm1(np.minimum(known, 700))
    total = math.fsum(powers)
    share = (math.fsum(powers * relative) / total) + roundings(n) * unit
    log = math.log(total)
    error = temperature * (share + LOG * unit * log) + unit * temperature * log
    return LogSum(
        arithmetic.rounded(largest + temperature * log, error), powers, relative, Number(total, total * share)
    )


def assert_close(name: str, got: Tensor, expected: Values, yardstick: Tensor | None = None) -> None:
    """Assert that each element is within its bound, and all together within twice the error of the eager code.

    The bound is that of the arithmetic in float32, or in float64 where got is, and one rounding to got's own dtype. The
    second yardstick is the root mean square in parts of the bound, which tells where a bound is generous: twice
    eager's, and a half, since a single rounding may take up its bound where eager has none.
    """
    exact, bound = expected
    assert tuple(got.shape) == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {exact.shape}"
    values = got.detach().cpu().double().numpy()
    np.testing.assert_array_equal(np.isnan(values), np.isnan(exact), err_msg=f"{name}: NaN in the wrong places")
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(values[~finite], exact[~finite], err_msg=f"{name}: infinities differ")
    exact, values, bound = exact[finite], values[finite], bound[finite]
    own, wide = (torch.finfo(dtype) for dtype in (got.dtype, accumulation_dtype(got)))
    if own.bits < 32:
        bound = bound + own.eps / (1 if TRUNCATES and got.dtype is torch.bfloat16 else 2) * np.abs(exact)
    elif own.bits == 64:
        bound = 2 * bound  # the expected value was computed in float64, too
    # Of what underflows: powers flushed to zero, and half a step of the subnormal numbers of half precision.
    bound = np.where(bound > 0, bound + 8 * wide.tiny + own.tiny * own.eps / 2, 0)
    error = np.abs(values - exact)
    worst = int((error - bound).argmax()) if error.size else 0
    assert (error <= bound).all(), (
        f"{name}: error {error[worst]:.3e} of {exact[worst]:.6e}, bound {bound[worst]:.3e}, "
        f"{int((error > bound).sum())} of {error.size} are beyond theirs"
    )
    if yardstick is None:
        return
    eager = np.abs(yardstick.detach().cpu().double().numpy().reshape(finite.shape)[finite] - exact)
    known = (bound > 0) & np.isfinite(eager)  # what is not finite in eager code is no yardstick
    if known.any():
        ours, theirs = (np.sqrt(np.mean(np.square(x[known] / bound[known]))) for x in (error, eager))
        limit = 2 * theirs + 0.5 + 0.5 / math.sqrt(known.sum())
        assert ours <= limit, f"{name}: root mean square {ours:.2f} bounds, eager's {theirs:.2f}, limit {limit:.2f}"


def assert_agree(got: Any, expected: Any, size: float | None = None) -> None:
    """Assert that tensors of float64, or tuples of them, are the same but for rounding.

    For tests of structure (graphs, modules, transforms, forms of the arguments), where two codes compute the same in
    another order. What they may differ by is measured by the size of the terms: the largest element of the expected
    tensor, unless a size is given, as it must be where everything cancels.
    """
    if not isinstance(expected, Tensor):
        for x, y in zip(got, expected, strict=True):
            assert_agree(x, y, size)
        return
    assert expected.dtype is torch.float64, f"expected float64, got {expected.dtype}: use assert_close and a bound"
    if size is None:
        size = float(expected.detach().abs().where(expected.isfinite(), 0).max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=AGREEMENT * size, equal_nan=True)
