"""The linear head against the oracle on its Q matrices: loss, the three gradients, and what it holds in memory."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import Arithmetic, Values, assert_agree, assert_close, roundings
from conftest import Setting
from data import source
from eager import eager
from oracle import oracle
from test_autograd import Allocations
from test_loss import dtype_id, shape_id, to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_fused.arguments
import dqn_fused.reference
from dqn_fused import FusedLinearDQNLoss, Munchausen, Soft, fused_linear_dqn_loss
from dqn_fused.arguments import accumulation_dtype
from dqn_fused.head import sweep
from dqn_fused.reference import dqn_loss

SHAPES = [(7, 3), (2, 3, 5), (0, 4), (1, 1), (33, 8)]
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of actions and of rows in small problems, the last of them not full."""
    monkeypatch.setattr(sweep, "TILE", {"cpu": 1})
    monkeypatch.setattr(sweep, "MIN_COLUMNS", 13)
    monkeypatch.setattr(sweep, "TILE_ROWS", 5)


def make(shape: tuple[int, ...], A: int = 41, dtype: torch.dtype = torch.float32, seed: int = 0) -> Arguments:
    """Arguments of a head of A actions over hidden states (*N, D); many samples take the same action."""
    g = source(seed)
    N, D = shape[:-1], shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(dtype)

    return {
        "hidden": normal(*shape),
        "weight": normal(A, D),
        "bias": normal(A),
        "actions": torch.randint(min(A, 5), N, generator=g) * (A // min(A, 5)),
        "rewards": torch.randn(N, generator=g),
        "next_hidden": normal(*shape),
        "next_weight": normal(A, D),
        "next_bias": normal(A),
        "terminated": torch.rand(N, generator=g) < 0.3,
    }


def legal(shape: tuple[int, ...], A: int) -> Tensor:
    mask = torch.rand((*shape[:-1], A), generator=source(3)) < 0.4
    mask[..., 7 % A] = True
    return mask


def legal_here(arguments: Arguments) -> Tensor:
    """Legal actions of the state itself; the action taken is legal except in every fifth sample."""
    actions, A = arguments["actions"], len(arguments["weight"])
    mask = legal((*actions.shape, 0), A).flip(-1)
    taken = F.one_hot(actions, A).bool()
    fifth = (torch.arange(actions.numel()) % 5 == 4).view(*actions.shape, 1)
    mask = torch.where(taken, ~fifth, mask)
    mask[..., 0] |= ~mask.any(-1)
    return mask


OPTIONS: dict[str, Any] = {
    "plain": lambda a: {},
    "no_bias": lambda a: {"bias": None, "next_bias": None},
    "double": lambda a: {"next_hidden_online": a["next_hidden"].flip(-1) * 2},
    "mask": lambda a: {"next_action_mask": legal(a["hidden"].shape, len(a["weight"]))},
    "double-mask-weights-huber": lambda a: {
        "next_hidden_online": a["next_hidden"].flip(-1) * 2,
        "next_action_mask": legal(a["hidden"].shape, len(a["weight"])),
        "weights": torch.rand(a["actions"].shape, generator=source(5)) + 0.1,
        "loss": "huber",
        "delta": 0.7,
    },
    "soft": lambda a: {"target": Soft(0.5)},
    "soft-mask": lambda a: {"target": Soft(0.5), "next_action_mask": legal(a["hidden"].shape, len(a["weight"]))},
    "munchausen": lambda a: {"target": Munchausen(0.5), "target_hidden": a["hidden"].flip(-1) * 2},
    "munchausen-mask": lambda a: {
        "target": "munchausen",
        "target_hidden": a["hidden"].flip(-1) * 2,
        "action_mask": legal_here(a),
        "next_action_mask": legal(a["hidden"].shape, len(a["weight"])),
    },
    "cql": lambda a: {"cql_alpha": 0.7},
    "cql-double-mask-weights-smooth_l1": lambda a: {
        "cql_alpha": 0.7,
        "action_mask": legal_here(a),
        "next_hidden_online": a["next_hidden"].flip(-1) * 2,
        "weights": torch.rand(a["actions"].shape, generator=source(5)) + 0.1,
        "loss": "smooth_l1",
        "delta": 0.7,
    },
    "cql-munchausen-sum": lambda a: {
        "target": Munchausen(0.5),
        "target_hidden": a["hidden"].flip(-1) * 2,
        "cql_alpha": -0.3,
        "action_mask": legal_here(a),
        "reduction": "sum",
    },
    "cql-none": lambda a: {"cql_alpha": 0.7, "reduction": "none", "bias": None},
    "weighted_mean": lambda a: {
        "weights": torch.rand(a["actions"].shape, generator=source(5)) + 0.1,
        "reduction": "weighted_mean",
    },
}


def layers(arguments: Arguments) -> dict[str, tuple[str, str, str]]:
    """Hidden states, weight and bias of each Q matrix."""
    found = {"q": ("hidden", "weight", "bias"), "next_q": ("next_hidden", "next_weight", "next_bias")}
    if "next_hidden_online" in arguments:
        found["next_q_online"] = ("next_hidden_online", "weight", "bias")
    if "target_hidden" in arguments:
        found["target_q"] = ("target_hidden", "next_weight", "next_bias")
    return found


def matrices(arguments: Arguments) -> Arguments:
    """The same batch for a loss of Q matrices."""
    parts = layers(arguments)
    rest = {k: x for k, x in arguments.items() if k not in itertools.chain(*parts.values())}
    return rest | {k: F.linear(*(arguments[part] for part in parts[k])) for k in parts}


def exact_matrices(setting: Setting, arguments: Arguments) -> Arguments:
    """The same in float64, with the errors that products may have: the library rounds those of halves to halves."""
    parts, dtype = layers(arguments), arguments["hidden"].dtype
    rest = {k: x for k, x in arguments.items() if k not in itertools.chain(*parts.values())}
    arithmetic, errors = Arithmetic(accumulation_dtype(arguments["hidden"])), {}
    for k, names in parts.items():
        hidden, weight, bias = (None if arguments[x] is None else wide(arguments[x]) for x in names)
        values = arithmetic.product(hidden, weight.T)
        # Of q the TD error reads the value taken, which is not rounded, and the conservative term all, which are.
        by_library = k != "q" or "cql_alpha" in arguments
        by_library = by_library and dtype.itemsize == 2 and setting.backend != "triton"
        if by_library:
            values = arithmetic.rounded_to(dtype, values)
        if bias is not None:
            values = arithmetic.rounded_to(
                dtype if by_library else arithmetic.dtype, values._replace(value=values.value + bias)
            )
        rest[k], errors[k] = torch.from_numpy(values.value), values.error
    return rest | {"dtype": arithmetic.dtype, "errors": errors}


def wide(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def exact_gradients(arguments: Arguments, grad_q: Values) -> dict[str, Values]:
    """Those of hidden, weight and bias, from the gradient of the Q matrix.

    With the conservative term every action has a share, and in half precision it is rounded, and so are products.
    """
    dtype, A = arguments["hidden"].dtype, arguments["weight"].shape[0]
    unit = Arithmetic(accumulation_dtype(arguments["hidden"])).unit
    hidden, weight = wide(arguments["hidden"]), wide(arguments["weight"])
    flat, (g, error) = hidden.reshape(-1, hidden.shape[-1]), (x.reshape(-1, A) for x in grad_q)
    # For hidden a sum over the actions that have a share, one without the conservative term; for the others one over
    # the samples.
    units_row = np.array([[roundings(count)] for count in (g != 0).sum(1)]).reshape(-1, 1) * unit
    units = np.array([[roundings(count)] for count in (g != 0).sum(0)]) * unit
    size = np.abs(g).T
    half = torch.finfo(dtype).eps if dtype.itemsize == 2 and "cql_alpha" in arguments else 0.0
    return {
        "hidden": Values(
            *(
                (x @ y).reshape(hidden.shape)
                for x, y in ((g, weight), (error + (units_row + unit + half) * size.T, np.abs(weight)))
            )
        ),
        "weight": Values(g.T @ flat, (error.T + (units + unit + half) * size) @ np.abs(flat)),
        "bias": Values(g.sum(0), (error.T + units * size).sum(1)),
    }


def compact(arguments: Arguments) -> Arguments:
    arguments = dict(arguments)
    mask = ~arguments.pop("terminated")
    for name in ("next_hidden", "next_hidden_online", "next_action_mask"):
        if name in arguments:
            arguments[name] = arguments[name][mask]
    return {**arguments, "non_final_mask": mask}


def check(setting: Setting, arguments: Arguments, sparse: bool = False) -> dict[str, Tensor]:
    """Run forward and backward and compare with the oracle; return the gradients."""
    arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
    learned = [k for k in ("hidden", "weight", "bias") if arguments.get(k) is not None]
    for k in learned:
        arguments[k] = arguments[k].detach().requires_grad_()
    conservative = "cql_alpha" in arguments
    loss, td_error, *cql = fused_linear_dqn_loss(
        **arguments, return_td_error=True, return_cql=conservative, sparse_grad=sparse, backend=setting.backend
    )
    got = torch.autograd.grad(loss, [arguments[k] for k in learned], torch.ones_like(loss))
    found = dict(zip(learned, got, strict=True))
    for name in learned:
        assert found[name].is_sparse == (sparse and name != "hidden")
        found[name] = found[name].to_dense()
    for term in cql:
        assert not term.requires_grad
    compare(setting, arguments, loss, td_error, cql, found)
    return found


def compare(
    setting: Setting, arguments: Arguments, loss: Tensor, td_error: Tensor, cql: list[Tensor], found: dict[str, Tensor]
) -> None:
    """Compare the results of a call, and the gradients that were found, with the oracle."""
    learned = [*found]
    for k in learned:
        arguments = {**arguments, k: arguments[k].detach().requires_grad_()}
    eager_loss, eager_td = eager(**matrices(arguments))
    eager_grads = torch.autograd.grad(eager_loss, [arguments[k] for k in learned], torch.ones_like(eager_loss))
    expected = oracle(**exact_matrices(setting, arguments))
    accumulation = torch.float64 if arguments["hidden"].dtype is torch.float64 else torch.float32
    assert loss.dtype == td_error.dtype == accumulation
    assert_close("td_error", td_error, expected.td_error, eager_td)
    assert_close("loss", loss, expected.loss, eager_loss)
    for term in cql:
        assert term.dtype == accumulation
        assert_close("cql", term, expected.cql)
    grads = exact_gradients(arguments, expected.grad_q)
    for name, eager_grad in zip(learned, eager_grads, strict=True):
        assert found[name].dtype == arguments[name].dtype
        assert_close(f"grad_{name}", found[name], grads[name], eager_grad)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    for A in (41, 1):
        arguments = make(shape, A)
        check(setting, arguments | OPTIONS[name](arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", ["plain", "double-mask-weights-huber", "soft", "munchausen-mask", "cql"])
def test_dtypes(setting: Setting, name: str, dtype: torch.dtype) -> None:
    arguments = make((9, 6), dtype=dtype)
    if "double" in name and dtype is not torch.float64:
        # Two actions that half precision cannot tell apart may be chosen either way: exact products instead.
        for k in ("hidden", "weight", "bias", "next_hidden", "next_weight", "next_bias"):
            arguments[k] = arguments[k].mul(2).round()
    check(setting, arguments | OPTIONS[name](arguments))


@pytest.mark.parametrize("name", ["plain", "double", "mask", "soft-mask", "munchausen", "cql"])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5)], ids=shape_id)
def test_non_final_mask(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        arguments = make(shape, dtype=dtype)
        arguments |= OPTIONS[name](arguments)
        both = check(setting, compact(arguments)), check(setting, arguments)
    assert_agree(both[0].values(), [*both[1].values()])
    check(setting, compact({**arguments, "terminated": torch.ones(shape[:-1], dtype=torch.bool)}))


@pytest.mark.parametrize("name", ["plain", "double-mask-weights-huber", "no_bias"])
def test_sparse_gradients(setting: Setting, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        arguments = make((33, 8), dtype=dtype)
        arguments |= OPTIONS[name](arguments)
        rows = check(setting, arguments, sparse=True)["weight"]
    assert_agree(rows, check(setting, arguments)["weight"])


def test_only_taken_rows_have_a_gradient(setting: Setting) -> None:
    arguments = make((33, 8))
    grads = check(setting, arguments)
    taken = torch.zeros(41, dtype=torch.bool)
    taken[arguments["actions"]] = True
    assert torch.equal((grads["weight"] != 0).any(1).cpu(), taken)
    assert torch.equal((grads["bias"] != 0).cpu(), taken)


def test_many_samples_of_one_action_in_half_precision(setting: Setting) -> None:
    """Added up in bfloat16, 4,096 gradients of one row stop growing at 256 times the first."""
    arguments = make((4096, 2), 3, torch.bfloat16)
    arguments["hidden"] = torch.ones_like(arguments["hidden"])
    arguments["actions"].zero_()
    arguments["rewards"] = torch.full((4096,), -1000.0)
    arguments["terminated"] = torch.ones(4096, dtype=torch.bool)
    arguments["reduction"] = "sum"
    check(setting, arguments)


def test_strided_inputs(setting: Setting) -> None:
    arguments = make((7, 6))
    for k in ("hidden", "next_hidden", "weight", "next_weight"):
        x = arguments[k]
        check(setting, {**arguments, k: x.t().contiguous().t()})
        check(setting, {**arguments, k: torch.cat([x, x], 1)[:, : x.shape[1]]})
    sequence = torch.randn(3, 5, 6)
    arguments = make((3, 4, 6))
    check(setting, {**arguments, "hidden": sequence[:, :-1], "next_hidden": sequence[:, 1:]})


def test_nan(setting: Setting) -> None:
    """NaN in a live row is NaN, in a terminated one is not used."""
    for name in ("plain", "double", "soft"):
        arguments = make((6, 4))
        arguments |= OPTIONS[name](arguments)
        arguments["terminated"] = torch.tensor([True, False] * 3)
        for k in ("next_hidden", "next_hidden_online"):
            if k in arguments:
                arguments[k] = arguments[k].clone()
                arguments[k][:2] = torch.nan
        arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
        td = fused_linear_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)[1]
        assert td.isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_first_of_equal_actions_is_chosen(setting: Setting, dtype: torch.dtype) -> None:
    """Equal as the product computes them: rows of small integers, whose products are exact in any order.

    Equal rows of other numbers need not be equal: a BLAS computes the columns at an edge by another kernel.
    """
    arguments = make((6, 4), dtype=dtype)
    for k in ("hidden", "weight", "next_hidden", "next_weight"):
        arguments[k] = arguments[k].mul(2).round()
    arguments["weight"] = arguments["weight"][:1].repeat(41, 1)
    arguments["bias"] = torch.zeros(41, dtype=dtype)
    for places in ([0, 40], [20, 21], [12, 13, 40], list(range(41))):
        arguments["bias"][:] = -64.0
        arguments["bias"][places] = 64.0
        check(setting, {**arguments, "next_hidden_online": arguments["next_hidden"]})


def test_rows_without_a_legal_action(setting: Setting) -> None:
    for name in ("mask", "double-mask-weights-huber", "soft-mask"):
        arguments = make((4, 3))
        arguments |= OPTIONS[name](arguments)
        arguments["terminated"] = torch.tensor([True, False, True, False])
        arguments["next_action_mask"][:2] = False
        arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
        td = fused_linear_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)[1]
        assert td.isnan().tolist() == [False, True, False, False]


def test_gradcheck(setting: Setting) -> None:
    arguments = make((4, 3), 17, torch.float64)
    arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
    learned = [arguments.pop(k).requires_grad_() for k in ("hidden", "weight", "bias")]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_dqn_loss(hidden, weight, bias=bias, **arguments, backend=setting.backend)

    assert torch.autograd.gradcheck(function, learned)
    assert torch.autograd.gradgradcheck(function, learned)


class Operations(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        accumulates = func.overloadpacket.__name__.startswith("index_put") and True in args
        self.names.append(func.overloadpacket.__name__ + (" accumulate" if accumulates else ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_no_sum_in_an_order_that_is_not_fixed(setting: Setting, dtype: torch.dtype) -> None:
    """What adds by atomics on a GPU. create_graph used index_add, as did the derivative of index_select."""
    arguments = {k: to_device(x, setting.device) for k, x in make((9, 4), dtype=dtype).items()}
    learned = [arguments[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    with Operations() as operations:
        value = fused_linear_dqn_loss(**arguments, backend=setting.backend)
        for create_graph in (True, False):
            grads = torch.autograd.grad(value, learned, create_graph=create_graph)
            value = sum(x.float().square().sum() for x in grads)
    assert not {x for x in operations.names if x.startswith(("index_add", "index_reduce", "scatter_add"))}
    assert "index_put accumulate" not in operations.names
    assert "embedding_dense_backward" in operations.names


def test_the_same_bits_every_time(setting: Setting) -> None:
    arguments = make((33, 8))
    first = check(setting, arguments)
    for _ in range(2):
        again = check(setting, arguments)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_only_what_asks_for_a_gradient_gets_one(setting: Setting) -> None:
    arguments = {k: to_device(x, setting.device) for k, x in make((7, 3)).items()}
    assert not fused_linear_dqn_loss(**arguments, backend=setting.backend).requires_grad
    for names in (["hidden"], ["weight"], ["bias"], ["next_hidden", "hidden"]):
        for k in ("hidden", "weight", "bias", "next_hidden"):
            arguments[k] = arguments[k].detach().requires_grad_(k in names)
        fused_linear_dqn_loss(**arguments, backend=setting.backend).backward()
        given = [k for k in names if k != "next_hidden"]
        assert [k for k in ("hidden", "weight", "bias", "next_hidden") if arguments[k].grad is not None] == given


def test_module_and_reference(setting: Setting) -> None:
    layer, next_layer = (nn.Linear(6, 41).to(setting.device, torch.float64) for _ in range(2))
    a = {k: to_device(x, setting.device) for k, x in make((7, 6), dtype=torch.float64).items()}
    criterion = FusedLinearDQNLoss(gamma=0.9, loss="huber", backend=setting.backend)
    assert not list(criterion.parameters())
    ours = criterion(layer, a["hidden"], a["actions"], a["rewards"], next_layer, a["next_hidden"], a["terminated"])
    theirs = dqn_loss(
        layer(a["hidden"]), a["actions"], a["rewards"], next_layer(a["next_hidden"]), a["terminated"], 0.9, loss="huber"
    )
    assert_agree(ours, theirs)
    assert_agree(*(torch.autograd.grad(x, list(layer.parameters())) for x in (ours, theirs)))


def test_layers_of_the_module() -> None:
    """An nn.Embedding, whose rows are tied to the head, was an AttributeError: it has no bias."""
    table, a = nn.Embedding(41, 6), make((7, 6))
    given = (a["hidden"], a["actions"], a["rewards"])
    loss = FusedLinearDQNLoss()(table, *given, table, a["next_hidden"])  # type: ignore[arg-type]
    expected = fused_linear_dqn_loss(a["hidden"], table.weight, *given[1:], a["next_hidden"], table.weight)
    assert torch.equal(loss, expected)  # type: ignore[arg-type]
    for layers in ((table.weight, table), (table, nn.ReLU())):
        name = "head" if layers[0] is not table else "next_head"
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a layer with a weight, such as nn.Linear, got \w+; for"
        ):
            FusedLinearDQNLoss()(layers[0], *given, layers[1], a["next_hidden"])


@pytest.mark.parametrize("setting_sparse", [False, True])
def test_memory(setting: Setting, setting_sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix of n * A; with sparse gradients nothing of size A at all, and what is held does not grow with A."""
    monkeypatch.setattr(sweep, "TILE", {"cpu": 4096})
    monkeypatch.setattr(sweep, "MIN_COLUMNS", 64)
    monkeypatch.setattr(sweep, "TILE_ROWS", 64)
    n, D = 64, 8
    largest = []
    for A in (1000, 4000):
        arguments = {k: to_device(x, setting.device) for k, x in make((n, D), A).items()}
        for k in ("hidden", "weight", "bias"):
            arguments[k].requires_grad_()
        with Allocations(arguments) as allocations:
            loss = fused_linear_dqn_loss(**arguments, sparse_grad=setting_sparse, backend=setting.backend)
            torch.autograd.grad(loss, [arguments[k] for k in ("hidden", "weight", "bias")])
        dense = [] if setting_sparse else [A * D, A]
        sizes = [size for size in allocations.sizes if size not in dense]
        largest.append(max(sizes))
    assert largest[0] == largest[1] <= 4096


SHAPE_ERRORS = {
    "hidden": (
        lambda a: {"hidden": a["hidden"][:, :0]},
        "hidden: expected shape (*N, D) with at least one feature, got (6, 0)",
    ),
    "weight": (
        lambda a: {"weight": a["weight"].t()},
        "weight: expected shape (A, 4), as nn.Linear holds it, got (4, 41)",
    ),
    "bias": (lambda a: {"bias": a["bias"][:1]}, "bias: expected shape (41,), got (1,)"),
    "next_weight": (lambda a: {"next_weight": a["next_weight"][:7]}, "next_weight: expected shape (41, 4), got (7, 4)"),
    "next_bias": (lambda a: {"next_bias": a["next_bias"][None]}, "next_bias: expected shape (41,), got (1, 41)"),
    "next_hidden": (
        lambda a: {"next_hidden": a["next_hidden"][:1]},
        "next_hidden: expected shape (6, 4), as hidden, got (1, 4)",
    ),
    "online": (
        lambda a: {"next_hidden_online": a["next_hidden"][:, :3]},
        "next_hidden_online: expected shape (6, 4), as hidden, got (6, 3)",
    ),
    "mask": (
        lambda a: {"next_action_mask": torch.ones(6, 4, dtype=torch.bool)},
        "next_action_mask: expected shape (6, 41), as hidden and weight, got (6, 4)",
    ),
    "actions": (
        lambda a: {"actions": a["actions"][None]},
        "actions: expected shape (6,) or (6, 1), got (1, 6)",
    ),
    "compacted": (
        lambda a: {
            "terminated": None,
            "non_final_mask": torch.ones(6, dtype=torch.bool),
            "next_hidden": torch.ones(7, 4),
        },
        "next_hidden: expected shape (M, 4) with non_final_mask, M being the number of its true entries, at most 6, "
        "got (7, 4)",
    ),
    "online and soft": (
        lambda a: {"next_hidden_online": a["next_hidden"], "target": "soft"},
        "next_hidden_online: expected None with target 'soft': double DQN chooses one action, the soft value averages "
        "over all of them",
    ),
    "target_hidden": (
        lambda a: {"target": "munchausen", "target_hidden": a["hidden"][:, :3]},
        "target_hidden: expected shape (6, 4), as hidden, got (6, 3)",
    ),
    "target_hidden and soft": (
        lambda a: {"target": "soft", "target_hidden": a["hidden"]},
        "target_hidden: expected None with target 'soft': only Munchausen reads it",
    ),
    "action_mask": (
        lambda a: {"cql_alpha": 1.0, "action_mask": torch.ones(6, 4, dtype=torch.bool)},
        "action_mask: expected shape (6, 41), as hidden and weight, got (6, 4)",
    ),
    "action_mask for nothing": (
        lambda a: {"action_mask": torch.ones(6, 41, dtype=torch.bool)},
        "action_mask: expected None: without target='munchausen' or cql_alpha no sum over the actions of s is taken; "
        "legal actions of the next state are next_action_mask",
    ),
    "sparse and conservative": (
        lambda a: {"cql_alpha": 1.0, "sparse_grad": True},
        "sparse_grad: expected False with cql_alpha: every row of the weight has a gradient",
    ),
    "munchausen": (
        lambda a: {"target": "munchausen"},
        "target_hidden: expected the target network's states with target 'munchausen', got None",
    ),
}


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_value_errors(case: str) -> None:
    arguments = make((6, 4))
    change, message = SHAPE_ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fused_linear_dqn_loss(**(arguments | change(arguments)))
    assert str(error.value) == message


def test_other_errors() -> None:
    arguments = make((6, 4))
    with pytest.raises(TypeError, match=r"weight: expected a floating dtype, got torch\.int64"):
        fused_linear_dqn_loss(**{**arguments, "weight": arguments["weight"].long()})
    with pytest.raises(TypeError, match=r"bias: expected a torch\.Tensor, got float"):
        fused_linear_dqn_loss(**{**arguments, "bias": 0.0})
    with pytest.raises(ValueError, match="next_weight: expected device cpu, as hidden, got meta"):
        fused_linear_dqn_loss(**{**arguments, "next_weight": arguments["next_weight"].to("meta")})
    with pytest.raises(ValueError, match="rewards: expected device cpu, as hidden, got meta"):
        fused_linear_dqn_loss(**{**arguments, "rewards": arguments["rewards"].to("meta")})
    for name in ("next_hidden", "next_weight"):
        with pytest.raises(TypeError, match=rf"{name}: expected a torch\.Tensor, got NoneType"):
            fused_linear_dqn_loss(**{**arguments, name: None})
    for name in ("next_hidden", "next_weight", "next_bias"):
        several = {name: [arguments[name]] * 2}
        with pytest.raises(
            TypeError, match=rf"{name}: expected .*, got list; only fused_dqn_loss takes several .* give"
        ):
            fused_linear_dqn_loss(**{**arguments, **several})
    for call in (
        lambda: fused_linear_dqn_loss(**arguments, ensemble="min"),
        lambda: FusedLinearDQNLoss(ensemble="min"),
    ):
        with pytest.raises(TypeError, match="unexpected argument 'ensemble'; only fused_dqn_loss takes several target"):
            call()
    arguments["actions"][4] = 41
    with pytest.raises(IndexError, match=r"actions: expected values in \[0, 41\), got 41 in row 4$"):
        fused_linear_dqn_loss(**arguments)


def test_illegal_actions_where_nothing_looks(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dqn_fused.arguments, dqn_fused.reference):
        monkeypatch.setattr(module, "looks_at_values", lambda device: False)
    arguments = make((6, 4))
    arguments["actions"][[1, 4]] = torch.tensor([41, -1])
    arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
    learned = [arguments[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    for sparse in (False, True):
        for create_graph in (False, not sparse):
            loss, td = fused_linear_dqn_loss(
                **arguments, reduction="sum", return_td_error=True, sparse_grad=sparse, backend=setting.backend
            )
            assert loss.isnan()
            assert td.isnan().tolist() == [False, True, False, False, True, False]
            grads = [x.to_dense() for x in torch.autograd.grad(loss, learned, create_graph=create_graph)]
            assert all(x.isfinite().all() for x in grads)
            assert (grads[0][[1, 4]] == 0).all()


def test_the_head_trains_with_sparse_adam() -> None:
    layer = nn.Linear(4, 50)
    arguments = make((6, 4), 50) | {"actions": torch.arange(6) * 7}  # a row for each sample, so that all can be met
    optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    arguments |= {"next_weight": torch.zeros(50, 4), "next_bias": torch.zeros(50)}
    losses = []
    for _ in range(50):
        loss = fused_linear_dqn_loss(**{**arguments, "weight": layer.weight, "bias": layer.bias}, sparse_grad=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert np.isfinite(losses).all()
