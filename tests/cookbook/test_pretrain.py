"""The pre-training recipe: its data, an exact continuation, and a whole run with its report."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling, cli
from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.callbacks import Interrupted, LastCheckpoint, RandomNumbers
from lightning_unitscale.cookbook.data import IGNORED, TokenText, hold_out, hugging_face, python_topics, text_files
from lightning_unitscale.cookbook.runs import new_module
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.cookbook.tokenizers import BOS, byte_tokenizer
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor import Snapshot


def tiny(*overrides: str) -> DictConfig:
    config.register()
    with initialize_config_dir(str(config.shipped("conf")), version_base="1.3"):
        return compose("pretrain", overrides=["experiment=tiny", *overrides])


def data(**changes: Any) -> TokenText:
    options = {"sequence_length": 16, "batch_size": 2, "steps": 8, "held_out": 0.1, "seed": 1, "test_part": False}
    return TokenText(python_topics(), byte_tokenizer(), **{**options, **changes})


# --- documents --------------------------------------------------------------------------------------------------------


def test_split_holds_out_whole_documents_and_leaks_none() -> None:
    documents = python_topics()
    training, held_out = hold_out(documents, 0.1)
    assert sorted(training + held_out) == sorted(set(documents.values()))
    assert not set(training) & set(held_out)
    share = sum(map(len, held_out)) / sum(map(len, documents.values()))
    assert 0.05 < share <= 0.1


def test_split_depends_on_the_texts_alone() -> None:
    texts = [bytes([65 + i]) * (i + 5) for i in range(20)]
    first = hold_out({f"a{i}": text for i, text in enumerate(texts)}, 0.2)
    again = hold_out({f"b{i}": text for i, text in enumerate(reversed(texts + texts))}, 0.2)  # copies too
    assert first == again


def test_a_single_document_is_cut_near_its_end() -> None:
    text = b"".join(b"line %d\n" % i for i in range(100))
    (training,), (held_out,) = hold_out({"only": text}, 0.1)
    assert training + held_out == text
    assert training.endswith(b"\n")
    assert len(held_out) >= 0.1 * len(text)


def test_text_files_from_file_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "b.md").write_text("second")
    (tmp_path / "sub" / ".git" / "c.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text(" \n")
    assert list(text_files(str(tmp_path / "a.txt")).values()) == [b"first"]
    assert sorted(text_files(str(tmp_path)).values()) == [b"first", b"second"]
    assert sorted(text_files(str(tmp_path / "**" / "*.md")).values()) == [b"second"]


def test_what_is_no_text_or_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.warns(UserWarning) as said:
        assert len(text_files(str(tmp_path))) == 2
    messages = [str(warning.message) for warning in said]
    assert any("left out as binary" in message and "image.png" in message for message in messages)
    assert any("not UTF-8" in message and "latin1.txt" in message and "a.txt" not in message for message in messages)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_read_by_its_mark_and_named_without(encoding: str, tmp_path: Path) -> None:
    text = "naïve text, as PowerShell writes it\n"
    (tmp_path / "a.txt").write_text(f"\ufeff{text}", encoding=encoding, newline="")
    assert list(text_files(str(tmp_path)).values()) == [text.encode()]
    (tmp_path / "b.txt").write_text(text, encoding=encoding, newline="")
    name = encoding.upper().replace("16-", "16")
    message = rf"b\.txt \(or {name} without its mark\? Convert it: iconv -f {name} -t UTF-8\)"
    with pytest.raises(InputError, match=message):
        text_files(str(tmp_path / "b.txt"))
    with pytest.warns(UserWarning, match=f"left out as binary: .*{message}"):
        text_files(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.path is empty"),
        ("missing.txt", "no such file or folder"),
        ("*.nothing", "the pattern matches no file"),
        ("void", "found no text"),
    ],
)
def test_no_text_is_an_error(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "void").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        text_files(path)


def test_hugging_face_rows_are_documents(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": f"document {number}", "label": number} for number in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = hugging_face(str(tmp_path), max_documents=3)
    assert list(documents.values()) == [b"document 0", b"document 1", b"document 2"]
    with pytest.raises(InputError, match=r"data\.column=label: not a text column .* text, label"):
        hugging_face(str(tmp_path), column="label")
    with pytest.raises(InputError, match="the hub did not deliver it"):
        hugging_face(str(tmp_path / "nothing"))


def test_short_text_is_an_error() -> None:
    with pytest.raises(InputError, match="too short for one sequence of 129"):
        TokenText(
            {"a": b"x" * 500, "b": b"y" * 100},
            byte_tokenizer(),
            sequence_length=128,
            batch_size=1,
            steps=1,
            held_out=0.2,
            seed=0,
            test_part=False,
        )


# --- sequences --------------------------------------------------------------------------------------------------------


def test_every_byte_is_a_token_also_where_the_text_is_no_utf8() -> None:
    documents = {str(start): bytes([start, 0xE6, 0xFF, 10]) * 50 for start in range(65, 75)}
    options = {"sequence_length": 8, "batch_size": 2, "steps": 2, "held_out": 0.2, "seed": 1}
    found = TokenText(documents, byte_tokenizer(), test_part=False, **options)
    training, held_out = hold_out(documents, 0.2)
    assert found.training.tokens.tolist() == [token for text in training for token in (BOS, *text)]
    assert found.validation.tokens.tolist() == [token for text in held_out for token in (BOS, *text)]
    assert found.test is found.validation


def test_held_out_windows_predict_every_byte_once() -> None:
    held_out = data().validation
    inputs, targets = zip(*(held_out[i] for i in range(len(held_out))), strict=True)
    predicted = torch.cat(targets)
    assert torch.equal(predicted[predicted != IGNORED], held_out.tokens[held_out.tokens != BOS])
    assert all(len(window) == 16 for window in inputs + targets)


def test_crops_are_a_function_of_seed_and_position() -> None:
    first, same, other = data().training, data().training, data(seed=2).training
    assert torch.equal(first[3][0], same[3][0])
    assert not torch.equal(first[3][0], other[3][0])
    inputs, targets = first[3]
    assert torch.equal(inputs[1:], targets[:-1].where(targets[:-1] != IGNORED, torch.tensor(BOS)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_continues_where_it_was_saved(workers: int) -> None:
    whole = list(data(workers=workers).train_dataloader())
    loader = data(workers=workers).train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    continued = data(workers=workers).train_dataloader()
    continued.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(continued))["input_ids"], whole[3]["input_ids"])


# --- training ---------------------------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """The inputs of every step."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.inputs.append(batch["input_ids"].clone())


