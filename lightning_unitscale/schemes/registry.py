"""Schemes by name, with the hyperparameters that users give them: which there are, and what each of them has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import OVERRIDE_KEYS, Options, choose
from lightning_unitscale.schemes.agreement import check_agreement
from lightning_unitscale.schemes.scheme import Scheme

SCHEMES: dict[str, type[Scheme]] = {}
_Class = TypeVar("_Class", bound=type[Scheme])


def register(scheme: _Class) -> _Class:
    """Make a scheme known by its name; a class decorator."""
    SCHEMES[scheme.name] = scheme
    return scheme


def find(name: str, hyperparameters: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme of that name, with these hyperparameters and the defaults of all others.

    Raises:
        UnitScalingError: there is no such scheme or hyperparameter, and the message lists those there are; or a value
            is of the wrong kind.
    """
    choose("scheme", name, tuple(SCHEMES))
    _check_names("hyperparameters", hyperparameters or {}, name)
    return SCHEMES[name](**hyperparameters or {})


def scheme_of(options: Options) -> Scheme:
    """The scheme that the options ask for; the hyperparameters that `overrides` name are checked too.

    Raises:
        UnitScalingError: as for `find`, or the scheme lacks the storage, or `overrides` have a key that is not known,
            or options contradict each other.
    """
    scheme = find(options.scheme, options.hyperparameters)
    if options.storage not in scheme.storages:
        known = " or ".join(map(repr, scheme.storages))
        raise UnitScalingError(f"scheme={scheme.name!r} has no storage={options.storage!r}; choose {known}.")
    check_agreement(scheme, options)
    for glob, override in options.overrides.items():
        theirs = hyperparameters_in(override)
        _check_names(f"overrides[{glob!r}]", theirs, scheme.name, OVERRIDE_KEYS)
        replace(scheme, **theirs)
        for name in theirs.keys() & {*scheme.of_the_whole}:
            raise UnitScalingError(
                f"overrides[{glob!r}]: {name} is for the whole model, hyperparameters={{{name!r}: …}}; leave a "
                "part of it alone with skip."
            )
    return scheme


def hyperparameters_in(override: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of an override that are hyperparameters of the scheme."""
    return {name: value for name, value in override.items() if name not in OVERRIDE_KEYS}


def hyperparameters_of(scheme: str) -> tuple[str, ...]:
    """The names of a scheme's hyperparameters."""
    return tuple(known.name for known in fields(SCHEMES[scheme]))


def _check_names(where: str, given: Iterable[str], scheme: str, beside: Sequence[str] = ()) -> None:
    allowed = (*beside, *hyperparameters_of(scheme))
    for name in given:
        if name in allowed:
            continue
        others = [repr(other) for other in SCHEMES if name in hyperparameters_of(other)]
        if others or not allowed:
            owner = f" (those of {', '.join(others)} have)" if others else ""
            raise UnitScalingError(
                f"{where}: scheme={scheme!r} has no hyperparameter {name!r}{owner}. It has "
                f"{', '.join(map(repr, hyperparameters_of(scheme))) or 'none'}."
            )
        choose(f"{where} key", name, allowed)
