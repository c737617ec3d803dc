"""The backends: one table, the choice among them, and why one of them is missing.

A backend is a module with

- ``unavailable() -> str | None``: why it cannot run on this machine at all;
- ``PARTLY: str``: which part of it is missing where it can run, and why, or "";
- ``CHECKS_CPU: bool``: whether on the CPU it refuses, with a RuntimeError, everything that arguments.check_batch and
  check_values would refuse;
- ``COUNTS_MASK: bool``: whether its forward, where arguments.check_values does not look at values, counts the true
  entries of non_final_mask itself and fills batch.checked;
- ``NODE: bool``: whether its forward and backward are the ops that node.py records in C++;
- ``refuses(device) -> str | None``: why it cannot serve tensors there;
- ``forward(batch, spec) -> (loss, td_error, normaliser)``: loss (), or N for reduction="none"; td_error N; normaliser
  (2, N) if spec.cql, else None, as autograd.Saved has it; accumulation dtype;
- ``loss_and_grad(batch, spec) -> (loss, grad_q, td_error, normaliser)``: the same, and the gradient of the loss, or of
  its sum;
- ``backward(grad_loss, saved, spec) -> grad_q``: saved is autograd.Saved; contiguous, every element written;
- ``sweep(work) -> Statistics``: as head.sweep.sweep, which most use; and ``auto_sweep``, which "auto" uses;
- ``sweep_backward(work) -> gradients``: as head.sweep_backward.sweep_backward; and ``auto_sweep_backward``.

Not every backend has the distributional losses. For the device types in DISTRIBUTIONAL it has

- ``quantile_loss(batch, spec) -> (loss, td_error, slopes)``: slopes (n, K), as row_loss.SavedRows has them;
- ``quantile_loss_and_grad(batch, spec) -> (loss, gradient, td_error)``;
- ``categorical_loss(batch, spec) -> (loss, values, slopes)``: values (2, *N), TD errors and expectations;
- ``categorical_loss_and_grad(batch, spec) -> (loss, gradient, values)``;
- ``rows_backward(grad_loss, saved) -> gradient``: saved is row_loss.SavedRows.

Arguments are checked when they arrive here. Modules are imported when first asked for: Triton is heavy.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from dqn_fused.checks import wrong_choice
from dqn_fused.kernels.distributions_launch import MOST_ATOMS
from dqn_fused.kernels.launch import MOST, NARROW

MODULES = {
    "compiled": "dqn_fused._backends.compiled_backend",
    "triton": "dqn_fused._backends.triton_backend",
    "torch": "dqn_fused._backends.torch_backend",
}
# By device type, the fastest first. On CUDA launches are the main cost up to NARROW actions, and a boxed call of a
# compiled op takes less time on the host than a Triton launch. Above, reading the rows is, and Triton's kernels are
# tuned for that.
AUTO = {"cpu": ("compiled", "torch"), "cuda": ("compiled", "triton", "torch")}
AUTO_WIDE = {**AUTO, "cuda": ("triton", "compiled", "torch")}
AUTO_ELSEWHERE = ("torch",)
# Device types on which a backend has a distributional loss; "torch" has all of them everywhere.
DISTRIBUTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "quantile": {"compiled": ("cpu",), "triton": ("cpu", "cuda")},
    "categorical": {"compiled": ("cpu",), "triton": ("cpu", "cuda")},
}

# In a graph of torch.compile an op is a call that Inductor cannot fuse with anything. Up to NARROW actions that call is
# the main cost, and PyTorch's operations avoid it: network and loss are 4 to 18 % slower than the hand-written lines
# with the op, and 0 to 10 % with the operations; at 1024 x 512 the op is up to 17 % faster
# (bench/results/cpu/graph.csv). On CUDA this is reasoned, not measured: two or three kernels that Inductor launches
# itself, against a call of Python for each of an op's two.
TRACED = "torch"
# The same for distributional losses on the CPU, up to this many quantiles or atoms. With 8 of them a graph with
# PyTorch's operations is 2 to 11 % faster than one with the op. From 51 on it depends on the loss and the sizes:
# two-hot and HL-Gauss at 32 x 18 x 51 are 2 to 9 % faster, C51 there and IQN at 32 x 18 x 64 are equal, C51 is 2 to 4 %
# slower at 128 x 2 x 101 and 5 to 11 % at 512 x 18 x 51, QR-DQN 16 % at 128 x 2 x 50 (python -m bench full --only
# graph).
TRACED_UP_TO = 32


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot serve; the message says why."""


