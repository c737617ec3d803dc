"""Triton: what the distributional losses share, above all the gradient of (n, A, K)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused._backends.triton_launch import ACC, count_mask, launch_sum, named, run_program
from dqn_fused._backends.triton_program import Build, Program, check_sizes
from dqn_fused.arguments import Batch, accumulation_dtype
from dqn_fused.kernels import distributions_launch, launch
from dqn_fused.kernels.distributions import sum_rows_kernel, values_kernel
from dqn_fused.kernels.distributions_bwd import rows_bwd_kernel
from dqn_fused.row_loss import SavedRows, rows_gradient


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss, in one launch."""
    if torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # of is_grads_batched=True: it has no address
        return rows_gradient(grad_loss, saved)
    if saved.actions.numel() == 0:
        return torch.empty(saved.shape, dtype=saved.dtype, device=saved.slopes.device)
    (gradient,) = run_program(_backward, _SAVED, (grad_loss, *saved), None, saved.slopes.device)
    found: Tensor = gradient
    return found


_SAVED = ("grad_loss", *SavedRows._fields)


def _backward(program: Program, given: Sequence[Any], spec: None) -> None:
    """Build what rows_backward launches."""
    slopes, _, weights, shape, dtype, reduction = SavedRows(*given[1:])
    gradient = program.empty("gradient", shape, dtype)
    n, K = slopes.shape
    store_rows(
        program, gradient, "grad_loss", "slopes", "actions", None if weights is None else "weights",
        (n, shape[-2], K), dtype, reduction,
    )  # fmt: skip
    program.returns(gradient)


def store_rows(
    program: Program, gradient: str, grad_loss: str | None, slopes: str, actions: str, weights: str | None,
    shape: tuple[int, int, int], dtype: torch.dtype, reduction: str,
) -> None:  # fmt: skip
    """Write a gradient of (n, A, K) elements: slopes, (n, K), in the rows of the actions; grad_loss is ones if None."""
    n, A, K = shape
    block, run_length = launch.backward(K, dtype.itemsize, dense=True)
    program.launch(
        rows_bwd_kernel, launch.cdiv(n * A * K, block),
        gradient, grad_loss, slopes, actions, weights,
        n, A, K, n if reduction == "mean" else 1,
        PER_ROW=reduction == "none", FAR=n * A * K > 2**31 - 1 - block, RUN=run_length, BLOCK=block, num_warps=4,
    )  # fmt: skip


def gradient_of(program: Program, batch: Batch, slopes: str, reduction: str) -> str:
    """The gradient by batch.q of a loss whose slopes, (n, K), are known, for an upstream gradient of ones."""
    at, q = named(batch), batch.q
    n, A, K = q.shape
    gradient = program.empty("gradient", (*batch.shape, A, K), q.dtype)
    store_rows(program, gradient, None, slopes, at.saved_actions(), at.weights, (n, A, K), q.dtype, reduction)
    return gradient


StoreLoss = Callable[[Program, Sequence[Any], Any], tuple[str, str, str]]


def builders(store_loss: StoreLoss) -> tuple[Build, Build]:
    """What builds a forward, and a forward with its gradient, around the launches that store (loss, values, slopes).

    Both get the fields of a batch with one more tensor behind them, and a description with a reduction.
    """

    def forward(program: Program, given: Sequence[Any], spec: Any) -> None:
        program.returns(*store_loss(program, given, spec))

    def loss_and_grad(program: Program, given: Sequence[Any], spec: Any) -> None:
        loss, values, slopes = store_loss(program, given, spec)
        program.returns(loss, gradient_of(program, Batch(*given[:-1]), slopes, spec.reduction), values)

    return forward, loss_and_grad


class Chooser(NamedTuple):
    """What the program of a sample compares to choose the next action, and how it reads it."""

    name: str
    strides: tuple[int, int, int]  # of row and action, in units of vec, and of column
    dtype: torch.dtype  # of the comparison: rounded, values that differ would be equals
    K: int  # 1 for one value an action, (m, A)
    actions: int  # of a tile, as columns
    columns: int
    vec: int


class Support(NamedTuple):
    """Atoms, as atom_values takes them."""

    atoms: str | None
    low: float | str | None
    high: float | str | None
    step: float | str | None
    stride: int | None


NO_SUPPORT = Support(None, None, None, None, None)


