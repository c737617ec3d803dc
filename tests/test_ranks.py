"""A head whose weight is sharded over ranks: 2 and 4 processes against one, and what they send."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bounds import assert_agree
from conftest import Setting
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without torch.distributed or gloo"
)
if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

import ranks_worker  # noqa: E402
from processes import run_once  # noqa: E402
from ranks_worker import (  # noqa: E402
    CASES,
    ROWS,
    SECOND_ORDER,
    SHARES,
    SIZES,
    WRONG,
    A,
    Model,
    N,
    joined,
    local,
    of,
    run,
    second_order,
)
from test_linear import compare  # noqa: E402

from bench.reporting.ranks import AGREEMENT, SENT  # noqa: E402
from dqn_fused import fused_linear_dqn_loss, fused_linear_td_loss  # noqa: E402

Found = dict[str, Any]
AUTO = Setting("auto", "cpu")


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def ranks(request: pytest.FixtureRequest, run_folder: Path) -> list[Found]:
    """What each rank has found, of all cases at one start."""
    folder = run_once(ranks_worker.work, request.param, run_folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bits; a NaN is a NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))


def joined_gradients(found: list[Found]) -> dict[str, Tensor]:
    """Gradients of all rows, joined; other gradients are the same on every rank."""
    first, *rest = (each["grads"] for each in found)
    for other in rest:
        assert all(same(other[k], x) for k, x in first.items() if k not in ROWS)
    return {k: torch.cat([each["grads"][k] for each in found]) if k in ROWS else x for k, x in first.items()}


def same_on_every_rank(found: list[Found]) -> Found:
    """Check the bits of what every rank has; return those of one."""
    first, *rest = found
    for other in rest:
        for k in ("loss", "td_error"):
            assert same(other[k], first[k]), k
        assert all(same(x, y) for x, y in zip(other["cql"], first["cql"], strict=True))
    return first


@pytest.mark.parametrize("name", CASES)
def test_one_process(ranks: list[Found], name: str) -> None:
    found = [each[name] for each in ranks]
    one = same_on_every_rank(found)
    arguments = CASES[name]()
    sparse = arguments.pop("sparse_grad", False)
    assert all(each["sparse"] == [False, sparse, sparse][: len(each["sparse"])] for each in found)
    compare(AUTO, arguments, one["loss"], one["td_error"], one["cql"], joined_gradients(found))


@pytest.mark.parametrize("name", ["double-bf16", "equal-in-all", "equal-at-a-seam", "equal-in-two"])
def test_the_bits_of_one_process(ranks: list[Found], name: str) -> None:
    """Products of small integers are exact, so ranks have the same bits as one process."""
    alone, found = run(CASES[name]()), [each[name] for each in ranks]
    one = same_on_every_rank(found)
    assert same(one["td_error"], alone["td_error"])
    assert same(one["loss"], alone["loss"])
    grads = joined_gradients(found)
    assert all(same(grads[k], x) for k, x in alone["grads"].items())


@pytest.mark.parametrize("name", SENT)
def test_what_a_step_sends(ranks: list[Found], name: str) -> None:
    """As many numbers per sample as docs/ranks.md says, whatever A is; backward, the gradient of hidden once."""
    for each in ranks:
        assert each[name]["forward"] == [("all_gather", AGREEMENT), *(("all_reduce", 4 * N * k) for k in SENT[name])]
        assert each[name]["backward"] == [("all_reduce", 4 * N * 4)]
        # In half precision also the value that the conservative term subtracts.
        halves = [bytes for _, bytes in each["cql-bf16"]["forward"][1:]]
        assert halves == [4 * N * k for k in (*SENT["cql"], 1)]


def test_an_error_on_one_rank_is_one_on_all(ranks: list[Found]) -> None:
    *others, last = (each["errors"] for each in ranks)
    for name in WRONG:
        kind, text = last[name]
        assert kind, name
        for each in others:
            got = each[name]
            if "on every rank" in text:  # no rank alone is wrong
                assert got[0] == kind == "ValueError"
                assert f"but rank {len(ranks) - 1} differs from rank 0" in got[1]
            elif kind == "IndexError" and "actions" in text:
                assert got == (
                    kind,
                    f"tensor_parallel_group: on rank {len(ranks) - 1}: {text.removesuffix(' in row 4')}",
                )
            else:
                assert got == (kind, f"tensor_parallel_group: on rank {len(ranks) - 1}: {text}")
    assert last["action"] == ("IndexError", f"actions: expected values in [0, {A}), got {A} in row 4")
    assert (
        last["mask"][1]
        == f"next_action_mask: expected shape ({N}, {SIZES[len(ranks)][-1]}), as hidden and weight, got ({N}, {A})"
    )
    assert "the same number of samples" in last["fewer samples"][1]
    assert "the same grad mode of hidden" in last["grad"][1]
    assert "the same options" in last["another option"][1]
    assert "the same options" in last["another gamma"][1]


def test_rows_that_are_not_taken(ranks: list[Found]) -> None:
    """The gradient of hidden had zero times infinity in it, and every sparse gradient had row 0 of its rank.

    SparseAdam moves every row that a sparse gradient has, by its momentum.
    """
    actions, start = of("plain")["actions"], 0
    for each, size in zip(ranks, SIZES[len(ranks)], strict=True):
        without, with_infinity = each["rows not taken"]["both"]
        assert all(torch.equal(without[k], with_infinity[k]) for k in without)
        here = actions[(actions >= start) & (actions < start + size)] - start
        assert torch.equal(each["rows not taken"]["rows"], here.unique())
        start += size


def test_values_are_the_same_on_every_rank(ranks: list[Found]) -> None:
    for each in ranks:
        found = each["checked values"]
        assert found.pop("nothing") == found.pop("one rank") == ("", "")
        for name, (kind, text) in found.items():
            assert kind == "ValueError", name
            assert text == (
                f"tensor_parallel_group: expected the same values of {name} on every rank, bit for bit, but "
                f"rank {len(ranks) - 1} differs from rank 0"
            )


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order(ranks: list[Found], name: str) -> None:
    expected = second_order(SECOND_ORDER[name]())
    found = joined_gradients([{"grads": each["second order"][name]} for each in ranks])
    for k, x in expected.items():
        assert_agree(found[k], x)


def test_dtensors(ranks: list[Found]) -> None:
    found = [each["dtensors"] for each in ranks]
    one = same_on_every_rank(found)
    compare(AUTO, of("double"), one["loss"], one["td_error"], [], joined_gradients(found))
    refused = one["refused"]
    assert refused["replicated"] == (
        "ValueError",
        "weight: expected placements (Shard(dim=0),), its rows shared out, got (Replicate(),); write "
        "weight.redistribute(placements=[Shard(0)]), or weight.full_tensor() for a head that is not sharded",
    )
    assert refused["two dimensions"][0] == "ValueError"
    assert refused["two dimensions"][1].startswith("weight: expected a DTensor on a mesh of one dimension")
    assert refused["mixed"][1].startswith("next_weight: expected a DTensor, as weight, got Tensor; write DTensor.from")
    assert refused["only of the target"][1].startswith("weight: expected a DTensor, as next_weight, got Tensor; write")
    assert refused["sparse"] == ("ValueError", "sparse_grad: expected False with DTensors, whose gradients are dense")
    assert refused["outside"] == (
        "ValueError",
        "tensor_parallel_group: expected None, or the group of the mesh of weight",
    )
    for other in found[1:]:
        text = "tensor_parallel_group: expected a group that this process is in"
        assert other["refused"]["outside"] == ("ValueError", text)
    assert refused["hidden"] == (
        "TypeError",
        "hidden: expected an ordinary tensor beside a sharded weight, got a DTensor; write hidden.to_local()",
    )


def test_ready_targets_the_module_and_partial_gradients(ranks: list[Found]) -> None:
    a = of("plain", torch.float64)
    loss, cql = fused_linear_td_loss(
        a["hidden"], a["weight"], a["actions"], a["rewards"], cql_alpha=1.0, return_cql=True
    )
    states = a["hidden"].clone().requires_grad_()
    whole = fused_linear_dqn_loss(**{**a, "hidden": states}, gamma=0.9)
    whole.backward()  # type: ignore[union-attr]
    for each in ranks:
        found = each["others"]
        assert_agree(found["ready"], (loss, cql))
        assert_agree(found["module"], whole.detach())  # type: ignore[union-attr]
        assert found["partial_calls"] == []
    total = torch.stack([each["others"]["partial"] for each in ranks]).sum(0)
    assert_agree(total, states.grad)


def test_data_parallel_times_tensor_parallel(ranks: list[Found]) -> None:
    if len(ranks) != 4:
        pytest.skip("of four ranks")
    found = [each["two by two"] for each in ranks]
    whole = joined()
    model = Model(whole)
    loss = model(whole)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for rank, each in enumerate(found):
        place = rank % 2
        rows = local({"weight": expected["head.weight"], "bias": expected["head.bias"]}, place, SIZES[2])
        wanted = expected | {"head.weight": rows["weight"], "head.bias": rows["bias"], "loss": loss.detach()}
        for name, x in wanted.items():
            assert x is not None
            assert_agree(each[name], x)
    text = f"actions: expected values in [0, {A}), got {A}"
    assert [each["error"] for each in found] == [
        ("IndexError", f"{text} in row 4"),
        ("IndexError", f"tensor_parallel_group: on rank 0: {text}"),
        ("IndexError", f"process_group: on rank 0: {text} in row 4"),
        ("IndexError", f"process_group: on rank 0: tensor_parallel_group: on rank 0: {text}"),
    ]
    assert sum(SHARES) == N


def test_fully_sharded_data_parallel(ranks: list[Found]) -> None:
    if len(ranks) != 2:
        pytest.skip("of two ranks")
    whole = joined()
    model = Model(whole)
    model(whole).backward()
    for each in ranks:
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert_agree(each["fsdp"][name], p.grad)
        kind, text = each["fsdp"]["error"]
        assert kind == "ValueError"
        assert text.startswith("tensor_parallel_group: expected the same values of hidden on every rank")


def test_compiled(ranks: list[Found]) -> None:
    if len(ranks) != 2:
        pytest.skip("of two ranks")
    for each in ranks:
        found = each["compiled"]
        assert torch.equal(found["broken"], found["eager"])
        assert found["error"][0] == "Unsupported"
        assert "_run_eagerly" in found["error"][1]


def test_what_is_no_group() -> None:
    arguments = of("plain")
    with pytest.raises(TypeError, match=r"tensor_parallel_group: expected a torch.distributed.ProcessGroup, got str"):
        fused_linear_dqn_loss(**arguments, tensor_parallel_group="gloo")
    with pytest.raises(ValueError, match="hidden_grad: expected 'sum' without tensor_parallel_group, got 'partial'"):
        fused_linear_dqn_loss(**arguments, hidden_grad="partial")