def too_large(size: int) -> str | None:
    """Say why the Triton backend does not take a size of a batch."""
    if size <= MOST:
        return None
    return f"its kernels count up to {MOST} samples, actions, atoms or programs, got {size}; 'torch' counts further"


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine; the reason if not, or which part of it is missing."""

    available: bool
    reason: str


_LOADED: dict[str, ModuleType] = {}


def _missing(name: str) -> str | None:
    """Import a backend; say why it cannot run here."""
    return _import(name)


# Dynamo traces no import. This is what torch.compiler.assume_constant_result sets, which would import Dynamo for 1 s.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _import(name: str) -> str | None:
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # missing, or not fitting its torch
        return f"{type(error).__name__}: {error}"
    _LOADED[name] = module
    reason: str | None = module.unavailable()
    return reason


def backends() -> dict[str, BackendStatus]:
    """Say for each backend whether it can run on this machine, and why not.

    >>> from dqn_fused import backends
    >>> backends()["torch"].available
    True
    """
    reasons = {name: _missing(name) for name in MODULES}
    return {name: BackendStatus(why is None, why or _LOADED[name].PARTLY) for name, why in reasons.items()}


def serving(device: torch.device, family: str | None = None) -> list[str]:
    """Names of the backends that serve a device: one that can run here may have no library for that device."""
    names = [name for name in MODULES if family is None or _lacks(family, name, device) is None]
    return [name for name in names if _missing(name) is None and _LOADED[name].refuses(device) is None]


def choose(name: str, device: torch.device, actions: int | None = None, samples: int = 0) -> ModuleType:
    """Backend module for a device: by name, which never falls back, or the first of the device's list.

    There are two lists: for up to NARROW actions, and for more or a linear head. A batch that is too large for Triton
    leaves Triton out of both. In a graph of torch.compile TRACED stands for the first list, and the size of the batch
    does not matter: a guard on it would make another graph.
    """
    if torch.compiler.is_compiling():  # without the memo: a graph that fills it would not pass its own guards
        if name != "auto":
            return _named(name, device)
        if actions is not None and actions <= NARROW:  # a branch: Dynamo makes no bool of a symbolic number
            return _named(TRACED, device)
        return _named(_first(device, True), device)
    wide = actions is None or bool(actions > NARROW)
    large = samples > MOST or (actions or 0) > MOST
    implementation = _CHOSEN.get((name, device, wide, large))
    if implementation is None:
        implementation = _named(_first(device, wide, large) if name == "auto" else name, device)
        # During a capture nothing is launched to see whether Triton works: that is left to a later call.
        if not capturing():
            _CHOSEN[name, device, wide, large] = implementation
    return implementation


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_CHOSEN: dict[tuple[str, torch.device, bool, bool], ModuleType] = {}


def _named(name: str, device: torch.device) -> ModuleType:
    if name not in MODULES:
        wrong_choice("backend", name, ("auto", *MODULES))
    reason = _missing(name) or _LOADED[name].refuses(device)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot serve: {reason}")
    return _LOADED[name]


def choose_distributional(family: str, name: str, device: torch.device, K: int, samples: int = 0) -> ModuleType:
    """Backend module that has the losses of a family on a device: by name, or the first of the device's list.

    In a graph of torch.compile TRACED stands for the first up to TRACED_UP_TO quantiles or atoms.
    """
    if torch.compiler.is_compiling():
        if name == "auto" and device.type == "cpu" and K <= TRACED_UP_TO:
            return _named(TRACED, device)
        return _choose_distributional(family, name, device, K)
    key = family, name, device, K > MOST_ATOMS, samples > MOST or K > MOST
    implementation = _CHOSEN_DISTRIBUTIONAL.get(key)
    if implementation is None:
        implementation = _choose_distributional(family, name, device, K, samples)
        if not capturing():
            _CHOSEN_DISTRIBUTIONAL[key] = implementation
    return implementation


_CHOSEN_DISTRIBUTIONAL: dict[tuple[str, str, torch.device, bool, bool], ModuleType] = {}


def _choose_distributional(family: str, name: str, device: torch.device, K: int, samples: int = 0) -> ModuleType:
    if name != "auto" and name not in MODULES:
        wrong_choice("backend", name, ("auto", *MODULES))
    for candidate in AUTO.get(device.type, AUTO_ELSEWHERE) if name == "auto" else (name,):
        reason = _lacks(family, candidate, device, K, samples)
        reason = reason or _missing(candidate) or _LOADED[candidate].refuses(device)
        if reason is None:
            return _LOADED[candidate]
    raise BackendUnavailableError(f"backend {name!r} cannot serve: {reason}")  # never for "auto": torch serves


def _lacks(family: str, name: str, device: torch.device, K: int = 1, samples: int = 1) -> str | None:
    """Say why a backend does not have the losses of a family on a device."""
    if name == "triton" and family == "categorical" and K > MOST_ATOMS:
        return f"it takes up to {MOST_ATOMS} atoms, got {K}; 'auto' takes a backend that takes more"
    if name == "triton" and (K > MOST or samples > MOST):
        return too_large(max(K, samples))
    if name == "torch" or device.type in DISTRIBUTIONAL[family].get(name, ()):
        return None
    return f"it has no {family} loss for tensors on {device.type}; 'auto' takes a backend that has one"


def _first(device: torch.device, wide: bool, large: bool = False) -> str:
    """Name of the first backend of the device's list that serves."""
    for name in (AUTO_WIDE if wide else AUTO).get(device.type, AUTO_ELSEWHERE):
        if not (large and name == "triton") and _missing(name) is None and _LOADED[name].refuses(device) is None:
            return name
    raise BackendUnavailableError(f"no backend serves device {device}")  # torch serves every device


_first._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what Dynamo looks into, it guards at each call
