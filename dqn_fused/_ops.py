"""Schemas and fakes of the ops; the libraries built from csrc/ add the kernels, and triton_ops.py its own.

Their arguments follow from arguments.Batch and autograd.Saved. The options come as options.packed has them.
"""

import torch
from torch import Tensor
from torch.library import Library

from dqn_fused.arguments import Batch, accumulation_dtype
from dqn_fused.autograd import Saved
from dqn_fused.options import REDUCTIONS as REDUCTIONS
from dqn_fused.options import unpacked

KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", float | Tensor: "float"}
# The fields of a batch as arguments, in the order of Batch.flat.
ARGUMENTS = [
    declared or "Tensor? gammas"
    for declared in Batch(*(f"{KINDS.get(kind)} {name}" for name, kind in Batch.__annotations__.items())).flat()  # type: ignore[arg-type]
]
SAVED = [f"{KINDS[kind]} {name}" for name, kind in Saved.__annotations__.items() if kind in KINDS]

_library = Library("dqn_fused", "DEF")
# normaliser is (2, n), and None without the conservative term. check: whether an op on the CPU looks at the values. The
# Triton ops are for torch.compile, whose graph calls a launch as a whole, and never look.
for _kind in ("", "triton_"):
    _given = f"{', '.join(ARGUMENTS)}, float[] options, bool check"
    _library.define(f"{_kind}td_loss({_given}) -> (Tensor loss, Tensor td_error, Tensor? normaliser)")
    _library.define(
        f"{_kind}td_loss_and_grad({_given}) -> (Tensor loss, Tensor grad_q, Tensor td_error, Tensor? normaliser)"
    )
    _library.define(
        f"{_kind}td_loss_backward(Tensor grad_loss, {', '.join(SAVED)}, int A, ScalarType dtype, float[] options) "
        "-> Tensor grad_q"
    )
# first is empty, (0,), except with "argmax", total except with "soft", and taken except with actions.
for _kind, _more in (("", ""), ("triton_", ", bool auto")):
    _library.define(
        f"{_kind}sweep(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, str kind, float temperature, "
        f"Tensor? actions{_more}) -> (Tensor largest, Tensor first, Tensor total, Tensor taken)"
    )
# taken and policy are coefficients; a gradient that is not needed is empty, (0,).
for _kind, _more in (("", ""), ("triton_", ", bool auto")):
    _library.define(
        f"{_kind}sweep_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor largest, "
        f"Tensor policy, Tensor actions, Tensor taken, bool[] needs{_more}) "
        "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
    )
# Only for torch.compile, whose own code for a sum by index uses atomics on a GPU.
_library.define("add_rows(Tensor values, Tensor index, int A, ScalarType dtype) -> Tensor")
NAMES = tuple(f"{kind}td_loss{what}" for kind in ("", "triton_") for what in ("", "_and_grad", "_backward"))
for _name in (*NAMES, "sweep", "triton_sweep", "sweep_backward", "triton_sweep_backward", "add_rows"):
    # Autograd stops here: TDLoss has the derivative, and loss_and_grad gives it.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("dqn_fused::td_loss", lib=_library)
@torch.library.register_fake("dqn_fused::triton_td_loss", lib=_library)
def _td_loss(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor | None]:
    *others, options, _ = rest
    on_one_device(q, actions, *others)
    spec = unpacked(options)  # type: ignore[arg-type]
    normaliser = q.new_empty((2, actions.shape[0]), dtype=accumulation_dtype(q)) if spec.cql else None
    return loss_like(q, actions, REDUCTIONS[spec.reduction]), _per_sample(q, actions), normaliser


@torch.library.register_fake("dqn_fused::td_loss_and_grad", lib=_library)
@torch.library.register_fake("dqn_fused::triton_td_loss_and_grad", lib=_library)
def _td_loss_and_grad(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    loss, td_error, normaliser = _td_loss(q, actions, *rest)
    return loss, q.new_empty((actions.shape[0], q.shape[-1])), td_error, normaliser


@torch.library.register_fake("dqn_fused::td_loss_backward", lib=_library)
@torch.library.register_fake("dqn_fused::triton_td_loss_backward", lib=_library)
def _td_loss_backward(grad_loss: Tensor, td_error: Tensor, actions: Tensor, *rest: object) -> Tensor:
    *_, A, dtype, _ = rest
    return td_error.new_empty((actions.shape[0], A), dtype=dtype)  # type: ignore[call-overload]


@torch.library.register_fake("dqn_fused::sweep", lib=_library)
@torch.library.register_fake("dqn_fused::triton_sweep", lib=_library)
def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    temperature: float,
    actions: Tensor | None,
    auto: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on_one_device(hidden, weight, bias, mask, actions)
    m, dtype = hidden.shape[0], accumulation_dtype(hidden)
    return (
        hidden.new_empty((m,), dtype=dtype),
        hidden.new_empty((m if kind == "argmax" else 0,), dtype=torch.int64),
        hidden.new_empty((m if kind == "soft" else 0,), dtype=dtype),
        hidden.new_empty((0 if actions is None else m,), dtype=dtype),
    )


@torch.library.register_fake("dqn_fused::sweep_backward", lib=_library)
@torch.library.register_fake("dqn_fused::triton_sweep_backward", lib=_library)
def _sweep_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    largest: Tensor,
    policy: Tensor,
    actions: Tensor,
    taken: Tensor,
    needs: list[bool],
    auto: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    on_one_device(hidden, weight, bias, mask, largest, policy, actions, taken)
    given = zip((hidden, weight, bias), needs, strict=True)
    a, b, c = (
        hidden.new_empty(0) if x is None or not need else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in given
    )
    return a, b, c


@torch.library.register_fake("dqn_fused::add_rows", lib=_library)
def _add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty((A, values.shape[1]), dtype=dtype)


def on_one_device(q: Tensor, *others: object) -> None:
    """Check that all tensors are on the device of q."""
    for x in others:
        if isinstance(x, Tensor) and x.device != q.device:
            raise RuntimeError(f"expected all tensors on {q.device}, as q, got {x.device}")


def _per_sample(q: Tensor, actions: Tensor) -> Tensor:
    return q.new_empty((actions.shape[0],), dtype=accumulation_dtype(q))


def loss_like(q: Tensor, actions: Tensor, reduction: object) -> Tensor:
    """The fake of a loss, () or (n,)."""
    return _per_sample(q, actions) if reduction == REDUCTIONS["none"] else q.new_empty((), dtype=accumulation_dtype(q))


td_loss = torch.ops.dqn_fused.td_loss.default
td_loss_and_grad = torch.ops.dqn_fused.td_loss_and_grad.default
td_loss_backward = torch.ops.dqn_fused.td_loss_backward.default
triton_td_loss = torch.ops.dqn_fused.triton_td_loss.default
triton_td_loss_and_grad = torch.ops.dqn_fused.triton_td_loss_and_grad.default
triton_td_loss_backward = torch.ops.dqn_fused.triton_td_loss_backward.default
sweep = torch.ops.dqn_fused.sweep.default
triton_sweep = torch.ops.dqn_fused.triton_sweep.default
sweep_backward = torch.ops.dqn_fused.sweep_backward.default
triton_sweep_backward = torch.ops.dqn_fused.triton_sweep_backward.default
add_rows = torch.ops.dqn_fused.add_rows.default
