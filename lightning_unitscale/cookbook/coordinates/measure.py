"""Mean |x| of every module's output, at the start and by how much it changes in some steps: a model's coordinates.

    start     mean |x_0|
    change    mean |x_k - x_0| on the same batch, after k optimizer steps on it

In a parametrization that transfers, neither grows with width, and the change does not vanish (Tensor Programs V, Yang
et al., arXiv 2203.03466, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_unitscale import scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.optimizers import new_optimizer
from lightning_unitscale.errors import InputError

UNTOUCHED = "standard"  # in place of a scheme


@dataclass(frozen=True)
class CoordinateRun:
    """Which model is looked at.

    Attributes:
        scheme: a name in SCHEMES, in its own units of the learning rate, or "standard" for the untouched model.
        knob: "width" or "depth": what is varied.
        size: of that.
        speed: name of the learning rate.
    """

    scheme: str
    knob: str
    size: int
    speed: str
    seed: int


@dataclass(frozen=True)
class Coordinate:
    """One module's output.

    Attributes:
        start: mean |x| before the first step.
        change: mean |x - x at the start| after the last; not finite where training diverged.
    """

    place: CoordinateRun
    module: str
    start: float
    change: float


def coordinates(cfg: DictConfig, place: CoordinateRun) -> list[Coordinate]:
    """Trains one model for `cfg.steps` steps on one batch, and compares its outputs before and after.

    Raises:
        InputError: the factory makes no LightningModule, or its step has no loss to call backward on.
    """
    cfg = with_size(cfg, place.knob, place.size)
    pl.seed_everything(place.seed, verbose=False)
    module = new_model(cfg)
    batch = next(iter(module.train_dataloader()))

    def step(model: Any) -> Tensor:
        result = model.training_step(batch, 0)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise InputError(f"training_step of {type(model).__name__} returns no loss that has a gradient")
        return loss

    plan = None if place.scheme == UNTOUCHED else unit_scale(module, step, place.scheme, lr_units="umup")
    rates = cfg.learning_rates[UNTOUCHED if plan is None else "schemes"]
    optimizer = new_optimizer(cfg.optimizer, module, module.parameters(), lr=rates[place.speed])
    if plan is not None:
        scale_learning_rates(optimizer, plan)
    before = outputs(module, step)
    for _ in range(cfg.steps):
        optimizer.zero_grad()
        step(module).backward()
        optimizer.step()
    after = outputs(module, step)
    return [
        Coordinate(place, name, float(x.abs().mean()), float((after[name] - x).abs().mean()))
        for name, x in before.items()
        if name in after and after[name].shape == x.shape
    ]


def new_model(cfg: DictConfig) -> pl.LightningModule:
    """What the factory `cfg.model` makes.

    Raises:
        InputError: it is no LightningModule with data of its own and automatic optimization.
    """
    module = instantiate(cfg.model, _recursive_=False, _convert_="all")
    if not isinstance(module, pl.LightningModule):
        raise InputError(f"model._target_={cfg.model._target_} makes a {type(module).__name__}, not a LightningModule")
    if not module.automatic_optimization:
        raise InputError(f"{type(module).__name__} optimizes by hand; coord_check takes its own steps on training_step")
    if type(module).train_dataloader is pl.LightningModule.train_dataloader:
        raise InputError(f"{type(module).__name__} has no train_dataloader, from which coord_check takes its batch")
    return module


def with_size(cfg: DictConfig, knob: str, size: int) -> DictConfig:
    """A copy of the settings with another width or depth.

    Raises:
        InputError: the model has no such knob.
    """
    key = cfg.knobs[knob]
    if OmegaConf.select(cfg, key, default=None) is None:
        raise InputError(
            f"knobs.{knob}={key}: the model has no such setting; give one that its factory takes, as in "
            f"'+model.hidden_size=64 knobs.{knob}=model.hidden_size', or leave the axis out: {knob}s=[]"
        )
    cfg = cfg.copy()
    OmegaConf.update(cfg, key, size)
    return cfg


@torch.no_grad()
def outputs(module: nn.Module, step: Any) -> dict[str, Tensor]:
    """The first tensor that each submodule returns, from its last call in a step."""
    found: dict[str, Tensor] = {}
    with _watched(module, found), torch.enable_grad():
        step(module)
    return found


@contextmanager
def _watched(module: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                found[name] = tensor.detach().clone()

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)
