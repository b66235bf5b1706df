"""Where the recipes' Hydra configuration lies, and the schema of the plugin's own node."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_unitscale.options import RECALIBRATE

PACKAGE = Path(__file__).parent.parent


def shipped(folder: str) -> Path:
    """`conf` or `recipes`: inside the installed package, else beside it in a checkout."""
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / folder).is_dir():
            return parent / folder
    raise FileNotFoundError(f"{folder}/ is neither in {PACKAGE} nor beside it; reinstall lightning-unitscale")


@dataclass
class UnitScalingNode:
    """The node `unitscale`: the arguments of `UnitScaling`, typed so that Hydra names a wrong key or value."""

    _target_: str = "lightning_unitscale.UnitScaling"
    _convert_: str = "all"  # plain containers: a DictConfig would make checkpoints unreadable
    scheme: str = "umup"
    format: str | None = None
    storage: str = "folded"
    weights: bool = True
    activations: bool = True
    gradients: bool = True
    lr_units: str = "standard"
    skip: list[str] = field(default_factory=list)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    recalibrate: list[int] = field(default_factory=lambda: list(RECALIBRATE))
    verify: bool = True
    optimizer_family: str | None = None


def register() -> None:
    """Makes the schema and the two resolvers known to Hydra; safe to call twice."""
    ConfigStore.instance().store(group="schema", name="unitscale", node=UnitScalingNode)
    OmegaConf.register_new_resolver("product", lambda a, b: int(a * b), replace=True)
    OmegaConf.register_new_resolver("quotient", lambda a, b: int(a // b), replace=True)
