"""The model of `unitscale inference`: on its device, its weights kept in the format that was asked for."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from lightning_unitscale.cookbook.inference.recorded_run import asked_task, recorded_task
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tokenizers import make_able_to_pad
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import logits_of, to_plain
from lightning_unitscale.export.fp8_weights import quantize_weights


def weight_formats(cfg: DictConfig) -> list[str | None]:
    """The formats that weights are to be kept in; None: as they are stored."""
    return [cfg.weights] if cfg.weights is None or isinstance(cfg.weights, str) else list(cfg.weights)


def load(cfg: DictConfig, path: str, weights: str | None) -> Pretrained:
    """The model on the device of the configuration, its weights kept in this format."""
    recorded_task(path)  # its file may tell transformers of an architecture
    found = load_pretrained(path, cfg.model.head, cfg.model.tokenizer)
    if found.fresh:
        raise InputError(
            f"model.path={path} has no weights for {', '.join(found.fresh)} of {type(found.model).__name__}; give the "
            "head that it was trained with: model.head=AutoModelFor…"
        )
    task = asked_task(found, cfg.get("task"))
    task.complete(found.tokenizer, found.model)
    if weights not in (None, found.weights):
        if found.weights != "float32":
            raise InputError(f"model.path={path} has weights in {found.weights}; leave out weights={weights}")
        inputs = task.example_inputs(found.model)
        found.model = cast(PreTrainedModel, to_plain(found.model, partial(logits_of, inputs=inputs)))
        quantize_weights(found.model, str(weights), found.plan)
        found.weights = str(weights)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device.replace("auto", "cpu")
    torch.nn.Module.to(found.model, device)
    return found


def load_with_tokenizer(cfg: DictConfig, path: str) -> Pretrained:
    """As `load`, with a tokenizer that can pad."""
    found = load(cfg, path, weight_formats(cfg)[0])
    make_able_to_pad(found.text_tokenizer(), found.model)
    return found
