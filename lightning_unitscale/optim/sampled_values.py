"""A few elements of a few parameters, as the last step left them: what shows writes that no version counter counts.

Each step looks at the next few parameters, and in each at elements spread over it, so the cost is the same for a model
of any size. A write that comes back at every step (a clamp, a projection) is met within a round of all parameters; one
made once is met if it is made to most of a model's values (a rewind, an average put in, pruning), but not, by chance,
if to few of them. Bits are compared, so that NaN is equal to itself. A device other than the CPU is asked what it has
found once in many steps, for it would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PARAMETERS = 2  # looked at in each step
_ELEMENTS = 64  # of each of them, or up to twice as many
_STEPS_BETWEEN_QUESTIONS = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Sample(NamedTuple):
    name: str
    start: int
    bits: Tensor


class SampledValues:
    """The samples of one set of parameters."""

    def __init__(self) -> None:
        self._samples: dict[int, _Sample] = {}
        self._found: list[tuple[str, Tensor]] = []  # on devices that have not been asked yet
        self._taken = 0

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """What was known of them is about to be no longer true."""
        for parameter in parameters:
            self._samples.pop(id(parameter), None)

    def take(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Remember some elements of the next few of these parameters.

        Args:
            named: what of them is on this process, by name, each the same object as ever or a part of it.
        """
        for _ in range(min(_PARAMETERS, len(named))):
            self._taken += 1
            name, parameter = named[self._taken % len(named)]
            self._samples[id(parameter)] = _Sample(name, self._taken, _bits(parameter, self._taken).clone())

    def changed(self, parameters: Sequence[Tensor]) -> list[str]:
        """The names of those among the parameters that are known to have changed since."""
        for parameter in parameters:
            sample = self._samples.pop(id(parameter), None)
            if sample is not None:
                now = _bits(parameter, sample.start)
                same_size = now.shape == sample.bits.shape and now.dtype == sample.bits.dtype
                if same_size and now.device == sample.bits.device:
                    self._found.append((sample.name, (now != sample.bits).any()))
        if all(flag.is_cpu for _, flag in self._found) or len(self._found) >= _PARAMETERS * _STEPS_BETWEEN_QUESTIONS:
            found, self._found = self._found, []
            return [name for name, flag in found if flag]
        return []


def _bits(parameter: Tensor, start: int) -> Tensor:
    """Elements spread over a parameter, as integers of their bits; those of a sharded one that are here."""
    values: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    order = sorted(range(values.dim()), key=lambda dim: -values.stride()[dim])  # as they lie in memory
    values = values.permute(order).reshape(-1)
    step = max(1, values.numel() // _ELEMENTS)
    return values[start % step :: step].view(_BITS[values.element_size()])
