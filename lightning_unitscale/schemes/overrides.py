"""Which parameters and modules the globs of `skip` and `overrides` mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import Options


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a parameter's name, or the name of a module it belongs to, matches a glob."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(prefix, glob) for prefix in prefixes for glob in globs)


def overrides_by_parameter(module: nn.Module, trace: Trace, options: Options) -> dict[str, dict[str, Any]]:
    """The overrides that are meant for each parameter, later ones first in force.

    Raises:
        UnitScalingError: a glob of `skip` or `overrides` matches nothing in the model.
    """
    names = [*trace.facts, *(name for name, _ in module.named_modules() if name)]
    for where, globs in (("skip", options.skip), ("overrides", tuple(options.overrides))):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
                raise UnitScalingError(
                    f"{where}: the glob {glob!r} matches no parameter or module of {type(module).__name__}; "
                    f"it has {shown}"
                )
    found: dict[str, dict[str, Any]] = {}
    for glob, override in options.overrides.items():
        for name in trace.facts:
            if matches(name, (glob,)):
                found.setdefault(name, {}).update(override)
    return found
