"""What to write instead: the ends of error messages about mistakes that people make."""

from torch import nn

ALL_ACTIONS = "; give the values of all actions: the choice among them is made here"


def of_type(name: str, x: object) -> str:
    """Of what is no tensor."""
    if isinstance(x, nn.Module):
        return f"; {name} is the network's output, such as network(states)"
    if type(x).__module__ == "numpy":
        return f"; torch.from_numpy({name}) is one"
    if isinstance(x, (list, tuple)):
        return f"; torch.tensor({name}) is one, torch.stack({name}) of tensors"
    return ""


def of_dtype(name: str, integers: bool) -> str:
    """Of a tensor of another dtype."""
    return f"; {name}.long() is one" if integers else ""


def of_actions(like: str) -> str:
    """Of actions that have one dimension too many."""
    return f"; {like} is of all actions, not gathered, and one-hot actions are given as their argmax(-1)"
