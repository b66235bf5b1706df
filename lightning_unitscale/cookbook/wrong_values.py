"""Wrong values of settings, found in the configuration alone: in a tenth of a second, before torch is imported.

a word where the default is a number, or neither of true and false where it is one of them
a size that is no positive whole number, a learning rate that is no positive number
a size of the model that is not that of the run which goes on
a node `unitscale` that `UnitScaling` would refuse: an unknown scheme, format, storage, … or argument
a word that is none of those that a setting of the command knows (`CHOICES`)

What only a recipe, a task or a model can tell, they say themselves, later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_unitscale.cookbook.arguments import keys_of
from lightning_unitscale.cookbook.config import UnitScalingNode, shipped
from lightning_unitscale.cookbook.help import composed
from lightning_unitscale.errors import InputError, UnitScalingError
from lightning_unitscale.near_names import did_you_mean, typed_path
from lightning_unitscale.options import OPTIMIZER_FAMILIES, Options, choose

SIZES = ("trainer.max_steps", "data.batch_size", "task.sequence_length", "model.width", "model.depth", "patience")
RATE = "optimizer.lr"
# Their defaults are numbers, or true and false; "auto", "00:30:00" and "warn" mean something to the Trainer as well.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {  # command → setting → what it may be
    "export": {
        "format": ("hf", "safetensors", "pt2", "onnx"),
        "dtype": ("float32", "bfloat16", "float16", "fp8"),
    },
    "inference": {
        "mode": ("generate", "chat", "predict", "evaluate"),
        "part": ("validation", "test"),
        "weights": ("float32", "bfloat16", "fp8"),
    },
}
WORDS_TOO = ("trainer.devices", "trainer.val_check_interval", "trainer.deterministic")


def check_values(command: str, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """All of it.

    Args:
        command: of `unitscale`.
        cfg: composed.
        overrides: in Hydra's grammar, those that it was composed with.

    Raises:
        InputError: a value is wrong; the message names the setting.
    """
    check_numbers(cfg, set(_keys(overrides)))
    _check_scaling(cfg)
    check_choices(command, cfg)
    _check_kinds(command, cfg, overrides)
    check_goes_on_with_its_model(cfg, set(_keys(overrides)))


def check_numbers(cfg: DictConfig, keys: Collection[str] = (*SIZES, RATE)) -> None:
    """Sizes and the learning rate of a training.

    Args:
        keys: which of them; those that are not there are passed over.

    Raises:
        InputError: one of them is not what it must be.
    """
    check_whole_numbers(cfg, *(size for size in SIZES if size in keys))
    rate = OmegaConf.select(cfg, RATE, default=1.0)
    if RATE in keys and (not isinstance(rate, (int, float)) or rate <= 0):
        raise InputError(f"{RATE}={rate} must be a positive number")


def check_whole_numbers(cfg: DictConfig, *keys: str) -> None:
    """
    Raises:
        InputError: one of these settings is there, and is no positive whole number.
    """
    for key in keys:
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a positive whole number")


def check_choices(command: str, cfg: DictConfig) -> None:
    """
    Raises:
        InputError: a setting of the command, or one of its list, is a word that it does not know.
    """
    for key, known in CHOICES.get(command, {}).items():
        for word in cfg[key] if OmegaConf.is_list(cfg[key]) else [cfg[key]]:
            if word is not None and word not in known:
                hint = did_you_mean(str(word), known)
                raise InputError(f"{key}={word} is not known; choose one of {', '.join(known)}.{hint}")


def check_goes_on_with_its_model(cfg: DictConfig, given: Collection[str]) -> None:
    """Nothing where the run of `ckpt_path` has left no record.

    Args:
        given: keys of overrides; sizes in `model.config` are looked at if they are among these, as some of them (the
            longest sequence) may be others than they were.

    Raises:
        InputError: the model is not the one that the run began with.
    """
    path = OmegaConf.select(cfg, "ckpt_path")
    record = typed_path(path).resolve().parent.parent / ".hydra" / "config.yaml" if path else None
    if record is None or not record.is_file() or not OmegaConf.is_dict(cfg.get("model")):
        return
    own = OmegaConf.load(record)
    sizes = [f"model.{name}" for name in cfg.model if isinstance(_found(cfg, f"model.{name}"), int)]
    for key in (*sizes, *(key for key in given if key.startswith("model.config.")), "model.config.model_type"):
        asked, began = _found(cfg, key), _found(own, key)
        if asked != began and isinstance(began, (int, str)):
            raise InputError(
                f"{key}={asked}, and the run of ckpt_path={path} began with {began}. A run goes on with its own model: "
                f"leave it out, or begin anew, without ckpt_path"
            )


def _check_scaling(cfg: DictConfig) -> None:
    node = OmegaConf.select(cfg, "unitscale")
    if not OmegaConf.is_dict(node) or node.get("_target_") != UnitScalingNode()._target_:
        return
    settings: Any = OmegaConf.to_container(node, resolve=True)
    known = [option.name for option in fields(UnitScalingNode)]
    if unknown := next((key for key in settings if key not in known), None):
        hint = did_you_mean(unknown, known, "unitscale.")
        raise InputError(f"unitscale.{unknown}: UnitScaling has no such argument.{hint}")
    try:
        Options(**{option.name: settings[option.name] for option in fields(Options) if option.name in settings})
        choose("scheme", settings["scheme"], sorted(_schemes()))
        if settings.get("optimizer_family") is not None:
            choose("optimizer_family", settings["optimizer_family"], OPTIMIZER_FAMILIES)
    except UnitScalingError as error:
        raise InputError(f"unitscale.{error}") from error


def _schemes() -> set[str]:
    """Those that a file of the group has: all of `schemes.SCHEMES`, which needs torch."""
    options = [OmegaConf.load(file) for file in (shipped("conf") / "unitscale").glob("*.yaml")]
    found = (OmegaConf.select(option, key) for option in options for key in ("scheme", "unitscale.scheme"))
    return {scheme for scheme in found if scheme}


def _check_kinds(command: str, cfg: DictConfig, overrides: Sequence[str]) -> None:
    given = [override for override in overrides if _is_of_a_setting(override)]
    if not given:
        return
    default = composed(command, [override for override in overrides if override not in given])
    for key in _keys(given):
        usual, value = (_found(settings, key) for settings in (default, cfg))
        if value is None or key in WORDS_TOO or (isinstance(value, bool) and isinstance(usual, bool)):
            continue
        if isinstance(usual, bool):
            raise InputError(f"{key}={value} must be true or false")
        if isinstance(usual, (int, float)) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"{key}={value} must be a number; its default is {usual}")


def _found(cfg: DictConfig | ListConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)


def _is_of_a_setting(override: str) -> bool:
    """Not of a group, which decides what the defaults are."""
    return all(not (shipped("conf") / key.partition("@")[0]).is_dir() and "/" not in key for key in _keys([override]))


def _keys(overrides: Sequence[str]) -> Iterator[str]:
    yield from (key for key, _ in keys_of(overrides))
