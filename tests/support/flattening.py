"""FSDP1 and DeepSpeed on CPU processes: both run there; that Lightning asks for a GPU is left out here."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from lightning_unitscale.strategy import UnitScalingDeepSpeedStrategy, UnitScalingFSDPStrategy


class AsItIs(FSDPPrecision):
    """Leaves float64 what it is; FSDP1 has no name for that precision."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class FSDP1OnCPU(UnitScalingFSDPStrategy):  # type: ignore[misc,valid-type]
    """Wraps as Lightning's does, on `cpu`: it gives a device's index, which a CPU has not got."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if isinstance(model, FullyShardedDataParallel):
            return model
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


class DeepSpeedOnCPU(UnitScalingDeepSpeedStrategy):  # type: ignore[misc,valid-type]
    """DeepSpeed with its CPU accelerator and gloo."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"

        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]  # compiles C++
        super().__init__(*args, **kwargs)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed is told its index
