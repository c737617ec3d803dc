"""The autograd node of a recorded loss in C++, where csrc/autograd is built for this torch and this Python.

It does for the compiled ops on the CPU what ``autograd.TDLoss`` and ``row_loss.RowLoss`` do, which serve elsewhere:
most of the time that a loss of 32 samples takes is Python's. The library uses torch's own C++ interface, which changes
from version to version, so its file name says for which torch and which Python it is built.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dqn_fused import arguments, autograd, row_loss
from dqn_fused._backends.boxed import shaped_forward, shaped_values, unpack_backward, unpack_rows
from dqn_fused.arguments import UNCHECKED, Batch, LossSpec, SpecT
from dqn_fused.options import FIELD_CODES, REDUCTIONS

FOLDER = Path(__file__).parent
Result = TypeVar("Result")
Call = Callable[..., tuple[Any, ...] | None]


def file_name() -> str:
    """Name of the library for this torch and this Python."""
    return f"_C_autograd.{sys.implementation.cache_tag}.torch-{torch.__version__}.so"


def load(folder: Path = FOLDER) -> tuple[ModuleType | None, str]:
    """Load the library, or say why it cannot be loaded."""
    path = folder / file_name()
    if not path.exists():
        others = ", ".join(sorted(other.name for other in folder.glob("_C_autograd.*.so")))
        how = "in a source tree, pip install --no-build-isolation . builds it"
        return None, f"expected {path.name}, got {others or 'no build of it'} ({how})"
    loader = ExtensionFileLoader("dqn_fused._C_autograd", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
        module.prepare(recorded_backward, FIELD_CODES)
        module.prepare_rows(recorded_rows_backward, REDUCTIONS)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # all but the first: of another csrc/
        return None, f"{path.name} cannot be loaded: {error}"
    return module, ""


def recorded_backward(grad_loss: Tensor | None, grad_td_error: Tensor | None, *saved: Any) -> Tensor | None:
    """Gradient of q, (n, A), in differentiable operations; ``saved``: arguments of a backward op, without grad_loss."""
    return autograd.differentiable_backward(grad_loss, grad_td_error, *unpack_backward(*saved))


def recorded_rows_backward(grad_loss: Tensor | None, grad_slopes: Tensor | None, *saved: Any) -> Tensor | None:
    """The same of a distributional loss, (n, A, K)."""
    return row_loss.differentiable_backward(grad_loss, grad_slopes, unpack_rows(*saved))


def td_loss(batch: Batch, spec: LossSpec, backend: ModuleType, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """autograd.td_loss, recorded in C++ where the node serves and the batch is checked."""
    if not records(batch, backend):
        return autograd.td_loss(batch, spec, backend, q)
    assert MODULE is not None
    loss, td_error, normaliser = MODULE.record(spec, batch, arguments.looks_at_values(q.device))
    return shaped_forward(loss, td_error, normaliser, batch, spec)


def row_loss_of(family: str, x: Tensor, batch: Batch, spec: SpecT, backend: ModuleType) -> tuple[Tensor, Tensor]:
    """row_loss.row_loss of a family of distributional losses, recorded in C++ as td_loss is: (loss, values)."""
    if not records(batch, backend):
        forward = getattr(backend, f"{family}_loss")
        return row_loss.row_loss(x, batch, spec.reduction, backend, lambda: forward(batch, spec))
    loss, values = getattr(MODULE, f"record_{family}")(spec, batch, arguments.looks_at_values(x.device))
    return shaped_values(loss, values, batch, spec.reduction)


def records(batch: Batch, backend: ModuleType) -> bool:
    """Whether a batch is checked and the node may record its loss."""
    elsewhere = torch.compiler.is_compiling() or forward_ad._current_level >= 0 or batch.shape is UNCHECKED
    return not elsewhere and backend.NODE and bool(serves)


def start() -> None:
    """Serve from now on, because the ops are loaded."""
    if MODULE is not None:
        serves.update(("auto", "compiled"))


def without(call: Callable[[], Result]) -> Callable[[], Result]:
    """The call as if the node were not built, for tests and measurements."""

    def run() -> Result:
        global serves
        kept, serves = serves, set()
        try:
            return call()
        finally:
            serves = kept

    return run


MODULE, MISSING = load()
# Names of the backends that stand for the compiled ops on the CPU; none before these are loaded.
serves: set[str] = set()
# True: (spec, batch) -> what a backend's loss without its slopes returns; False: what its loss_and_grad returns. Both
# return None where the arguments are unusual or wrong, and Python must look at them.
calls: dict[bool, Call] = {} if MODULE is None else {True: MODULE.td_loss, False: MODULE.td_loss_and_grad}
# The same of the distributional losses, by their family.
row_calls: dict[str, dict[bool, Call]] = {}
if MODULE is not None:
    row_calls["quantile"] = {True: MODULE.quantile_loss, False: MODULE.quantile_loss_and_grad}
    row_calls["categorical"] = {True: MODULE.categorical_loss, False: MODULE.categorical_loss_and_grad}
