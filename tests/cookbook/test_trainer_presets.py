"""`trainer=fsdp2` and the others make the Trainer that they say, and a cluster's launcher the job that it says."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.config import register, shipped

PRESETS = {  # preset: devices, data parallel, tensor parallel
    "fsdp2": (2, 2, 1),
    "tensor_parallel": (2, 1, 2),
    "fsdp2_tp": (4, 2, 2),
}


def composed(*overrides: str) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        return hydra.compose("pretrain", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_its_mesh(preset: str) -> None:
    devices, data, tensor = PRESETS[preset]
    cfg = composed(f"trainer={preset}", "trainer.accelerator=cpu")
    OmegaConf.resolve(cfg.trainer.strategy)
    strategy = instantiate(cfg.trainer.strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (data, tensor)
    assert cfg.trainer.devices == devices == data * tensor


def test_several_machines_run_ddp_on_all_their_devices() -> None:
    cfg = composed("trainer=multi_node").trainer
    assert (cfg.strategy, cfg.num_nodes, cfg.devices) == ("ddp", 2, 8)


def test_slurm_gets_the_job_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = pytest.importorskip("submitit.slurm.slurm")
    cfg = composed(
        "trainer=multi_node",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.nodes=2",
        "hydra.launcher.tasks_per_node=8",
        "hydra.launcher.partition=gpu",
    )
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    script = slurm._make_sbatch_string(
        command=sys.executable,
        folder=str(tmp_path),
        nodes=launcher.nodes,
        ntasks_per_node=launcher.tasks_per_node,
        partition=launcher.partition,
    )
    for line in ("--nodes=2", "--ntasks-per-node=8", "--partition=gpu"):
        assert f"#SBATCH {line}" in script
