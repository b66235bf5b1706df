"""Where the recipes' Hydra configuration lies, and the schema of the plugin's own node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from types import GenericAlias
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_unitscale.options import Options

PACKAGE = Path(__file__).parent.parent


def shipped(folder: str) -> Path:
    """`conf` or `recipes`: inside the installed package, else beside it in a checkout."""
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / folder).is_dir():
            return parent / folder
    raise FileNotFoundError(f"{folder}/ is neither in {PACKAGE} nor beside it; reinstall lightning-unitscale")


def _mutable(annotation: Any) -> Any:
    """A type as OmegaConf wants it: a list for a Sequence, a dict for a Mapping."""
    container = {Sequence: list, Mapping: dict}.get(get_origin(annotation))
    return annotation if container is None else GenericAlias(container, tuple(map(_mutable, get_args(annotation))))


def _node_field(option: Field[Any]) -> tuple[str, Any, Any]:
    """An option as `make_dataclass` takes it: name, type and default."""
    annotation, default = _mutable(get_type_hints(Options)[option.name]), getattr(Options(), option.name)
    container = get_origin(annotation)
    if container in (list, dict):
        return option.name, annotation, field(default_factory=partial(container, default))
    return option.name, annotation, field(default=default)


# The node `unitscale`: the arguments of `UnitScaling`, typed so that Hydra names a wrong key or value. Converted to
# plain containers, as a DictConfig would make checkpoints unreadable.
UnitScalingNode = make_dataclass(
    "UnitScalingNode",
    [
        ("_target_", str, field(default="lightning_unitscale.UnitScaling")),
        ("_convert_", str, field(default="all")),
        *map(_node_field, fields(Options)),
        ("optimizer_family", str | None, field(default=None)),
    ],
)


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; safe to call twice."""
    ConfigStore.instance().store(group="schema", name="unitscale", node=UnitScalingNode)
    OmegaConf.register_new_resolver("product", lambda a, b: int(a * b), replace=True)
    OmegaConf.register_new_resolver("quotient", lambda a, b: int(a // b), replace=True)
    OmegaConf.register_new_resolver("at_most_a_tenth", _at_most_a_tenth, replace=True)
    OmegaConf.register_new_resolver("ratio", lambda a, b: float(a) / float(b), replace=True)


def _at_most_a_tenth(wanted: int, of: int) -> int:
    """One at least; what is wanted where `of` is no number of steps (-1 of Lightning: without an end)."""
    return int(min(wanted, max(1, of // 10)) if of > 0 else wanted)
