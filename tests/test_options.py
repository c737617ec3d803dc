"""One description of an option: signatures, docstrings, documentation and C++ say what dqn_fused.options says."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dqn_fused
from dqn_fused import reference
from dqn_fused.arguments import Batch
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
    assert re.findall(r"(\w+) = ", struct) == list(LossSpec._fields)
    assert int(re.findall(r"constexpr size_t OPTIONS = (\d+);", code)[0]) == len(LossSpec._fields)
    for name, codes in CODES.items():
        if all(isinstance(value, str) for value in codes):
            kind = "".join(word.capitalize() for word in name.split("_"))
            enumerators = re.findall(rf"enum {kind} : int64_t {{(.*?)}}", code, re.DOTALL)[0]
            found = {x.lower(): int(number) for x, number in re.findall(r"(\w+) = (\d+)", enumerators)}
            assert found == codes, kind


def test_what_a_kernel_of_no_options_would_do_is_not_done() -> None:
    """An op refuses another number of options, such as those of a library of another version."""
    if not dqn_fused.backends()["compiled"].available:
        pytest.skip("the compiled ops are not built")
    from dqn_fused import _ops
    from dqn_fused._backends import boxed

    q, actions = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    *given, options = boxed.arguments(Batch(q, actions, torch.zeros(2), q), LossSpec())
    _ops.general_td_loss(*given, options, True)
    with pytest.raises(RuntimeError):
        _ops.general_td_loss(*given, options[:-1], True)


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
