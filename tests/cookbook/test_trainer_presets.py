"""`trainer=fsdp2` and the others make the Trainer that they say, and a cluster's launcher the job that it says."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from support.by_day import by_night

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


def command(folder: Path, *arguments: str) -> str:
    """What a user would see of the command on this machine without GPUs; the processes are its own."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), str(root / "tests"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "lightning_unitscale.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


SMALL = (
    "model.width=128",
    "model.depth=2",
    "task.sequence_length=32",
    "data.batch_size=4",
    "trainer.val_check_interval=3",
)
BRIEF = ("trainer.accelerator=cpu", "trainer.limit_val_batches=2", "+trainer.limit_test_batches=2", "logger=none")


def printed_loss(output: str) -> float:
    (line,) = [line for line in output.splitlines() if line.startswith("val/loss ")]
    return float(line.split()[1])


KEPT = [("ddp_cpu", "a file"), *product(PRESETS, ["a file", "shards"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "kept"), by_night(KEPT, [("ddp_cpu", "a file"), ("fsdp2", "a file"), ("fsdp2_tp", "shards")])
)
def test_a_preset_trains_goes_on_and_its_checkpoint_is_read(tmp_path: Path, preset: str, kept: str) -> None:
    shards = kept == "shards"
    where = (f"trainer={preset}", *(["trainer.strategy.save_distributed_checkpoint=true"] if shards else []))
    settings = (*where, *SMALL, *BRIEF)
    steps = "schedule.decay_steps=6"
    whole = command(tmp_path, "pretrain", *settings, "trainer.max_steps=6", steps, "hydra.run.dir=whole")
    command(tmp_path, "pretrain", *settings, "trainer.max_steps=3", steps, "hydra.run.dir=half")
    rest = command(
        *(tmp_path, "pretrain", "ckpt_path=half/checkpoints/last.ckpt", "trainer.max_steps=6", "hydra.run.dir=rest")
    )
    assert printed_loss(rest) == pytest.approx(printed_loss(whole), rel=1e-3)  # four digits are printed
    assert command(tmp_path, "inference", "model.path=rest/checkpoints/last.ckpt", "generation.max_new_tokens=4")
    if shards:
        return
    one, other = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "rest")
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_preset_of_deepspeed_trains_and_goes_on(tmp_path: Path, stage: int) -> None:
    """By a strategy that does not ask for a GPU."""
    target = f"{{_target_: support.flattening.DeepSpeedOnCPU, stage: {stage}, logging_batch_size_per_gpu: 1}}"
    where = ("trainer=deepspeed", f"trainer.strategy={target}", "trainer.devices=2")
    settings = (*where, *SMALL, *BRIEF, "schedule.decay_steps=6")
    whole = command(tmp_path, "pretrain", *settings, "trainer.max_steps=6", "hydra.run.dir=whole")
    command(tmp_path, "pretrain", *settings, "trainer.max_steps=3", "hydra.run.dir=half")
    rest = command(
        *(tmp_path, "pretrain", "ckpt_path=half/checkpoints/last.ckpt", "trainer.max_steps=6", "hydra.run.dir=rest")
    )
    assert printed_loss(rest) == pytest.approx(printed_loss(whole), rel=1e-3)
