"""The one source of test data. DQN_FUSED_TEST_SEED moves it, so that no test relies on one draw."""

import os

import torch

SEED = int(os.environ.get("DQN_FUSED_TEST_SEED", "0"))


def source(number: int = 0) -> torch.Generator:
    """A generator; other numbers give independent ones."""
    return torch.Generator().manual_seed(1_000_003 * SEED + number)
