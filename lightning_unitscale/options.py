"""The options of unit scaling, checked before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from lightning_unitscale.errors import UnitScalingError

FORMAT_NAMES = (
    "fp8",
    "fp8_e4m3",
    "fp8_rowwise",
    "mxfp8",
    "nvfp4",
    "fp16",
    "bf16",
)  # the names in `formats.FORMATS`, which needs torch
ATTENTION_FORMATS = ("fp8", "fp8_e4m3", "fp16", "bf16")  # of attention's own products: none in blocks
STORAGES = ("folded", "unit")
LR_UNITS = ("standard", "umup")
# those of `optim.families` that the package brings
OPTIMIZER_FAMILIES = ("adam", "adam_sized", "relative", "sgd", "muon", "muon_matched")
ROLES = (
    *("embedding", "position", "token", "hidden", "readout", "bias", "norm"),
    *("relative_position", "scale", "other"),
)
# Beside the hyperparameters of the scheme
OVERRIDE_KEYS = ("role", "multiplier", "lr_multiplier", "format", "attention_format", "skip")
# Early, while everything changes; then rarely
RECALIBRATE = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)


def choose(name: str, value: object, allowed: Sequence[str]) -> None:
    """
    Raises:
        UnitScalingError: the value is not one of the allowed ones.
    """
    if value in allowed:
        return
    near = get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnitScalingError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}.{hint}")


def _check_override(glob: str, value: Mapping[str, Any]) -> None:
    for key, allowed in (("multiplier", "a number other than 0"), ("lr_multiplier", "a number of at least 0")):
        number = value.get(key, 1.0)
        fits = isinstance(number, (int, float)) and not isinstance(number, bool) and isfinite(number)
        if not fits or (number == 0 if key == "multiplier" else number < 0):
            raise UnitScalingError(f"overrides[{glob!r}]: {key}={number!r} must be {allowed}.")
    if not isinstance(value.get("skip", False), bool):
        raise UnitScalingError(f"overrides[{glob!r}]: skip={value['skip']!r} must be True or False.")


def _globs(skip: Any) -> tuple[str, ...]:
    given = () if skip is None else skip
    globs = tuple(given) if isinstance(given, Collection) and not isinstance(given, str) else (given,)
    if not all(isinstance(glob, str) for glob in globs):
        raise UnitScalingError(f"skip={skip!r} must be globs of module or parameter names, such as ['head', '*.bias'].")
    return globs


def _overrides(overrides: Any) -> dict[str, dict[str, Any]]:
    given = {} if overrides is None else overrides
    if not isinstance(given, Mapping) or not all(isinstance(value, Mapping) for value in given.values()):
        raise UnitScalingError(
            f"overrides={overrides!r} must map globs to settings, such as {{'head*': {{'role': 'hidden'}}}}."
        )
    return {str(glob): dict(value) for glob, value in given.items()}


def _hyperparameters(hyperparameters: Any) -> dict[str, Any]:
    given = {} if hyperparameters is None else hyperparameters
    if not isinstance(given, Mapping):
        raise UnitScalingError(
            f"hyperparameters={hyperparameters!r} must map names to values, such as {{'alpha_attn': 2.0}}."
        )
    return {str(name): value for name, value in given.items()}


def _steps(recalibrate: Sequence[int]) -> tuple[int, ...]:
    steps = tuple(recalibrate) if isinstance(recalibrate, Sequence) else (None,)
    if not all(type(step) is int and step > 0 for step in steps) or list(steps) != sorted(set(steps)):
        raise UnitScalingError(
            f"recalibrate={recalibrate!r} must be steps above 0 in rising order, such as (10, 1000)."
        )
    return tuple(recalibrate)


@dataclass(frozen=True)
class Options:
    """What `UnitScaling` and `unit_scale` can be told; see `UnitScaling` for each field.

    What only schemes can tell, `schemes.scheme_of` checks: the scheme's name, and its hyperparameters here and in
    `overrides`.

    Raises:
        UnitScalingError: a value is not one of the allowed ones; the message names the field.
    """

    scheme: str = "umup"
    format: str | None = None
    storage: str = "folded"
    weights: bool = True
    activations: bool = True
    gradients: bool = True
    lr_units: str = "standard"
    skip: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    recalibrate: Sequence[int] = RECALIBRATE
    verify: bool = True

    def __post_init__(self) -> None:
        choose("storage", self.storage, STORAGES)
        choose("lr_units", self.lr_units, LR_UNITS)
        if self.format is not None:
            choose("format", self.format, FORMAT_NAMES)
        for name in ("weights", "activations", "gradients", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise UnitScalingError(f"{name}={getattr(self, name)!r} must be True or False.")
        object.__setattr__(self, "skip", _globs(self.skip))
        object.__setattr__(self, "recalibrate", _steps(self.recalibrate))
        overrides = _overrides(self.overrides)
        for glob, value in overrides.items():
            _check_override(glob, value)
            if "role" in value:
                choose(f"overrides[{glob!r}] role", value["role"], ROLES)
            for key, formats in (("format", FORMAT_NAMES), ("attention_format", ATTENTION_FORMATS)):
                if value.get(key) is not None:
                    choose(f"overrides[{glob!r}] {key}", value[key], formats)
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "hyperparameters", _hyperparameters(self.hyperparameters))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that a checkpoint with it loads under `weights_only=True`."""
        return {**asdict(self), "skip": list(self.skip), "recalibrate": list(self.recalibrate)}


# The options that decide what a plan says; the others say when to look, or whether to check.
PLAN_OPTIONS = tuple(option.name for option in fields(Options) if option.name not in ("recalibrate", "verify"))
