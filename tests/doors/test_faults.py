"""What goes wrong around a run, and what is left of it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from support.processes import TESTS, start
from support.training import ByStep, Language, batches, build, fit, trainer
from support.zoo_batches import Batch
from torch import Tensor

from lightning_unitscale import NonFiniteSteps, UnitScaling, UnitScalingError

# --- a process is killed ----------------------------------------------------------------------------------------------

KILLED_STEPS = 12


class Slow(ByStep):
    """Takes its time, so that it can be killed in it, and says how far it is."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(0.02)
        print(self.global_step, flush=True)
        return super().training_step(batch, batch_idx)


def train_from_last(folder: str, scheme: str, format: str, storage: str) -> None:
    last = Path(folder, "last.ckpt")
    torch.manual_seed(0)
    module = Slow(dropout=0.1)
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    options: dict[str, Any] = {"enable_checkpointing": True, "max_steps": KILLED_STEPS}
    loop = trainer(folder, UnitScaling(scheme, format or None, storage), keep, **options)
    loop.fit(module, batches(), ckpt_path=last if last.exists() else None)
    torch.save(module.state_dict(), Path(folder, "weights.pt"))


def run_and_kill(folder: Path, moment: int, *arguments: str) -> None:
    """Killed while it takes that step, or in what follows it."""
    code = "import sys; from doors.test_faults import train_from_last; train_from_last(*sys.argv[1:])"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(moment):
            time.sleep(random.uniform(0, 0.08))
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()


def check_killed(folder: Path, moments: list[int], *arguments: str) -> None:
    (folder / "killed").mkdir()
    (folder / "whole").mkdir()
    for moment in moments:
        run_and_kill(folder / "killed", moment, *arguments)
    for place in ("killed", "whole"):
        train_from_last(str(folder / place), *arguments)
    killed, whole = (torch.load(folder / place / "weights.pt", weights_only=True) for place in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    check_killed(tmp_path, [5], "umup", "", "unit")


KILLS = int(os.environ.get("KILLS", "2"))  # in every fifth way, another format each; by hand KILLS=20, in each
WAYS = list(product(["umup", "preserve", "amax", "mus", "unit", "completep"], ["", "fp8", "bf16", "fp16"]))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "format"), WAYS if "KILLS" in os.environ else WAYS[::5])
def test_killed_at_random_moments(tmp_path: Path, scheme: str, format: str) -> None:
    storage = ("folded", "unit")[sum(divmod(WAYS.index((scheme, format)), 4)) % 2]
    random.seed(f"{scheme}{format}{storage}")
    check_killed(tmp_path, sorted(random.choices(range(KILLED_STEPS), k=KILLS)), scheme, format, storage)


@pytest.mark.slow
@pytest.mark.by_hand
def test_killed_twenty_times(tmp_path: Path) -> None:
    random.seed(20)
    check_killed(tmp_path, sorted(random.choices(range(KILLED_STEPS), k=20)), "umup", "fp8", "unit")


# --- a disk is full ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Files grow to no more than a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, small_files: Any, door: str) -> None:
    callbacks = [UnitScaling()] if door == "callback" else []
    loop = trainer(tmp_path, *callbacks, max_steps=2, strategy="auto" if callbacks else "unitscale")
    module = build()
    loop.fit(module, batches())
    loop.strategy.connect(module)
    path = tmp_path / "a.ckpt"
    write_with_door(loop, module, path)
    before = path.read_bytes()
    small_files(1000)
    with pytest.raises(
        UnitScalingError, match=r"a\.ckpt could not be written .*the one that was there before is whole"
    ):
        write_with_door(loop, module, path)
    with pytest.raises(UnitScalingError, match=r"b\.ckpt could not be written .*nothing was left there"):
        write_with_door(loop, module, tmp_path / "b.ckpt")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def write_with_door(loop: Any, module: Any, path: Path) -> None:
    for callback in loop.callbacks:
        if isinstance(callback, UnitScaling):
            callback.unit_scaling.wrap(loop.strategy)
    loop.save_checkpoint(path)


