"""Whether a loss changes as its gradients say: a backward pass against two forward passes.

A set of parameters is moved along its gradients, each in proportion to its own size, and the change of the loss is
compared with what the gradients predict for exactly this move (roundings of the stored values included):

    one pass, a small move     within 2 % of the prediction: they agree, as healthy gradients do
    else forth and back        within 2 % at any length: they agree
    and further each time      two lengths after each other say the same, more than 4 % off: they do not
    else                       nothing is known: the loss is too coarse, or has jumps

Moves are measured by the change of the loss that they promise. Where anything is computed in bfloat16 or float16 only
long ones show something, and the bounds are wider (`Reach`). Only the elements sampled for the gradient are moved, and
put back from a copy of them: beside the model this needs next to no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.checks.gradients import as_real, spacing

_LONGEST = 0.1  # of a parameter's own RMS
_ROUNDINGS = 64  # of the loss: a smaller difference says nothing


class Reach(NamedTuple):
    """What can be told apart in a dtype.

    Attributes:
        first: the change of the loss, in units of the loss, that the first move is for.
        moves: the same, of those forth and back.
        tolerance: of the prediction, for gradients that agree.
        off: the same, for gradients that don't.
    """

    first: float
    moves: tuple[float, ...]
    tolerance: float
    off: float

    @classmethod
    def of(cls, eps: float) -> Reach:
        """Of a computation whose coarsest dtype rounds by `eps`."""
        return COARSE if eps > 1e-4 else FINE


# Measured over the models of the tests: float32 is within 0.6 % at the first move or 1 % at the next; autocast to
# bfloat16 within 5 %.
FINE = Reach(first=3e-4, moves=(1e-4, 1e-3, 1e-2), tolerance=0.02, off=0.04)
COARSE = Reach(first=1e-2, moves=(4e-3, 1.6e-2, 6.4e-2), tolerance=0.05, off=0.25)


class Measured(NamedTuple):
    """What was found about a set of parameters.

    Attributes:
        agrees: None if that is not known.
        ratio: the change of the loss over what the gradients predict.
    """

    agrees: bool | None
    ratio: float


class Slopes:
    """The slopes of one loss of a model.

    Args:
        module: the model, whose parameters are moved.
        loss: the loss now, by another forward pass of the same step.
        value: what it is without any move.
        eps: the rounding of its dtype.
        gradients: sampled, by parameter.
        reach: of all that it is computed from.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[], float],
        value: float,
        eps: float,
        gradients: dict[str, Tensor],
        reach: Reach,
    ) -> None:
        self.loss, self.value, self.gradients, self.reach = loss, value, gradients, reach
        self._noise = _ROUNDINGS * eps * abs(value)
        named = dict(module.named_parameters())
        self._parameters = {name: named[name] for name in gradients}
        self._norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        self._sizes = {name: _size(parameter, gradients[name]) for name, parameter in self._parameters.items()}
        self._size_zeros()

    def measure(self, names: Sequence[str]) -> Measured:
        """Move these parameters together and look at the loss."""
        slope = sum(self._norms[name] * self._sizes[name] for name in names)
        if slope == 0.0:
            return Measured(None, 1.0)
        ratio = nan
        for forth_and_back, move in ((False, self.reach.first), *((True, move) for move in self.reach.moves)):
            before, length = ratio, self._length(move, slope)
            change, predicted = self._change(names, -length)
            if forth_and_back:
                other, promised = self._change(names, length)
                change, predicted = change - other, predicted - promised
            if predicted and abs(change - predicted) <= self.reach.tolerance * abs(predicted):
                return Measured(True, 1.0)
            ratio = change / predicted if predicted and abs(change - predicted) > self._noise else nan
            if not forth_and_back or length == _LONGEST:
                ratio = nan  # one way it bends, and where moves can't be longer two of them are one
            if abs(ratio - before) <= self.reach.tolerance * max(1.0, abs(ratio)):
                return Measured(False if abs(ratio - 1) > self.reach.off else None, ratio)
        return Measured(None, 1.0)

    def _length(self, move: float, slope: float) -> float:
        return min(move * abs(self.value) / slope if self.value else _LONGEST, _LONGEST)

    def _change(self, names: Sequence[str], length: float) -> tuple[float, float]:
        with self._moved(names, length) as predicted:
            return self.loss() - self.value, predicted

    @contextmanager
    def _moved(self, names: Sequence[str], length: float) -> Iterator[float]:
        """Inside, the parameters are moved along their gradients; yields what these say the loss changes by."""
        before: list[tuple[Tensor, Any, Tensor]] = []
        promised = 0.0
        try:
            for name in names:
                if self._norms[name]:
                    gradient = self.gradients[name]
                    values, where = _sampled(as_real(self._parameters[name].data))
                    old = values[where].clone()
                    before.append((values, where, old))
                    new = (old + gradient * (length * self._sizes[name] / self._norms[name])).to(old.dtype)
                    values[where] = new
                    promised += float(gradient @ (new.double() - old.double()))
            yield promised
        finally:
            for values, where, old in before:
                values[where] = old

    def _size_zeros(self) -> None:
        """A parameter that is 0 has no size: it is moved until it does what the others do on average, within reason."""
        slopes = [self._norms[name] * size for name, size in self._sizes.items() if self._norms[name] and size]
        usual = sum(slopes) / len(slopes) if slopes else 1.0
        for name, size in self._sizes.items():
            if not size and self._norms[name]:
                self._sizes[name] = min(usual / self._norms[name], self.gradients[name].numel() ** 0.5)


def _size(parameter: Tensor, gradient: Tensor) -> float:
    """The norm of as many elements of the parameter as are sampled."""
    values = as_real(parameter.detach())
    rms = float(torch.linalg.vector_norm(values.float())) / values.numel() ** 0.5
    return float(rms * gradient.numel() ** 0.5)


def _sampled(values: Tensor) -> tuple[Tensor, Any]:
    """The elements that `samples_of` keeps, whatever the layout in memory: a tensor and where in it they are."""
    if values.is_contiguous():
        return values.view(-1), slice(None, None, spacing(values))
    places = torch.arange(0, values.numel(), spacing(values), device=values.device)
    return values, torch.unravel_index(places, values.shape)
