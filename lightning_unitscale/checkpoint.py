"""Checkpoints that can't be misread.

A model in which every factor is folded is a plain model and its state dict a plain state dict; the plan beside it, in
a Lightning checkpoint (key "unit_scaling_plan") and in the state dict's metadata, carries the learning-rate multipliers
on and says that these weights need no preparing. Where factors stay in the forward pass, the state dict itself holds
the plan and can't be loaded into a plain module, nor plain weights where factors are in force; see
`engine.plan.state_dict`, and `loading` for what `load_state_dict` does with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY, carried_plans, decode
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.in_force import forget, put_in_force
from lightning_unitscale.sharded_checkpoint import META, is_in_shards, read_shards


def plan_in(checkpoint: Mapping[str, Any]) -> Plan | None:
    """The plan in a Lightning checkpoint or in a state dict, if there is one."""
    carried = carried_plans(checkpoint).get("")
    if carried is not None:
        return decode(carried)
    if PLAN_KEY in checkpoint:
        return Plan.from_dict(checkpoint[PLAN_KEY])
    state = checkpoint.get("state_dict")
    return plan_in(state) if isinstance(state, Mapping) else None


def as_plain_data(data: dict[str, Any]) -> dict[str, Any]:
    """Only dicts, lists, numbers and strings of exactly these types, as `torch.load(weights_only=True)` wants them."""
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def prepare_for_loading(module: nn.Module, plan: Plan | None) -> None:
    """Make the module one whose weights mean what the checkpoint's do: with the checkpoint's plan, or plain.

    Raises:
        UnitScalingError: the plan is of another model.
    """
    current = plan_of(module)
    if plan is not None:
        if current is not None and as_plain_data(current.to_dict()) == as_plain_data(plan.to_dict()):
            return  # also where the module is wrapped by now, so that its names and shapes are others
        plan.check_matches(module)
    if current is not None:
        forget(module)
    if plan is not None:
        put_in_force(module, Plan.from_dict(plan.to_dict()))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU, read with `weights_only=True`; of one in shards all but optimizer states.

    Raises:
        UnitScalingError: the file is no checkpoint of plain containers and tensors.
    """
    folder = Path(path) if is_in_shards(Path(path)) else None
    try:
        checkpoint = torch.load(folder / META if folder else path, map_location="cpu", weights_only=True)
        if folder:
            checkpoint["state_dict"] = read_shards(folder)
    except Exception as error:  # whatever the unpickler makes of a file that is none
        first_line = (str(error).splitlines() or [""])[0]
        raise UnitScalingError(f"{path}: not a readable checkpoint ({type(error).__name__}: {first_line})") from error
    if not isinstance(checkpoint, dict):
        raise UnitScalingError(f"{path}: not a checkpoint or state dict, but a {type(checkpoint).__name__}")
    return checkpoint


def load_checkpoint(module: nn.Module, path: str | Path, *, strict: bool = True) -> Plan | None:
    """Load a checkpoint into a freshly built model outside a Trainer, its scaling put in place.

    Args:
        module: the model as its constructor builds it.
        path: a Lightning checkpoint, in one file or in shards, or a file with a state dict; read with
            `weights_only=True`, but for the index of shards, which is torch's own pickle: of folders you trust.
        strict: as in `load_state_dict`.

    Returns:
        The plan in force, as `scale_learning_rates` takes it, or None for a checkpoint without unit scaling.

    Raises:
        UnitScalingError: there is no such file, it is no checkpoint, or its plan is of another model.
    """
    if not Path(path).exists():
        raise UnitScalingError(f"there is no checkpoint at {path}.")
    checkpoint = read_checkpoint(path)
    prepare_for_loading(module, plan_in(checkpoint))
    module.load_state_dict(checkpoint.get("state_dict", checkpoint), strict=strict)
    return plan_of(module)
