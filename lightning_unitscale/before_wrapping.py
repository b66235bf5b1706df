"""FSDP1 and DeepSpeed: the plan is made in the Trainer's set-up, before they take the model apart.

    FSDP1        flat pieces of several parameters; what the optimizer has are views of them (`use_orig_params=True`)
    DeepSpeed    flat pieces of whole parameter groups (ZeRO 1 and 2), or of each parameter (ZeRO 3)

Neither shapes nor forward passes are to be had of these, so the step is recorded on the module as `configure_model`
built it, whole in each process and on the device where it is (the CPU, unless the module was moved), with the first
batch, which is drawn for that and drawn again by the training. A run that goes on takes its plan from its checkpoint.

Learning-rate multipliers find FSDP1's views by their names; DeepSpeed gets parameter groups that are split by them
(`optim.engine_groups`), for a group is what it keeps one learning rate for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.namespaces import classes
from lightning_unitscale.options import Options
from lightning_unitscale.sharded_checkpoint import all_but_weights

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import Strategy

CHECKPOINT = "_unit_scaling_checkpoint"  # as in `attachments`
FSDP1, DEEPSPEED, ZERO3 = "FSDP1", "DeepSpeed", "DeepSpeed's ZeRO 3"
_ENGINES = {FSDP1: "strategies.FSDPStrategy", DEEPSPEED: "strategies.DeepSpeedStrategy"}
INSTEAD = (
    "Use strategy='unitscale_model_parallel' (or Lightning's ModelParallelStrategy with the callback) and call "
    "torch.distributed.fsdp.fully_shard in configure_model: the same sharding, FSDP2. Nothing was trained."
)


def engine_that_flattens(strategy: Strategy) -> str | None:
    """Which of them the strategy is, if it is one."""
    name = next((name for name, path in _ENGINES.items() if isinstance(strategy, classes(path))), None)
    return ZERO3 if name == DEEPSPEED and strategy.zero_stage_3 else name  # type: ignore[attr-defined]  # DeepSpeed's


def check_options(strategy: Strategy, options: Options) -> None:
    """
    Raises:
        UnitScalingError: the options ask for what can't be done on flat pieces of parameters; nothing has changed.
    """
    engine = engine_that_flattens(strategy)
    if engine is None:
        return
    if options.format is not None:
        raise UnitScalingError(
            f"format={options.format!r} casts the operands of each weight, and {engine} flattens parameters: what runs "
            f"are views, measured nowhere. {INSTEAD}"
        )
    if engine == FSDP1 and not getattr(strategy, "kwargs", {}).get("use_orig_params", True):
        raise UnitScalingError(
            "use_orig_params=False leaves the optimizer one flat parameter for many weights, which have different "
            "learning-rate multipliers. Leave it out: True is Lightning's default, with the same sharding."
        )
    if engine in (DEEPSPEED, ZERO3) and "optimizer" in (getattr(strategy, "config", None) or {}):
        raise UnitScalingError(
            "the optimizer of DeepSpeed's config has one learning rate for all weights, which have different "
            "multipliers. Return it from configure_optimizers, and leave it out of the config."
        )


def check_whole(module: nn.Module, engine: str) -> None:
    """
    Raises:
        UnitScalingError: parameters have no values here yet.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or "_flat_param" in name:
            raise UnitScalingError(
                f"{name} is {'on the device meta' if parameter.is_meta else 'sharded'} before {engine} is set up, and "
                "unit scaling needs the whole module here once. Build it in __init__, or leave out what shards or "
                f"empties it (deepspeed.zero.Init, wrap, empty_init). {INSTEAD}"
            )


def check_plan(plan: Plan, engine: str) -> None:
    """
    Raises:
        UnitScalingError: the plan does with gradients or in the forward pass what can't be done on flat pieces.
    """
    if plan.divided_gradients:
        raise UnitScalingError(
            f"gradients divided by their own largest element are not to be had under {engine}, where no process has "
            f"all of one. Use gradients=False. {INSTEAD}"
        )
    if engine in (FSDP1, ZERO3) and plan.explicit_sites:
        names = ", ".join(site.name for site in plan.explicit_sites[:3])
        what = "views in the place of parameters" if engine == FSDP1 else "functions of its own in the place of torch's"
        raise UnitScalingError(
            f"{len(plan.explicit_sites)} factors stay in the forward pass ({names} …), and there {engine} has {what}. "
            f"Use storage='folded'; where that leaves factors too: {INSTEAD}"
        )


def plan_to_go_on_with(trainer: pl.Trainer) -> Mapping[str, Any] | None:
    """What the checkpoint of `fit(ckpt_path=…)` says beside its weights; None without one.

    Raises:
        UnitScalingError: it can't be read.
    """
    path = vars(trainer._checkpoint_connector).get(CHECKPOINT)
    return all_but_weights(Path(path)) if path else None


@contextmanager
def first_batch(trainer: pl.Trainer, strategy: Strategy) -> Iterator[Any]:
    """The first batch of this process, on the module's device; inside and after, random numbers are as before.

    A loader that can be read only once has one batch less for the training.
    """
    module, loop = strategy.lightning_module, trainer.fit_loop
    assert module is not None
    with _random_numbers_kept():
        loop.setup_data()
        fetcher: Any = loop._data_fetcher
        if fetcher is None:
            raise UnitScalingError("there is no batch to make a plan with: the Trainer has no training data.")
        batch, *_ = next(fetcher)
        fetcher.teardown()
        loop._combined_loader = loop._data_fetcher = None  # set up anew by the training
        batch = strategy.precision_plugin.convert_input(batch)
        yield strategy.batch_to_device(batch, device=module.device)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else ()):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
