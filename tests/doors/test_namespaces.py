"""`import lightning as L` is served as `import pytorch_lightning as pl` is: each alone, and both in one process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from lightning_fabric import Fabric as OtherFabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import (
    ScaleMonitor,
    UnitScaling,
    UnitScalingError,
    scale_learning_rates,
    unit_scale,
)

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning": lightning.pytorch}
both = pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES.keys())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def batches() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(4, (32,))), batch_size=8)


def module_of(pl: Any) -> Any:
    """A LightningModule of that namespace; its losses are kept."""

    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network, self.losses = network(), []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, labels = batch
            loss = F.cross_entropy(self.network(inputs), labels)
            self.log("loss", loss)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Classifier()


def trainer_of(pl: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=[*callbacks], **{**quiet, "max_epochs": 2, **options})


def losses(pl: Any, folder: Path, *callbacks: Any, **options: Any) -> Tensor:
    module = module_of(pl)
    trainer_of(pl, folder, *callbacks, **options).fit(module, batches())
    return torch.stack(module.losses)


def losses_of_a_plain_loop(storage: str) -> Tensor:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[Tensor] = []
    for _ in range(2):
        for inputs, labels in batches():
            if not seen:
                plan = unit_scale(model, lambda m: F.cross_entropy(m(inputs), labels), storage=storage)  # noqa: B023
                scale_learning_rates(optimizer, plan)
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return torch.stack(seen)


@both
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_the_callback_trains_as_a_plain_loop_does(pl: Any, storage: str, tmp_path: Path) -> None:
    callback = UnitScaling(storage=storage)
    torch.testing.assert_close(losses(pl, tmp_path, callback), losses_of_a_plain_loop(storage))
    assert callback.plan is not None


@pytest.fixture
def no_process_group_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning leaves it, with threads that a later fork would wait for, and its address in the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@both
@pytest.mark.parametrize("strategy", ["unitscale", "unitscale_ddp"])
@pytest.mark.usefixtures("no_process_group_is_left")
def test_strategies_are_known_by_name(pl: Any, strategy: str, tmp_path: Path) -> None:
    trained = losses(pl, tmp_path, strategy=strategy, devices=1, use_distributed_sampler=False)
    torch.testing.assert_close(trained, losses_of_a_plain_loop("folded"))
    cls = type(trainer_of(pl, tmp_path, strategy=strategy, devices=1).strategy)
    assert issubclass(cls, pl.strategies.Strategy)
    assert pickle.loads(pickle.dumps(cls)) is cls  # started processes find it


@both
def test_callbacks_are_callbacks_of_both(pl: Any) -> None:
    assert isinstance(UnitScaling(), pl.Callback)
    assert isinstance(ScaleMonitor(), pl.Callback)


@both
def test_a_checkpoint_moves_between_them(pl: Any, tmp_path: Path) -> None:
    other = next(namespace for namespace in NAMESPACES.values() if namespace is not pl)
    module, resumed = module_of(pl), module_of(other)
    trainer = trainer_of(pl, tmp_path, UnitScaling(storage="unit"), max_epochs=1)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(other, tmp_path, UnitScaling(storage="unit")).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(torch.stack([*module.losses, *resumed.losses]), losses_of_a_plain_loop("unit"))


@both
def test_the_monitor_measures(pl: Any, tmp_path: Path) -> None:
    monitor = ScaleMonitor(every_n_steps=2, folder=tmp_path)
    losses(pl, tmp_path, UnitScaling(format="bf16"), monitor, logger=pl.loggers.CSVLogger(tmp_path))
    assert monitor.last is not None
    assert monitor.file.is_file()


@both
def test_pruning_is_refused(pl: Any, tmp_path: Path) -> None:
    module = module_of(pl)
    pruning = pl.callbacks.ModelPruning("l1_unstructured", [(module.network[0], "weight")], amount=0.5)
    with pytest.raises(UnitScalingError, match="ModelPruning compares"):
        trainer_of(pl, tmp_path, UnitScaling(), pruning).fit(module, batches())


@both
def test_averages_are_scaled_with_the_model(pl: Any, tmp_path: Path) -> None:
    def trained(steps: int, *callbacks: Any) -> list[Tensor]:
        module = module_of(pl)
        trainer_of(pl, tmp_path, UnitScaling(), *callbacks, max_steps=steps).fit(module, batches())
        return list(module.network.parameters())

    half = pl.callbacks.WeightAveraging(avg_fn=lambda old, new, steps: 0.5 * (old + new))
    for average, first, second in zip(trained(2, half), trained(1), trained(2), strict=True):
        torch.testing.assert_close(average, 0.5 * (first + second))


@pytest.mark.parametrize("fabric", [Fabric, OtherFabric], ids=["lightning", "lightning_fabric"])
def test_fabric_trains_as_a_plain_loop_does(fabric: Any) -> None:
    made = fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = made.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    seen: list[Tensor] = []
    for _ in range(2):
        for inputs, labels in batches():
            if not seen:
                plan = unit_scale(model, lambda m: F.cross_entropy(m(inputs), labels))  # noqa: B023
                scale_learning_rates(optimizer, plan)
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            made.backward(loss)
            optimizer.step()
            seen.append(loss.detach())
    torch.testing.assert_close(torch.stack(seen), losses_of_a_plain_loop("folded"))


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import {present} as pl, torch
from lightning_unitscale import UnitScaling

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def training_step(self, batch):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

callback = UnitScaling()
pl.Trainer(callbacks=[callback], max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu").fit(
    Module(), torch.utils.data.DataLoader(torch.randn(8, 4)))
print(callback.plan.roles["layer.weight"])
"""


@pytest.mark.parametrize(
    "present, missing",
    [
        pytest.param("pytorch_lightning", ["lightning"], marks=pytest.mark.slow),
        ("lightning.pytorch", ["pytorch_lightning"]),
    ],
)
def test_either_works_where_the_other_is_missing(present: str, missing: list[str], tmp_path: Path) -> None:
    script = ALONE.format(present=present, missing=missing)
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "readout"
