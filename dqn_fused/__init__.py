"""The DQN loss as one fused call for PyTorch.

>>> import torch
>>> from dqn_fused import fused_dqn_loss
>>> q = torch.zeros(32, 4, requires_grad=True)
>>> loss = fused_dqn_loss(q, torch.zeros(32, dtype=torch.int64), torch.ones(32), torch.zeros(32, 4))
>>> loss.backward()
>>> loss.item()
1.0
"""

from dqn_fused._backends import BackendUnavailableError, backends
from dqn_fused._warmup import warmup
from dqn_fused.categorical import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
)
from dqn_fused.categorical_module import FusedCategoricalLoss, FusedCategoricalTDLoss
from dqn_fused.linear import fused_linear_dqn_loss, fused_linear_td_loss
from dqn_fused.linear_module import FusedLinearDQNLoss
from dqn_fused.loss import fused_dqn_loss, fused_dqn_loss_and_grad, fused_td_loss
from dqn_fused.module import FusedDQNLoss
from dqn_fused.quantile import FusedQuantileLoss, fused_quantile_loss, fused_quantile_loss_and_grad
from dqn_fused.targets import Munchausen, Soft

__version__ = "0.2.0.dev0"
__all__ = [
    "BackendUnavailableError",
    "FusedCategoricalLoss",
    "FusedCategoricalTDLoss",
    "FusedDQNLoss",
    "FusedLinearDQNLoss",
    "FusedQuantileLoss",
    "Munchausen",
    "Soft",
    "backends",
    "fused_categorical_loss",
    "fused_categorical_loss_and_grad",
    "fused_categorical_td_loss",
    "fused_categorical_td_loss_and_grad",
    "fused_dqn_loss",
    "fused_dqn_loss_and_grad",
    "fused_linear_dqn_loss",
    "fused_linear_td_loss",
    "fused_quantile_loss",
    "fused_quantile_loss_and_grad",
    "fused_td_loss",
    "warmup",
]
