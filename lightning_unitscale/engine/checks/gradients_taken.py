"""The gradients of a step, taken once for all checks that need them, by the backward pass of a step that is recorded.

whole      of the sum of its losses, for what an optimizer's step does (`first_step`)
by_loss    samples of each loss's own, for whether it is their slope (`verify_gradients`)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_unitscale.engine.checks.gradients import named_gradients, rehearsed_losses, samples_of
from lightning_unitscale.engine.record.rehearsal import Rehearsal
from lightning_unitscale.engine.record.spread_tensors import whole

if TYPE_CHECKING:
    import pytorch_lightning as pl


class GradientsTaken:
    """Gradients of a step, and what is known of how they were computed.

    Args:
        module: the model.
        whole, by_loss: which gradients are wanted.

    Attributes:
        losses: their values, and the rounding of the dtype of each.
        whole: gradients by parameter; without those that no loss depends on.
        by_loss: the same for each loss, sampled.
        problem: why there are none.
        eps: of the coarsest dtype in the step; 0 if gradients by loss are not wanted.
        talks: whether the step talks to other processes; the same.
    """

    def __init__(self, module: nn.Module, *, whole: bool = False, by_loss: bool = False) -> None:
        self.module, self._wants_whole, self._wants_by_loss = module, whole, by_loss
        self.losses: list[tuple[float, float]] = []
        self.whole: dict[str, Tensor] = {}
        self.by_loss: list[dict[str, Tensor]] = []
        self.problem, self.eps, self.talks = "", 0.0, False

    def watching(self) -> AbstractContextManager[Any]:
        """To be entered around the step and `take`."""
        return _Watch(self) if self._wants_by_loss else nullcontext()

    def take(self, losses: list[Tensor]) -> None:
        """Take the gradients of these losses: by one backward pass, or, by loss, by one for each."""
        self.losses = [(number_of(loss), torch.finfo(loss.dtype).eps) for loss in losses]
        try:
            if self._wants_by_loss and not self.talks:
                self._take_by_loss(losses)
            elif self._wants_whole:
                self.whole = named_gradients(self.module, losses)
        except Exception as error:  # a model's own code may object to anything, a second backward for one
            self.problem = said(error)

    def take_of(self, step: Callable[[Rehearsal], Any], trainer: pl.Trainer | None = None) -> None:
        """Take them of a step that leaves no trace; if it fails, they have a problem."""
        if not (self._wants_whole or self._wants_by_loss):
            return
        try:
            with self.watching(), rehearsed_losses(self.module, step, trainer) as losses:
                self.take(losses)
        except Exception as error:  # as above
            self.problem = said(error)

    def _take_by_loss(self, losses: list[Tensor]) -> None:
        for index, loss in enumerate(losses):
            gradients = named_gradients(self.module, [loss], keep_graph=index + 1 < len(losses))
            self.by_loss.append(samples_of(gradients))
            if self._wants_whole:
                for name, gradient in gradients.items():
                    self.whole[name] = self.whole[name] + gradient if name in self.whole else gradient


def take_gradients(
    module: nn.Module,
    step: Callable[[Rehearsal], Any],
    trainer: pl.Trainer | None = None,
    *,
    whole: bool = False,
    by_loss: bool = False,
) -> GradientsTaken:
    """Run a step that leaves no trace for its gradients; if it fails, they are said to have a problem."""
    taken = GradientsTaken(module, whole=whole, by_loss=by_loss)
    taken.take_of(step, trainer)
    return taken


def number_of(loss: Tensor) -> float:
    """The value of a loss; NaN on `meta`, where it has none."""
    return nan if loss.is_meta else float(whole(loss.detach()).double())


def said(error: Exception) -> str:
    """An error of the model's own code, for a note."""
    return f"{type(error).__name__}: {str(error)[:200]}"


class _Watch(TorchDispatchMode):
    """Notes the coarsest dtype of a step, and whether it talks to other processes."""

    supports_higher_order_operators = True

    def __init__(self, taken: GradientsTaken) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.taken = taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional") and distributed.get_world_size() > 1:
            self.taken.talks = True
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.taken.eps = max(self.taken.eps, torch.finfo(result.dtype).eps)
        return result
