"""Messages, or ends of messages, about common mistakes: what to write instead."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

# What an argument is called elsewhere: docs/migrating.md says where.
_ELSEWHERE = {
    "q": ("q_values", "current_q", "state_action_values", "q_tm1"),
    "actions": ("action", "act", "a_tm1"),
    "rewards": ("reward", "rew", "r_t"),
    "next_q": ("next_q_values", "target_max", "q_t"),
    "terminated": ("done", "dones", "terminal", "terminals"),
    "~terminated": ("not_terminal", "not_done"),
    "gamma": ("discount", "discount_factor", "discounts", "discount_t"),
    "non_final_mask, next_action_mask or action_mask": ("mask",),
    "next_q_online": ("q_t_selector",),
    "weights": ("weight", "importance_weights", "is_weights"),
    "delta": ("beta", "huber_loss_delta"),
    "loss": ("loss_fn", "loss_function", "td_error_loss_fn"),
    "cql_alpha": ("alpha", "cql_scale"),
}
# Arguments that every loss has under the same name.
SHARED = {"actions", "rewards", "terminated", "~terminated", "gamma", "weights"}
CALLED_HERE = {elsewhere: here for here, names in _ELSEWHERE.items() for elsewhere in names}

ONE_TARGET_NETWORK = (
    "only fused_dqn_loss takes several target networks: the least value of each action is found before the maximum "
    "over actions, and a linear head sweeps one layer; give fused_dqn_loss the Q matrices, or fused_linear_td_loss a "
    "target"
)
ALL_ACTIONS = "; give the values of all actions: the choice among them is made here"


def of_type(name: str, x: object) -> str:
    """For what is not a tensor."""
    if isinstance(x, nn.Module):
        return f"; {name} is the network's output, such as network(states)"
    if type(x).__module__ == "numpy":
        return f"; torch.from_numpy({name}) is one"
    if isinstance(x, (list, tuple)):
        if name.startswith(("next_hidden", "next_weight", "next_bias")):
            return f"; {ONE_TARGET_NETWORK}"
        return f"; torch.tensor({name}) is one, torch.stack({name}) of tensors"
    return ""


def of_dtype(name: str, integers: bool) -> str:
    """For a tensor of another dtype."""
    return f"; {name}.long() is one" if integers else ""


def of_actions(like: str) -> str:
    """For actions that have one dimension too many."""
    return f"; {like} is of all actions, not gathered, and one-hot actions are given as their argmax(-1)"


def unexpected(function: str, given: Mapping[str, object]) -> NoReturn:
    """Raise for keywords that a function does not know."""
    name = next(iter(given))
    here = CALLED_HERE.get(name)
    if here not in SHARED and any(family in function.lower() for family in ("linear", "quantile", "categorical")):
        here = None
    more = "" if here is None else f"; it is called {here} here"
    if name == "ensemble" and "linear" in function.lower():
        more = f"; {ONE_TARGET_NETWORK}"
    raise TypeError(f"{function}: unexpected argument {name!r}{more}")


def warn_if_swapped(q: Tensor, networks: Sequence[Tensor | None], name: str = "q") -> None:
    """Warn where a loss is not recorded, although it would be with q, called ``name``, and next_q exchanged.

    For a function that a public one calls, before any check. Inside graphs and transforms there is no warning.
    """
    if not isinstance(q, Tensor) or q.requires_grad:
        return
    if not any(isinstance(x, Tensor) and x.requires_grad for x in networks) or not torch.is_grad_enabled():
        return
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        warnings.warn(
            f"{name} does not require a gradient and next_{name} does: are they swapped? {name} comes from the online "
            f"network, which is trained, and next_{name} is a constant",
            UserWarning,
            stacklevel=4,
        )
