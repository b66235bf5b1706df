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
from support.training import batches, build, trainer

from lightning_unitscale import UnitScaling, UnitScalingError
from lightning_unitscale.attachments import STRATEGIES
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


@pytest.mark.parametrize("door", ["callback", "strategy"])
@pytest.mark.parametrize("engine", ["FSDP1", "DeepSpeed"])
def test_flattening_strategies_are_refused_and_name_the_one_to_take(engine: str, door: str) -> None:
    ours, theirs = {
        "FSDP1": (UnitScalingFSDPStrategy, FSDPStrategy),
        "DeepSpeed": (UnitScalingDeepSpeedStrategy, DeepSpeedStrategy),
    }[engine]
    module = build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cls = ours if door == "strategy" else theirs
    strategy = object.__new__(cls)  # the constructors of both want a GPU, or a package
    message = f"{engine} flattens parameters.*unitscale_model_parallel"
    with pytest.raises(UnitScalingError, match=message):
        if door == "callback":
            UnitScaling().unit_scaling.wrap(strategy)
        else:
            strategy._lightning_module = module
            strategy.setup(trainer("."))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


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
