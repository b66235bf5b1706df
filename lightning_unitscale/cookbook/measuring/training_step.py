"""One training step of a small language model: forward, backward and optimizer, as each variant of the benchmark."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_unitscale import scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.measuring.plain_llama import PlainLlama
from lightning_unitscale.cookbook.optimizers import new_optimizer
from lightning_unitscale.cookbook.runs import plain

VARIANTS = ("plain", "folded", "unit", "unit-scaling")
MODELS = ("transformers", "written")


def training_step(
    cfg: DictConfig, model_name: str, mode: str, variant: str, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """A function that takes one step; the initial weights are the same for all variants.

    Args:
        cfg: of the recipe `benchmark`.
        model_name: one of `MODELS`.
        mode: one of `side_by_side.MODES`.
        variant: one of `VARIANTS`.
        batch: inputs and targets.
    """
    model = new_model(cfg, model_name)
    plan = None
    run: Callable[[Tensor], Tensor]
    if variant == "unit-scaling":
        transforms = importlib.import_module("unit_scaling.transforms")
        model = transforms.unit_scale(model)  # a copy
        run = transforms.compile(model) if mode == "compiled" else model
    else:
        if variant != "plain":
            plan = unit_scale(model, lambda module: loss_of(module, batch), storage=variant)
        run = torch.compile(model) if mode == "compiled" else model
    stepped = run if isinstance(run, nn.Module) else model
    optimizer = new_optimizer(cfg.optimizer, stepped, stepped.parameters())
    if plan is not None:
        scale_learning_rates(optimizer, plan)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(run, batch).backward()
        optimizer.step()

    return step


class TransformersModel(nn.Module):
    """Any causal language model of transformers, as a function from tokens to logits."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, sequence]; result: [batch, sequence, vocabulary]."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def new_model(cfg: DictConfig, name: str) -> nn.Module:
    """A model with the weights that the seed gives."""
    torch.manual_seed(cfg.seed)
    config = cfg.model.config
    if name == "transformers":
        return TransformersModel(plain(config))
    sizes = (cfg.model.width, int(2.75 * cfg.model.width), cfg.model.depth, cfg.model.width // cfg.model.head_width)
    return PlainLlama(config.vocab_size, *sizes, cfg.task.sequence_length)


def random_batch(cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets: what a step costs doesn't depend on them."""
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (cfg.batch_size, cfg.task.sequence_length + 1)
    tokens = torch.randint(cfg.model.config.vocab_size, shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss, computed outside the model as in the recipes."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
