"""The settings that a search tries, with values as lists or in the syntax of Hydra's own sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from random import Random
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_unitscale.errors import InputError

Point = tuple[tuple[str, Any], ...]  # settings and the value that each has
Space = Mapping[str, Sequence[Any]]  # settings and the values that each can have

_NOT_THERE = object()


def read_space(params: Mapping[str, Any]) -> Space:
    """The values of each setting, in the order of the file.

    Args:
        params: the tree of the configuration with, for each setting to try, a list of values or a text such as
            "range(1,5)". Settings that are None are left out.

    Raises:
        InputError: nothing is to be tried, or Hydra can't read it.
    """
    space = {name: _values(name, given) for name, given in _leaves(params).items() if given is not None}
    if not any(len(values) > 1 for values in space.values()):
        raise InputError(
            "the sweep is over nothing: give two or more values of some setting, such as params.optimizer.lr=[1,2,4]"
        )
    return space


def _leaves(params: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in params.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def _values(name: str, given: Any) -> list[Any]:
    if isinstance(given, list):
        return list(dict.fromkeys(given))
    try:
        override: Override = OverridesParser.create().parse_override(f"{name}={given}")
        if override.is_choice_sweep() or override.is_range_sweep():
            return [_plain(value) for value in override.sweep_iterator()]
    except HydraException as error:
        raise InputError(f"params.{name}={given} is not in Hydra's syntax ({str(error).splitlines()[0]})") from error
    raise InputError(f"params.{name}={given} has no values to choose from; write [0.5,1,2] or range(1,5)")


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def with_point(cfg: DictConfig, point: Point) -> DictConfig:
    """A copy of the configuration in which these settings have these values.

    Raises:
        InputError: there is no such setting, or it can't have the value.
    """
    cfg = cfg.copy()
    for name, value in point:
        if OmegaConf.select(cfg, name, default=_NOT_THERE) is _NOT_THERE:
            raise InputError(f"params.{name}: there is no setting {name} here, so no run can have it")
        try:
            OmegaConf.update(cfg, name, value)
        except OmegaConfBaseException as error:
            raise InputError(f"params.{name}: {value}: {str(error).splitlines()[0]}") from error
    return cfg


def random_points(space: Space, count: int, seed: int) -> list[Point]:
    """So many different points of the grid, all equally likely; all of them if there are no more."""
    draw, found = Random(seed), dict[Point, None]()
    while len(found) < min(count, prod(map(len, space.values()))):
        found[tuple((name, draw.choice(list(values))) for name, values in space.items())] = None
    return list(found)
