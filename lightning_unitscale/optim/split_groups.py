"""One parameter group as the pieces that stand in for it while the optimizer computes its update."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_unitscale.engine.plan.step_scales import PLAIN, StepScale
from lightning_unitscale.errors import UnitScalingError

_PER_PARAMETER = ("params", "param_names")  # the keys of a group that have one entry per parameter


class StepWay(NamedTuple):
    """How the steps of one group answer to scales: its family of optimizers, and what its weight decay acts on."""

    family: str
    decoupled: bool


@dataclass(frozen=True)
class GroupLayout:
    """How the parameters of one group fall into pieces of equal scale: `(scale, positions in the group)` each."""

    params: tuple[Tensor, ...]
    way: StepWay
    pieces: tuple[tuple[StepScale, tuple[int, ...]], ...]

    @classmethod
    def of(cls, params: list[Tensor], way: StepWay, scales: Mapping[Tensor, StepScale]) -> GroupLayout:
        """The layout of a group of these parameters; those without a scale take plain steps."""
        positions: dict[StepScale, list[int]] = {}
        for i, parameter in enumerate(params):
            positions.setdefault(scales.get(parameter, PLAIN), []).append(i)
        # Last what takes no steps: the first piece tells what an optimizer remembers of its rates.
        pieces = sorted(positions.items(), key=lambda piece: piece[0].lr == 0.0)
        return cls(tuple(params), way, tuple((scale, tuple(where)) for scale, where in pieces))

    def fits(self, params: list[Tensor], way: StepWay) -> bool:
        """Whether the group is still the one that was laid out."""
        # Compared by identity: `==` of two tensors is elementwise.
        same_length = len(params) == len(self.params) and way == self.way
        return same_length and all(map(operator.is_, params, self.params))

    @property
    def plain(self) -> bool:
        """Whether the group can be stepped as it is."""
        return all(scale == PLAIN for scale, _ in self.pieces)


class SplitGroup:
    """One of the user's groups and the pieces that stand in for it during a step."""

    def __init__(self, group: dict[str, Any], layout: GroupLayout) -> None:
        self._group = group
        self._scale = layout.pieces[0][0]
        self.pieces = [_piece(group, scale, positions) for scale, positions in layout.pieces]
        for piece in self.pieces[1:]:
            # What an optimizer counts or caches in a group in place must not be counted once per piece.
            piece.update({key: _own(value) for key, value in piece.items() if key not in _PER_PARAMETER})
        self._given = {key: (value, _version(value)) for key, value in self.pieces[0].items()}

    def take_back(self) -> None:
        """Write what the optimizer changed in the (first) piece, such as a step counter, to the user's group."""
        factors = self._scale.factors(self._group)
        for key, value in self.pieces[0].items():
            factor = factors.get(key, 1.0)
            if key in _PER_PARAMETER or factor == 0.0:
                continue
            if factor == 1.0:
                self._group[key] = value
            elif not self._unchanged(key, value):
                _assign(self._group, key, divided(value, factor))

    def _unchanged(self, key: str, value: Any) -> bool:
        given, version = self._given[key]
        if isinstance(value, Tensor):
            # Not by value, which would wait for the device.
            return value is given and value._version == version
        return bool(value == given)


def _piece(group: dict[str, Any], scale: StepScale, positions: tuple[int, ...]) -> dict[str, Any]:
    piece = dict(group)
    for key in _PER_PARAMETER:
        if key in group:
            piece[key] = [group[key][i] for i in positions]
    for key, factor in scale.factors(group).items():
        if key in group:
            piece[key] = multiplied(key, group[key], factor)
    return piece


def multiplied(key: str, value: Any, factor: float | tuple[float, float]) -> Any:
    """A group's hyperparameter times its factor, by which `divided` divides it again.

    Raises:
        UnitScalingError: it can't be multiplied.
    """
    if factor in (1.0, (1.0, 1.0)):
        return value
    pairs = list(zip(value, factor, strict=True)) if isinstance(factor, tuple) else [(value, factor)]
    if all(part == 1.0 or isinstance(of, (int, float, Tensor)) for of, part in pairs):
        parts = tuple(of if part == 1.0 else of * part for of, part in pairs)
        return parts if isinstance(factor, tuple) else parts[0]
    makes_its_own = key == "lr" and value is None
    raise UnitScalingError(
        f"The parameter group's {key}={value!r} is to be multiplied by {factor}, which needs a number or a tensor. "
        + (
            "An optimizer that makes its rates itself (transformers' Adafactor with relative_step=True) can't be told "
            "them: give it a learning rate (relative_step=False, warmup_init=False, lr=…), or use scheme='preserve'."
            if makes_its_own
            else "This optimizer's update is not of the family it was said to belong to."
        )
    )


def divided(value: Any, factor: float | tuple[float, float]) -> Any:
    """What `multiplied` makes this value of."""
    if isinstance(factor, tuple):
        return tuple(divided(*pair) for pair in zip(value, factor, strict=True))
    return value if factor == 1.0 else value / factor


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        # Captured graphs and compiled steps read this very tensor.
        with torch.no_grad():
            group[key].copy_(value)
    else:
        group[key] = value
