"""Warns of hyperparameters that would be usual in ordinary units, where they are given in a scheme's (its η)."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_unitscale.optim.largest_eta import peak_rate
from lightning_unitscale.warn_user import warn_user

LARGE_DECAY = 0.02  # of a weight in one step; AdamW's usual lr · weight_decay is below 1e-3


def warn_of_ordinary_units(optimizer: Optimizer, least_usual_rate: float) -> None:
    """Look at the learning rate, at its largest in a schedule, and the weight decay of each group.

    Args:
        least_usual_rate: of the scheme.

    Warns:
        of a learning rate below `least_usual_rate`, and of decoupled weight decay that would take more than
        `LARGE_DECAY` of a weight in one step.
    """
    for group in optimizer.param_groups:
        lr = peak_rate(group)
        decay = lr * float(group.get("weight_decay") or 0.0)
        if lr < least_usual_rate:
            warn_user(
                f"lr_units='umup' with a learning rate of {lr:g}: in the scheme's own units about 1 is usual (try 0.1 "
                f"to 4), and below {least_usual_rate} a model hardly learns. For a learning rate with its ordinary "
                "meaning use lr_units='standard'."
            )
        if decay > LARGE_DECAY:
            warn_user(
                f"lr_units='umup' with lr · weight_decay = {decay:g}: decoupled weight decay would take that share of "
                "each weight in each step. Divide weight_decay by what the learning rate grew by (1e-4 is usual at lr "
                "1 to 2)."
            )
