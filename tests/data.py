"""The one source of test data. DQN_FUSED_TEST_SEED moves it, so that no test relies on one draw."""

import os
from typing import Any

import torch

SEED = int(os.environ.get("DQN_FUSED_TEST_SEED", "0"))


def source(number: int = 0) -> torch.Generator:
    """A generator; other numbers give independent ones."""
    return torch.Generator().manual_seed(1_000_003 * SEED + number)


def compact(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same batch with non_final_mask and the next states of the non-final samples only."""
    mask = ~arguments["terminated"]
    kept = {name: x[mask] if name.startswith("next_") else x for name, x in arguments.items() if name != "terminated"}
    return kept | {"non_final_mask": mask}
