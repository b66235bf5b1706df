"""The learning-rate schedule of the recipes: a linear rise, then a linear fall."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warm_up_and_decay(optimizer: Optimizer, warmup_steps: int, decay_steps: int, final: float) -> LambdaLR:
    """A schedule to be stepped after every optimizer step.

    Args:
        optimizer: its groups' learning rates are the peak.
        warmup_steps: the peak is reached after so many steps.
        decay_steps: the last value is reached after so many steps, counted from the start of training.
        final: that value, as a share of the peak.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return 1 - (1 - final) * done

    return LambdaLR(optimizer, factor)
