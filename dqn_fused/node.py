"""The autograd node of a recorded loss in C++, where csrc/autograd is built for this torch and this Python.

It does for the compiled ops on the CPU what ``autograd.TDLoss`` does, which serves everywhere else: most of the time
that a loss of 32 samples takes is Python's. The library uses torch's own C++ interface, which changes from version to
version, so its file name says for which torch and which Python it is built.
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

from dqn_fused import arguments, autograd
from dqn_fused._backends.boxed import shaped_forward, unpack_backward
from dqn_fused.arguments import UNCHECKED, Batch, LossSpec
from dqn_fused.options import DEFAULTS, FIELD_CODES

FOLDER = Path(__file__).parent
Result = TypeVar("Result")
Call = Callable[[LossSpec, Batch], tuple[Any, ...] | None]


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
        module.prepare(recorded_backward, FIELD_CODES, DEFAULTS)
    except (ImportError, TypeError, ValueError) as error:  # the last two: it was built for other options
        return None, f"{path.name} cannot be loaded: {error}"
    return module, ""


def recorded_backward(grad_loss: Tensor | None, grad_td_error: Tensor | None, *saved: Any) -> Tensor | None:
    """Gradient of q, (n, A), in differentiable operations; ``saved``: arguments of a backward op, without grad_loss."""
    return autograd.differentiable_backward(grad_loss, grad_td_error, *unpack_backward(*saved))


def td_loss(batch: Batch, spec: LossSpec, backend: ModuleType, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """autograd.td_loss, recorded in C++ where the node serves and the batch is checked."""
    elsewhere = torch.compiler.is_compiling() or forward_ad._current_level >= 0 or batch.shape is UNCHECKED
    if elsewhere or not (backend.NODE and serves):
        return autograd.td_loss(batch, spec, backend, q)
    assert MODULE is not None
    loss, td_error, normaliser = MODULE.record(spec, batch, arguments.looks_at_values(q.device))
    return shaped_forward(loss, td_error, normaliser, batch, spec)


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
# True: (spec, batch) -> what a backend's forward returns; False: what its loss_and_grad returns. Both return None where
# the arguments are unusual or wrong, and Python must look at them.
calls: dict[bool, Call] = {} if MODULE is None else {True: MODULE.td_loss, False: MODULE.td_loss_and_grad}
