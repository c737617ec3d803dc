"""warmup: what happens once happens in it, and nothing else does."""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED, Setting
from test_family import compacted, on, variant

from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad, warmup

NAMES = ["double-mask-weights-huber", "munchausen-cql-masks-weights-huber"]


def compiled_kernels() -> int:
    """How many binaries Triton holds."""
    from dqn_fused.kernels import rows, td_loss, td_loss_bwd

    kernels = (rows.row_fwd_kernel, td_loss.td_loss_fwd_kernel, td_loss.sum_kernel, td_loss_bwd.td_loss_bwd_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 130)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_compile(setting: Setting, name: str, shape: tuple[int, int], reduction: str) -> None:
    """An odd offset in memory, another binary than for an aligned tensor, is kept."""
    given = on(setting, variant(name, shape))
    given["next_q"] = torch.cat([given["next_q"].flatten(), given["next_q"].flatten()])[1:].as_strided(
        shape, (shape[1], 1)
    )
    options = {"reduction": reduction, "backend": setting.backend}
    warmup(**given, **options)
    before = 0 if setting.backend != "triton" or INTERPRETED else compiled_kernels()
    q = given["q"].detach().requires_grad_()
    loss = fused_dqn_loss(**{**given, "q": q}, **options)
    torch.autograd.grad(loss, q, torch.ones_like(loss))
    fused_dqn_loss_and_grad(**given, **options)
    assert before == (0 if setting.backend != "triton" or INTERPRETED else compiled_kernels())


def test_it_leaves_no_trace(setting: Setting) -> None:
    given = on(setting, variant(NAMES[1], (7, 5)))
    given["q"].requires_grad_()
    q = given["q"] * 1
    given_before = {k: x.clone() for k, x in given.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad():
        assert warmup(**{**given, "q": q}, backend=setting.backend) is None
    assert given["q"].grad is None
    assert all(torch.equal(given[k], x) for k, x in given_before.items())


def test_values_mean_nothing(setting: Setting) -> None:
    for arguments in (variant(NAMES[0], (7, 5)), compacted(variant(NAMES[0], (7, 5)))):
        given: dict[str, Any] = on(setting, arguments)
        given["actions"] = torch.full_like(given["actions"], 2**62)
        if "non_final_mask" in given:
            given["non_final_mask"] = torch.ones_like(given["non_final_mask"])
        warmup(**given, backend=setting.backend)


def test_what_does_not_fit_is_refused(setting: Setting) -> None:
    given = on(setting, variant(NAMES[0], (7, 5)))
    with pytest.raises(ValueError, match="rewards"):
        warmup(**{**given, "rewards": given["rewards"][:3]}, backend=setting.backend)
    with pytest.raises(TypeError, match="actions"):
        warmup(**{**given, "actions": given["actions"].float()}, backend=setting.backend)
    with pytest.raises(TypeError):
        warmup(given["q"])


def test_not_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        warmup(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 3))
