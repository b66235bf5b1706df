"""Averages of a model that were made before it was prepared: `AveragedModel` copies the module as it is then.

Where factors stay in the forward pass, stored weights are the function only together with them, and a copy made before
has none: it would take the weights over and be another function. Lightning's own averages are prepared with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.namespaces import callbacks_of

if TYPE_CHECKING:
    import pytorch_lightning as pl


def averages_of(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The copies of the model that averaging callbacks made before it was prepared, or before its weights are loaded.

    Lightning's WeightAveraging and StochasticWeightAveraging copy the module in `setup` and exchange weights with it
    later, so both must store the same; an average that was never updated holds the initial weights.
    """
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def check_average(average: AveragedModel, model: nn.Module) -> None:
    """
    Raises:
        UnitScalingError: the model has factors in its forward pass, and the average none.
    """
    plan, inner = plan_of(model), average.module
    if plan is not None and not plan.is_plain and plan_of(inner) is None:
        raise UnitScalingError(
            f"this AveragedModel was made of {type(model).__name__} before that was prepared, and has not got the "
            "factors that stand in its forward pass now: with its weights it would be another function. Make the "
            "average after unit_scale, or after the first training step of a Trainer. Nothing was changed."
        )
