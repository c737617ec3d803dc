"""One description of an option: signatures, docstrings, documentation and C++ say what dqn_fused.options says."""

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dqn_fused
from dqn_fused import _ops, reference, transforms
from dqn_fused._backends import boxed
from dqn_fused._ops import ARGUMENTS
from dqn_fused.arguments import NOT_DISTRIBUTIONAL, Batch, check_batch
from dqn_fused.options import CODES, FIELD_CODES, PUBLIC, LossSpec, check_loss, packed, unpacked

ROOT = Path(__file__).parent.parent
INTERNAL = {"shape", "checked"}  # of a Batch that is checked
TENSORS = [name for name in Batch._fields if name not in INTERNAL]
OF_THE_NEXT_STATE = {
    "rewards", "next_q", "terminated", "gamma", "non_final_mask", "next_q_online", "next_action_mask", "target_q",
    "target", "value_transform", "ensemble",
}  # fmt: skip
OF_THE_Q_MATRIX = {"q", "next_q", "ensemble", "next_q_online", "target_q"}
OF_A_LAYER = {"hidden", "weight", "bias", "sparse_grad", "tensor_parallel_group", "hidden_grad"}
OF_THE_HEAD = OF_A_LAYER | {"next_hidden", "next_weight", "next_bias", "next_hidden_online", "target_hidden"}
# More or less than fused_dqn_loss takes.
FUNCTIONS: dict[Callable[..., Any], tuple[set[str], set[str]]] = {
    dqn_fused.fused_dqn_loss: (set(), set()),
    dqn_fused.fused_dqn_loss_and_grad: (set(), set()),
    reference.dqn_loss: (set(), set()),
    dqn_fused.fused_td_loss: ({"target"}, OF_THE_NEXT_STATE),
    dqn_fused.fused_linear_dqn_loss: (OF_THE_HEAD, OF_THE_Q_MATRIX),
    dqn_fused.fused_linear_td_loss: (OF_A_LAYER | {"target"}, OF_THE_NEXT_STATE | {"q"}),
}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a call, except the one that collects unknown ones."""
    found = inspect.signature(function).parameters
    return {k: p for k, p in found.items() if k != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD}


every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@every_function
def test_signatures(function: Callable[..., Any]) -> None:
    more, less = FUNCTIONS[function]
    found = parameters(function)
    assert set(found) == (set(TENSORS) | set(PUBLIC)) - less | more
    for name, parameter in parameters(dqn_fused.fused_dqn_loss).items():
        if name in found and name not in less:
            assert found[name].default == parameter.default, name
            assert found[name].kind == parameter.kind, name


@pytest.mark.parametrize(
    ("module", "function", "instead"),
    [
        (dqn_fused.FusedDQNLoss, dqn_fused.fused_dqn_loss, {}),
        (
            dqn_fused.FusedLinearDQNLoss,
            dqn_fused.fused_linear_dqn_loss,
            {"head": {"weight", "bias"}, "next_head": {"next_weight", "next_bias"}},
        ),
    ],
    ids=["FusedDQNLoss", "FusedLinearDQNLoss"],
)
def test_modules(module: type, function: Callable[..., Any], instead: dict[str, set[str]]) -> None:
    """A module keeps gamma and the options, and its call takes the tensors."""
    kept, called, whole = (parameters(x) for x in (module, module.forward, function))  # type: ignore[attr-defined]
    assert kept.keys() & called.keys() == {"gamma"}
    named = {name for x in called for name in instead.get(x, {x})}
    assert kept.keys() | named == whole.keys()
    assert kept.keys() & PUBLIC.keys() == whole.keys() & PUBLIC.keys()
    for name in kept:
        assert kept[name].default == whole[name].default, name
    options = {name: p.default for name, p in kept.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    given = {name: object() for name in options.keys() & {"backend", "process_group"}}
    instance = module(**options | given)
    assert all(getattr(instance, name) is x for name, x in given.items())
    assert all(getattr(instance, name) == x for name, x in options.items() if name not in given)


@every_function
def test_docstrings(function: Callable[..., Any]) -> None:
    """Args lists what the signature has, in its order; or says that it is as in fused_dqn_loss."""
    text = inspect.getdoc(function) or ""
    if "Args:" not in text:
        assert "Arguments, result and errors are those of ``dqn_fused.fused_dqn_loss``" in text
        return
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"^    (\w+): ", section, re.MULTILINE)
    if "and all other arguments, as in ``fused_dqn_loss``" in " ".join(section.split()):
        assert set(listed) >= FUNCTIONS[function][0]
        assert set(listed) <= parameters(function).keys()
        return
    assert set(listed) == parameters(function).keys()
    if not FUNCTIONS[function][0]:
        assert listed == list(parameters(function))


def test_the_table_of_the_documentation() -> None:
    page = (ROOT / "docs/call.md").read_text()
    table = page.partition("| argument |")[2].partition("\n\n")[0]
    listed = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(parameters(dqn_fused.fused_dqn_loss))


def test_every_field_of_a_spec_follows_from_an_option() -> None:
    assert {field for fields in PUBLIC.values() for field in fields} == set(LossSpec._fields)
    accepted = set(inspect.signature(check_loss).parameters)
    assert accepted == {name for name, fields in PUBLIC.items() if fields}


def test_what_an_op_is_given() -> None:
    """Numbers, of which the same spec is made again: each value of each code, and numbers as they are."""
    specs = [LossSpec(), LossSpec(delta=0.3, temperature=0.5, alpha=0.9, clip=-1.0, cql_alpha=0.7)]
    specs += [LossSpec()._replace(**{name: value}) for name, codes in CODES.items() for value in codes]
    for spec in specs:
        numbers = packed(spec)
        assert len(numbers) == len(FIELD_CODES)
        assert all(type(x) is float for x in numbers)
        assert unpacked(numbers) == spec
    assert len({tuple(packed(spec)) for spec in specs}) == len(set(specs))


def test_cpp_has_the_same_options() -> None:
    """Fields of the struct in their order, and the codes of the enumerations."""
    code = (ROOT / "csrc/td_loss.h").read_text()
    struct = code.partition("struct Options {")[2].partition("};")[0]
    values = dict(re.findall(r"(\w+) = ([\w.]+)", struct))
    assert list(values) == list(LossSpec._fields)
    for (name, value), x in zip(values.items(), LossSpec(), strict=True):
        assert value.lower() == str(x).lower() if name in CODES else float(value) == x, name
    assert re.findall(r"read\(o\.(\w+)\)", code) == list(LossSpec._fields)
    assert int(re.findall(r"constexpr size_t OPTIONS = (\d+);", code)[0]) == len(LossSpec._fields)
    for name, codes in CODES.items():
        if all(isinstance(value, str) for value in codes):
            kind = "".join(word.capitalize() for word in name.split("_"))
            enumerators = re.findall(rf"enum {kind} : int64_t {{(.*?)}}", code, re.DOTALL)[0]
            found = {x.lower(): int(number) for x, number in re.findall(r"(\w+) = (\d+)", enumerators)}
            assert found == codes, kind


def named(path: str, start: str, pattern: str) -> list[str]:
    """What a pattern finds in a file, or a folder, between a start and the next end of parameters or of a structure."""
    files = sorted(x for x in (ROOT / path).rglob("*") if x.is_file()) or [ROOT / path]
    text = "".join(x.read_text() for x in files).partition(start)[2]
    assert text, f"{path} has no {start!r}"
    return re.findall(pattern, re.split(r"\) {|};|\);", text)[0])


PARAMETER = r"(\w+)(?:,|$)"
FLAT = [declared.split()[-1] for declared in ARGUMENTS]


def test_the_arguments_of_the_ops_follow_from_the_batch() -> None:
    """gamma, which is a tensor or a number, is two of them."""
    assert set(FLAT) == {*TENSORS, "gammas"}
    assert FLAT[-len(NOT_DISTRIBUTIONAL) :] == list(NOT_DISTRIBUTIONAL)
    values = {name: torch.tensor(float(i)) for i, name in enumerate(TENSORS)}
    for gamma in (values["gamma"], 0.5):
        batch = Batch(**values | {"gamma": gamma}, shape=torch.Size())  # type: ignore[arg-type]
        flat = dict(zip(FLAT, batch.flat(), strict=True))
        assert all(flat[name] is x for name, x in values.items() if name != "gamma")
        assert (flat["gammas"], flat["gamma"]) == ((gamma, 0.0) if gamma is values["gamma"] else (None, gamma))
        assert boxed.unflat(*batch.flat()) == batch


def test_cpp_takes_the_arguments_of_the_ops_in_their_order() -> None:
    """The stable ABI hands them over without their types: one in the place of another would be misread."""
    forward, backward = ([x.name for x in op._schema.arguments] for op in (_ops.td_loss, _ops.td_loss_backward))
    assert forward == [*FLAT, "options", "check"]
    assert named("csrc/ops.h", "static auto td_loss(", PARAMETER) == forward
    assert named("csrc/ops.h", "static Tensor td_loss_backward(", PARAMETER) == backward
    assert named("csrc/tensors.h", "inline Batch batch(", PARAMETER) == ["options", *FLAT]
    assert named("csrc/tensors.h", "inline Saved saved(", PARAMETER) == ["options", *backward[:-1]]


def test_the_node_takes_the_arguments_of_the_ops() -> None:
    """A tensor that it does not read would be left out, where the same call without the node has it."""
    forward, backward = ([x.name for x in op._schema.arguments] for op in (_ops.td_loss, _ops.td_loss_backward))
    forward.remove("options")
    saved = ["type" if x == "dtype" else x for x in backward if x not in ("grad_loss", "options")]
    node = "csrc/autograd"
    assert named(node, "struct Inputs {", r"(\w+)(?: = \w+)?[,;]") == forward
    assert named(node, "struct Saved {", r"(\w+)(?: = [\w:]+)?[,;]") == saved
    assert named(node, '"dqn_fused::td_loss_and_grad")', r"in\.(\w+)") == forward
    assert named(node, '"dqn_fused::td_loss_backward")', r"s\.(\w+)") == saved
    assert named(node, "enum Argument {", r"([A-Z_]+)") == [name.upper() for name in TENSORS]
    code = "".join(path.read_text() for path in (ROOT / node).iterdir())
    assert set(re.findall(r"\bin\.(\w+) =", code)) == set(forward)
    looped = [set(re.findall(r"\w+", x.lower())) for x in re.findall(r"const Argument i :\s*{([A-Z_,\s]+)}", code)]
    assert {name for name in TENSORS if Batch.__annotations__[name] is Tensor} in looped
    assert {name for name in TENSORS if Batch.__annotations__[name] == Tensor | None} in looped
    assert {"q", *transforms.MATRICES, *transforms.MATRICES_OF_S} in looped  # those that must have two dimensions


def test_vmap_folds_every_tensor() -> None:
    folded = (*transforms.PER_SAMPLE, *transforms.MATRICES, *transforms.MATRICES_OF_S)
    assert sorted((*folded, "q", "gamma", "non_final_mask")) == sorted(TENSORS)


def test_every_tensor_is_checked_and_handed_on() -> None:
    q, flags, ones = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    every = dict.fromkeys(TENSORS, q) | dict.fromkeys(("rewards", "gamma", "weights"), ones)
    every |= {"actions": ones.long(), "terminated": ones, "non_final_mask": ones.bool()}
    every |= {"next_action_mask": flags, "action_mask": flags}
    for target, left_out in (("max", {"target_q", "terminated"}), ("munchausen", {"next_q_online", "non_final_mask"})):
        given = {name: x for name, x in every.items() if name not in left_out}
        batch = check_batch(Batch(**given), check_loss(target=target, cql_alpha=1.0))  # type: ignore[arg-type]
        assert batch.shape == (2,)
        for name in TENSORS:
            found = getattr(batch, name)
            assert found is None if name in left_out else torch.equal(found, given[name]), name


def test_an_op_refuses_options_that_it_does_not_know() -> None:
    """One more, as of a newer version, whose meaning would be dropped; or one less, whose meaning is not known."""
    if not dqn_fused.backends()["compiled"].available:
        pytest.skip("the compiled ops are not built")
    q, actions = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    *given, _, check = boxed.arguments(Batch(q, actions, torch.zeros(2), q), LossSpec())
    right = packed(LossSpec())
    _, td_error, _ = _ops.td_loss(*given, right, check)
    backward = (torch.ones(()), td_error, actions, None, None, None, None, 3, q.dtype)
    _ops.td_loss_backward(*backward, right)
    for wrong in ([*right, 0.0], right[:-1]):
        with pytest.raises(RuntimeError):
            _ops.td_loss(*given, wrong, check)
        with pytest.raises(RuntimeError):
            _ops.td_loss_backward(*backward, wrong)


def test_the_walk_in_contributing_is_that_of_value_transform() -> None:
    """Each file that it lists names the option, and no other does, except the linear head's."""
    walk = (ROOT / "CONTRIBUTING.md").read_text().partition("## To add an option")[2].partition("And in the tests")[0]
    listed = {path for path in re.findall(r"`(\w+/[\w/]+\.\w+)`", walk) if not path.startswith("tests/")}
    sources = [x for folder in ("dqn_fused", "kernels", "csrc", "docs") for x in (ROOT / folder).rglob("*.*")]
    texts = {
        str(x.relative_to(ROOT)): x.read_text() for x in sources if x.suffix in (".py", ".md", ".h", ".cpp", ".cuh")
    }
    touched = {path for path, text in texts.items() if re.search("value_transform|signed_hyperbolic", text)}
    assert listed <= touched
    assert {path for path in touched - listed if not path.startswith(("dqn_fused/linear", "dqn_fused/head"))} == set()