def fit(
    folder: Path,
    steps: int,
    checkpoint: Path | None,
    unitscale: bool,
    epoch: int = 8,
    **options: Any,
) -> tuple:
    pl.seed_everything(1)
    module = new_module(tiny("schedule.decay_steps=6", "unitscale=none"))
    recorder = Recorder()
    more = options.pop("callbacks", [])
    callbacks = [*([UnitScaling()] if unitscale else []), recorder, *more]
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(more),
        default_root_dir=folder,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module, data(steps=epoch), ckpt_path=checkpoint)
    return trainer, module, recorder


@pytest.mark.parametrize("epochs", [(8, 8), (3, 6)], ids=["within an epoch", "at the end of an epoch"])
@pytest.mark.parametrize("unitscale", [False, True])
def test_two_halves_equal_the_whole_bit_for_bit(tmp_path: Path, unitscale: bool, epochs: tuple[int, int]) -> None:
    _, whole, seen = fit(tmp_path, 6, None, unitscale)
    trainer, _, first = fit(tmp_path, 3, None, unitscale, epochs[0])
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    _, continued, second = fit(tmp_path, 6, tmp_path / "half.ckpt", unitscale, epochs[1])
    assert torch.equal(torch.stack(seen.inputs), torch.stack(first.inputs + second.inputs))
    for (name, expected), value in zip(whole.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(expected, value), name


def test_interrupt_saves_after_the_step_and_gives_ctrl_c_back(tmp_path: Path) -> None:
    class Press(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    interrupt = LastCheckpoint(tmp_path / "last.ckpt")
    with pytest.raises(Interrupted):
        fit(tmp_path, 6, None, False, callbacks=[interrupt, Press()])
    assert interrupt.interrupted
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is before
    _, whole, _ = fit(tmp_path, 6, None, False)
    _, continued, _ = fit(tmp_path, 6, tmp_path / "last.ckpt", False)
    for expected, value in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(expected, value)


class Drawing(pl.LightningModule):
    """Draws a number in every step, and more of them in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.drawn: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.drawn.append(float(torch.rand(())))
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        torch.rand(3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_checkpoint_before_a_validation_goes_on_as_one_after_it(tmp_path: Path) -> None:
    def drawn(steps: int, checkpoint: Path | None, seed: int) -> list[float]:
        pl.seed_everything(seed, verbose=False)
        before = ModelCheckpoint(
            tmp_path, "step-{step}", auto_insert_metric_name=False, every_n_train_steps=2, save_top_k=-1
        )
        callbacks = [before, RandomNumbers(), LastCheckpoint(tmp_path / "last.ckpt")]
        data = DataLoader(torch.ones(8, 1))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            max_steps=steps,
            val_check_interval=2,
            accelerator="cpu",
            callbacks=callbacks,
            **quiet,
        )
        module = Drawing()
        trainer.fit(module, data, data, ckpt_path=checkpoint)
        return module.drawn

    whole = drawn(4, None, seed=1)
    drawn(2, None, seed=1)
    assert len(set(whole)) == 4
    for checkpoint in ("last.ckpt", "step-2.ckpt"):  # in this order: either writes last.ckpt anew
        assert drawn(4, tmp_path / checkpoint, seed=2) == whole[2:], checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)  # a sweep in this process has silenced it
    """`unitscale pretrain experiment=tiny`: the run folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    printed = folder / "printed"
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, printed.open("w") as stream:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["unitscale", "pretrain", "experiment=tiny"])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "stdout", stream)
        cli.main()
    (run_folder,) = (folder / "outputs" / "pretrain").iterdir()
    return run_folder, printed.read_text()


