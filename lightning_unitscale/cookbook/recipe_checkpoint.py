"""A model out of a checkpoint of `unitscale pretrain`, `finetune` or `distill`, with its scaling in force."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.checkpoint import plan_in, prepare_for_loading, read_checkpoint
from lightning_unitscale.cookbook.adapters import merged, with_adapter
from lightning_unitscale.cookbook.heads import CAUSAL_LM, new_model
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tokenizers import BYTES, VOCABULARY, load_tokenizer
from lightning_unitscale.cookbook.transformers_weights import check_changes, with_weights
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.plan.rename import plan_inside
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY, encode
from lightning_unitscale.errors import InputError, UnitScalingError, first_line

MODEL = "model"  # the attribute of the recipes' LightningModules that holds the transformers model


def from_checkpoint(file: Path, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    """Its model, with another head or config where that is asked for."""
    checkpoint, settings = _read(file)
    made_with = settings.get("head") or CAUSAL_LM
    config = {**settings["model"], **{key: value for key, value in changes.items() if key != "dtype"}}
    model = new_model(config, made_with)
    check_changes(model.config, changes)
    if settings.get("lora"):
        adapted = with_adapter(model, settings["lora"])
        _load(file, checkpoint, adapted)
        model = merged(adapted)
    else:
        _load(file, checkpoint, model)
    found = Pretrained(model, plan_of(model), _tokenizer_of(settings, model), str(file), made_with)
    if head not in (None, made_with):
        found = _with_other_head(found, str(head), changes)
    found.settings = settings
    dtype = str(changes.get("dtype", "float32")).removeprefix("torch.")
    nn.Module.to(found.model, getattr(torch, dtype))
    return found


def _load(file: Path, checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """The checkpoint's weights into the model below its module, and its scaling in force there."""
    plan = plan_in(checkpoint)
    state = {key.removeprefix(f"{MODEL}."): value for key, value in checkpoint["state_dict"].items()}
    if plan is not None:
        plan = plan_inside(plan, MODEL)
        if PLAN_KEY in state:
            state[PLAN_KEY] = encode(plan)  # with names as in the model
    prepare_for_loading(model, plan)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"model.path={file}: the weights do not fit the model ({first_line(error)})") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint and the hyperparameters of its module."""
    try:
        checkpoint = read_checkpoint(file)
    except UnitScalingError as error:
        raise InputError(f"model.path={error}") from error
    settings: dict[str, Any] = checkpoint.get("hyper_parameters") or {}
    if "model_type" not in (settings.get(MODEL) or {}) or "state_dict" not in checkpoint:
        raise InputError(
            f"model.path={file}: not a checkpoint of a transformers model made by unitscale (its hyper_parameters "
            "hold no model with a model_type). A folder that save_pretrained wrote can be given instead."
        )
    return checkpoint, settings


def _tokenizer_of(settings: Mapping[str, Any], model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    name = settings.get("tokenizer")
    if name is None and getattr(model.config, "vocab_size", None) == VOCABULARY:
        name = BYTES  # `unitscale pretrain` knows no other
    return load_tokenizer(name) if name else None


def _with_other_head(found: Pretrained, head: str, changes: Mapping[str, Any]) -> Pretrained:
    """The base of a loaded model under a new head; possible where the weights alone are the function."""
    if found.plan is not None and not found.plan.is_plain:
        raise InputError(
            f"model.path={found.path}: this checkpoint has unit-scaling factors in its forward pass, so it can't take "
            f"another head ({head}). Write plain weights first: unitscale export format=hf"
        )
    model, dtype = found.model, changes.get("dtype")
    return with_weights(found.path, model.state_dict(), model.config, head, dtype, found.tokenizer)
