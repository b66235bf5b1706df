"""Every strategy that Lightning has, by its name or with the callback: it trains, or refuses and says what to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from support.training import batches, build, trainer

from lightning_unitscale import UnitScaling, UnitScalingError
from lightning_unitscale.attachments import STRATEGIES
from lightning_unitscale.before_wrapping import check_plan, check_whole
from lightning_unitscale.strategy import UnitScalingDeepSpeedStrategy, UnitScalingFSDPStrategy

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning": lightning.pytorch}


@pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES.keys())
@pytest.mark.parametrize("name", [name for name in STRATEGIES if "deepspeed" not in name])
def test_every_name_builds_a_strategy_of_its_namespace(pl: Any, name: str) -> None:
    strategy = pl.strategies.StrategyRegistry.get(name)
    assert isinstance(strategy, pl.strategies.Strategy)
    base = {"fsdp": "FSDPStrategy", "model": "ModelParallelStrategy", "ddp": "DDPStrategy"}
    wanted = base.get(name.removeprefix("unitscale").split("_")[1] if "_" in name else "", "SingleDeviceStrategy")
    assert isinstance(strategy, getattr(pl.strategies, wanted))


ENGINES = {
    "FSDP1": (UnitScalingFSDPStrategy, FSDPStrategy),
    "DeepSpeed": (UnitScalingDeepSpeedStrategy, DeepSpeedStrategy),
}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # engine, options, of the strategy, message
    "FSDP1, casts": ("FSDP1", {"format": "fp8"}, {}, "format='fp8' casts.*FSDP1 flattens.*unitscale_model_parallel"),
    "DeepSpeed, casts": ("DeepSpeed", {"format": "bf16"}, {"config": {}}, "format='bf16' casts.*DeepSpeed flattens"),
    "FSDP1, flat parameters": ("FSDP1", {}, {"kwargs": {"use_orig_params": False}}, "use_orig_params=False leaves"),
    "DeepSpeed, its own optimizer": ("DeepSpeed", {}, {"config": {"optimizer": {}}}, "optimizer of DeepSpeed's config"),
}


@pytest.mark.parametrize("door", ["callback", "strategy"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_done_on_flat_pieces_is_refused_before_anything_changes(case: str, door: str) -> None:
    engine, options, attributes, message = REFUSED[case]
    module = build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    strategy = object.__new__(ENGINES[engine][door == "callback"])  # the constructors of both want a GPU, or a package
    strategy._lightning_module = module
    vars(strategy).update(attributes)
    loop = trainer(".")
    loop.state.fn = TrainerFn.FITTING
    scaling = UnitScaling(**options).unit_scaling
    with pytest.raises(UnitScalingError, match=message):
        if door == "callback":
            scaling.wrap(strategy)
        else:
            strategy.unit_scaling = scaling
        strategy.setup(loop)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_module_that_is_not_whole_is_refused_by_name() -> None:
    with torch.device("meta"):
        module = build()
    with pytest.raises(UnitScalingError, match=r"embedding\.weight is on the device meta before FSDP1 is set up"):
        check_whole(module, "FSDP1")


@pytest.mark.parametrize("engine", ["FSDP1", "DeepSpeed's ZeRO 3"])
def test_factors_in_the_forward_pass_are_refused(tmp_path: Path, engine: str) -> None:
    scaling = UnitScaling(storage="unit")
    trainer(tmp_path, scaling, max_steps=1).fit(build(), batches())
    assert scaling.plan is not None
    with pytest.raises(UnitScalingError, match=r"factors stay in the forward pass.*storage='folded'"):
        check_plan(scaling.plan, engine)


@pytest.mark.parametrize("engine", ["FSDP1", "DeepSpeed", "DeepSpeed's ZeRO 3"])
def test_divided_gradients_are_refused_on_flat_pieces(tmp_path: Path, engine: str) -> None:
    scaling = UnitScaling("amax")
    trainer(tmp_path, scaling, max_steps=1).fit(build(), batches())
    assert scaling.plan is not None
    with pytest.raises(UnitScalingError, match=f"largest element are not to be had under {engine}.*gradients=False"):
        check_plan(scaling.plan, engine)


@pytest.mark.parametrize("name", ["unitscale", "unitscale_ddp"])
def test_a_named_strategy_trains_on_one_process(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, expected = build(), build()
    try:
        trainer(tmp_path, strategy=name, max_steps=3, use_distributed_sampler=False).fit(module, batches())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    trainer(tmp_path, UnitScaling(), max_steps=3, accelerator=CPUAccelerator()).fit(expected, batches())
    for value, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other)