class Samples:
    """What the launches of a distributional loss take of a batch."""

    def __init__(self, program: Program, batch: Batch) -> None:
        check_sizes(*batch.q.shape, *(() if batch.next_q is None else batch.next_q.shape))
        self.program, self.batch, self.names = program, batch, named(batch)
        self.dtype, self.n = accumulation_dtype(batch.q), batch.q.shape[0]

    def choice(self, rows: int, splits: int, atoms: Support | None = None, warps: int = 0) -> Chooser:
        """Choose by the means over K of next_q, or of next_q_online, or by Q-values there.

        With atoms by the expectations of the softmax of K logits, which programs of so many warps take. Long rows are
        reduced in a launch of their own: a program of a few samples would take long.
        """
        name = "next_q" if self.batch.next_q_online is None else "next_q_online"
        x = getattr(self.batch, name)
        m, A, K = (*x.shape, 1)[:3]
        dtype, itemsize = accumulation_dtype(x if atoms is None or x.dim() == 2 else self.batch.q), x.element_size()
        softmax = atoms is not None and K > 1
        vec = 16 // itemsize
        if K % vec or x.stride(-1) != 1 or any(stride % vec for stride in x.stride()[:2]):
            vec = 1
        strides = x.stride(0) // vec, x.stride(1) // vec, x.stride(2) if x.dim() == 3 else 0
        tile = distributions_launch.choice(rows, m, A, K, dtype.itemsize, vec > 1, warps if K > 1 else 0)
        tiles = launch.cdiv(A, tile.actions) if softmax else 1
        if K > 1 and m and distributions_launch.chooses_first(m, A, K, itemsize, splits, tiles):
            name = self._values(name, (m, A, K), strides, vec, dtype, atoms)
            strides, K, vec = (A, 1, 0), 1, 1
            tile = distributions_launch.choice(rows, m, A, K, dtype.itemsize, wide=False)
        if K == 1:
            strides, vec = (strides[0] * vec, strides[1] * vec, 0), 1
        return Chooser(name, strides, dtype, K, tile.actions, tile.columns, vec)

    def _values(
        self, name: str, shape: tuple[int, int, int], strides: tuple[int, int, int], vec: int, dtype: torch.dtype,
        atoms: Support | None,
    ) -> str:  # fmt: skip
        """Reduce each row of (m, A, K) to the values that are compared, (m, A)."""
        (m, A, K), support = shape, atoms or NO_SUPPORT
        warps = distributions_launch.warps(K, dtype.itemsize, distributions_launch.MOST_WARPS) if atoms else 0
        tile = distributions_launch.choice(None, m, A, K, dtype.itemsize, vec > 1, warps)
        values, tiles = self.program.empty("next_values", (m, A), dtype), launch.cdiv(A, tile.actions)
        self.program.launch(
            values_kernel, launch.cdiv(m, tile.rows) * tiles,
            values, name, self.names.terminated, *support[:4], m, A, K, tiles, *strides, support.stride,
            ROWS=tile.rows, ACTIONS=tile.actions, COLUMNS=tile.columns, VEC=vec, ACC=ACC[dtype],
            num_warps=warps or distributions_launch.WARPS,
        )  # fmt: skip
        return values

    @property
    def mask_strides(self) -> tuple[int | None, int | None]:
        """Strides of next_action_mask."""
        mask = self.batch.next_action_mask
        return (None, None) if mask is None else (mask.stride(0), mask.stride(1))

    @property
    def gamma(self) -> float | str:
        """The discount, as load_discount takes it."""
        gamma = self.batch.gamma
        return "gamma" if isinstance(gamma, Tensor) else self.program.number(gamma, self.dtype)

    @property
    def gamma_kind(self) -> str:
        """The GAMMA of load_discount."""
        gamma = self.batch.gamma
        return "number" if not isinstance(gamma, Tensor) else "per_sample" if gamma.dim() else "scalar"

    def counts(self) -> str | None:
        """True entries of each part of non_final_mask, if the programs do not count all of them themselves."""
        if self.batch.non_final_mask is None:
            return None
        return count_mask(self.program, self.n, distributions_launch.WARPS)

    def loss(self, reduction: str, programs: int, splits: int) -> tuple[str, str]:
        """The loss, and where the programs store it or their parts of it."""
        each = reduction == "none"
        loss = self.program.empty("loss", self.batch.shape if each else (), self.dtype)
        if (splits if each else programs) == 1:
            return loss, loss
        return loss, self.program.empty("partial", (self.n, splits) if each else (programs,), self.dtype)

    def store_sum(self, loss: str, partial: str, reduction: str, programs: int, splits: int) -> None:
        """Add up the parts of a loss."""
        if partial == loss:
            return
        if reduction != "none":
            launch_sum(self.program.launch, loss, partial, programs, self.dtype)
            return
        self.program.launch(
            sum_rows_kernel, launch.cdiv(self.n, distributions_launch.SUM_ROWS), loss, partial, self.n, splits,
            ROWS=distributions_launch.SUM_ROWS, SPLITS=distributions_launch.SUM_SPLITS, num_warps=4,
        )  # fmt: skip
