"""Which parameters and modules the globs of `skip` and `overrides` mean."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_unitscale.engine.analysis.roles import Use
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.near_names import matches, near_glob
from lightning_unitscale.options import Options


def overrides_by_parameter(module: nn.Module, trace: Trace, options: Options) -> dict[str, dict[str, Any]]:
    """The overrides that are meant for each parameter, later ones first in force.

    Raises:
        UnitScalingError: a glob of `skip` or `overrides` matches nothing in the model.
    """
    names = [*trace.facts, *(name for name, _ in module.named_modules() if name)]
    for where, globs in (("skip", options.skip), ("overrides", tuple(options.overrides))):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                raise UnitScalingError(
                    f"{where}: the glob {glob!r} matches no parameter or module of {type(module).__name__}. "
                    f"{near_glob(glob, names)}"
                )
    found: dict[str, dict[str, Any]] = {}
    for glob, override in options.overrides.items():
        for name in trace.facts:
            if matches(name, (glob,)):
                found.setdefault(name, {}).update(override)
    return found


def override_roles(uses: Collection[Use], structure: Structure, options: Options) -> None:
    """Give uses of parameters the roles that the user says, later globs last.

    "hidden" and "readout" are roles of weights in matmuls: what else a glob covers, biases and gains, keeps its own.

    Raises:
        UnitScalingError: a glob says one of these where there is no weight of a matmul.
    """
    for glob, override in options.overrides.items():
        if "role" not in override:
            continue
        role = override["role"]
        meant = [use for use in uses if any(matches(name, (glob,)) for name in use.parameters)]
        fitting = [use for use in meant if role not in ("hidden", "readout") or _is_multiplied(use, structure)]
        if meant and not fitting:
            names = ", ".join(list(dict.fromkeys(name for use in meant for name in use.parameters))[:3])
            raise UnitScalingError(
                f"overrides[{glob!r}]: role={role!r} is for weights of matmuls, which {names} is not. Name such a "
                "weight, or leave the role out."
            )
        for use in fitting:
            use.role = role


def _is_multiplied(use: Use, structure: Structure) -> bool:
    return all(value in structure.weights_of(call) for call, value in zip(use.calls, use.values, strict=True))
