"""Checks of settings that several recipes make before they begin."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.errors import InputError


def check_known(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        InputError: one of the names in the setting `key` is not a known one.
    """
    choices = list(known)
    for name in names:
        if name not in choices:
            raise InputError(f"{key}: {name!r} is not known; choose from {', '.join(choices)}")


def check_positive(cfg: DictConfig, *keys: str) -> None:
    """
    Raises:
        InputError: one of the settings is not a whole number of at least 1.
    """
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a positive whole number")