def test_every_file_that_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = ("", "dqn_fused/", "dqn_fused/_backends/", "csrc/")
    for path in re.findall(r"`([\w./]*\w/?)`", text):
        if re.search(r"\.(py|md|h|json)$|/$", path):
            assert any((ROOT / folder / path).exists() for folder in folders), path


def test_repr_shows_what_is_not_a_default() -> None:
    """Options that change the loss were left out of a linear head's, of which only three were shown."""
    assert repr(dqn_fused.FusedDQNLoss(delta=2.0, return_cql=True)) == (
        "FusedDQNLoss(gamma=0.99, loss='mse', delta=2.0, reduction='mean', return_cql=True)"
    )
    assert repr(dqn_fused.FusedLinearDQNLoss(torch.tensor(0.5), loss="huber", cql_alpha=1.0)) == (
        "FusedLinearDQNLoss(gamma=0.5, loss='huber', delta=1.0, reduction='mean', cql_alpha=1.0)"
    )


def test_a_module_follows_its_attributes_and_can_be_copied() -> None:
    module = copy.deepcopy(dqn_fused.FusedDQNLoss(torch.tensor(0.5), backend="torch"))
    q, actions, rewards = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    module.reduction = "sum"
    given = (q, actions, rewards, torch.ones(1, 2))
    assert module(*given).item() == 1.5**2
    assert module(*given, gamma=1.0).item() == 4
    with pytest.raises(TypeError, match="FusedDQNLoss: unexpected argument 'discount'"):
        module(*given, discount=1.0)


def test_return_cql_may_be_anything_that_is_true() -> None:
    """A string, or a tensor, was a KeyError that named nothing, where the op is given numbers."""
    q, actions, rewards = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    expected = dqn_fused.fused_dqn_loss(q, actions, rewards, q, return_cql=True)
    for true in (1, torch.tensor(True), "yes"):
        found = dqn_fused.fused_dqn_loss(q, actions, rewards, q, return_cql=true)  # type: ignore[arg-type]
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
