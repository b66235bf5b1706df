"""Gradients of a step that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_unitscale.engine.record.recorder import loss_tensors
from lightning_unitscale.engine.record.rehearsal import Rehearsal, rehearsal
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import OperandObserver

SAMPLES = 65_536  # elements of a gradient that are kept: enough to compare two, little beside the model


def rehearsed_gradients(
    module: nn.Module,
    step: Callable[[Rehearsal], Any],
    trainer: pl.Trainer | None = None,
    *,
    casts: bool = True,
    observer: OperandObserver | None = None,
    seed: float = 1.0,
) -> dict[str, Tensor]:
    """Evenly spaced elements of each parameter's gradient, in float64; parameters without one are left out.

    Args:
        casts: whether operands are cast.
        observer: watches the step, forward and backward.
        seed: what the backward pass starts from.
    """
    with rehearsal(module, trainer) as run, torch.enable_grad():
        if not casts:
            casts_in_force(module).clear()  # of the copies that the rehearsal works on
        with _no_reentrant_checkpoints(), observer or nullcontext():
            losses = [loss.sum() for loss in loss_tensors(step(run), run.losses) if loss.requires_grad]
            named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
            gradients = torch.autograd.grad(
                losses, list(named.values()), [torch.full_like(loss, seed) for loss in losses], allow_unused=True
            )
    return {
        name: gradient.reshape(-1)[:: -(-gradient.numel() // SAMPLES)].double()
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None and gradient.numel()
    }


@contextmanager
def _no_reentrant_checkpoints() -> Iterator[None]:
    """Run layers that are checkpointed the reentrant way in the other way, the only one `autograd.grad` works with.

    (`backward` would reach the hooks on parameters: DDP's reduction, optimizers that step in the backward pass.)
    """

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply  # the base class has it