def test_run_leaves_report_logs_checkpoints_and_configuration(run: tuple[Path, str]) -> None:
    folder, _ = run
    for file in ("index.html", "loss.png", "exponents.png", "drift.png", "metrics.json", "plan.txt"):
        assert (folder / "report" / file).stat().st_size > 0
    assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == ["experiment=tiny"]
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "csv" / "metrics.csv").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    nats, bits = metrics["val/loss"], metrics["val/bits_per_byte"]
    assert bits == pytest.approx(nats / math.log(2), rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert metrics["steps"] == 2
    snapshots = Snapshot.read(folder / "monitor.jsonl")
    assert {(snapshot.label, snapshot.step) for snapshot in snapshots} == {("untouched", 0), ("run", 0), ("run", 1)}
    sites = {snapshot.label: [(m.parameter, m.operand) for m in snapshot.measurements] for snapshot in snapshots}
    assert sites["untouched"] == sites["run"]


def test_run_prints_the_plan_once_and_samples(run: tuple[Path, str]) -> None:
    folder, printed = run
    plan = (folder / "report" / "plan.txt").read_text().strip()
    headline, _, table = plan.partition("\n")
    assert (folder / "pretrain.log").read_text().count(headline) == 1
    assert printed.count(table) == 1
    assert printed.count("--- sample") == 3
    assert "The " in printed


def test_checkpoint_alone_rebuilds_the_module(run: tuple[Path, str]) -> None:
    folder, _ = run
    module = LanguageModeling.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert module.model.config.hidden_size == 64