# --- a checkpoint is none ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    loop = trainer(folder, UnitScaling(storage="unit"), max_steps=2)
    loop.fit(build(), batches())
    loop.save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


def corrupt(path: Path, good: Path, kind: str) -> None:
    whole = good.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "corrupt":
        path.write_bytes(b"\0" * 100 + whole[100:-100] + b"\0" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"epoch": 3, "model": {}}, path)
    else:
        path.write_text("no checkpoint at all")


@pytest.mark.parametrize("door", ["callback", "strategy"])
@pytest.mark.parametrize("kind", ["truncated", "corrupt", "empty", "foreign", "text"])
def test_a_checkpoint_that_is_none_is_named(tmp_path: Path, good: Path, kind: str, door: str) -> None:
    path = tmp_path / "bad.ckpt"
    corrupt(path, good, kind)
    module, untouched = build(), build()
    callbacks = [UnitScaling(storage="unit")] if door == "callback" else []
    loop = trainer(tmp_path, *callbacks, max_steps=4, strategy="auto" if callbacks else "unitscale")
    with pytest.raises(UnitScalingError, match=r"bad\.ckpt: not a .*checkpoint"):
        loop.fit(module, batches(), ckpt_path=path)
    for name, value in module.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name])


# --- a batch is no number ---------------------------------------------------------------------------------------------


class OneBadBatch(Language):
    bad = 3

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        return loss * float("nan") if self.trainer.fit_loop.total_batch_idx == self.bad and self.training else loss


class WithoutThatBatch(Language):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx == OneBadBatch.bad else super().training_step(batch, batch_idx)


def bad_run(folder: Path, cls: type[Language], *callbacks: Any) -> Language:
    torch.manual_seed(0)
    module = cls(batch_norm=False)
    trainer(folder, *callbacks, max_epochs=1).fit(module, batches(6))
    return module


@pytest.mark.parametrize("scheme", ["umup", "preserve"])
def test_a_batch_that_is_no_number_stops_and_is_named(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UnitScalingError, match=r"step 3 \(epoch 0, batch \[3\]\): the loss is NaN"):
        bad_run(tmp_path, OneBadBatch, UnitScaling(scheme), NonFiniteSteps())


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_batch_that_is_no_number_is_left_out_and_counted(tmp_path: Path, storage: str) -> None:
    guard = NonFiniteSteps("skip")
    with pytest.warns(UserWarning, match=r"batch \[3\]\) is left out: the loss is NaN or infinite; 1 left out"):
        skipped = bad_run(tmp_path, OneBadBatch, UnitScaling(storage=storage), guard)
    expected = bad_run(tmp_path, WithoutThatBatch, UnitScaling(storage=storage))
    for name, value in skipped.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert guard.state_dict() == {"skipped": 1}


def test_a_skipped_step_leaves_running_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = OneBadInput()
    fit(tmp_path, UnitScaling(), NonFiniteSteps("skip"), module=module, max_steps=5)
    assert torch.isfinite(module.norm.running_mean).all()  # type: ignore[arg-type,union-attr]


class OneBadInput(Language):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.training and self.trainer.global_step == 2:
            x = x * float("nan")
        return self.head(self.norm(self.block(x).flatten(0, 1)))


def test_another_action_is_refused() -> None:
    with pytest.raises(UnitScalingError, match="action='ignore'"):
        NonFiniteSteps("ignore")


# --- a rank dies ------------------------------------------------------------------------------------------------------


class Dies(Language):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def until_one_dies(folder: str) -> None:
    torch.manual_seed(0)
    trainer(folder, UnitScaling(), strategy=DDPStrategy(), devices=2, use_distributed_sampler=False).fit(
        Dies(), batches(20)
    )


@pytest.mark.slow
def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    processes = start(2, "doors.test_faults:until_one_dies", tmp_path)
    try:
        _, error = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode not in (0, None)
    assert "Connection closed by peer" in error or "Connection reset by peer" in error, error[-2000:]
