"""Inference: the numbers of training again, text by any batching, predictions in files, narrow weights."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from support.by_day import by_day
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling
from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.data import TokenText, text_files
from lightning_unitscale.cookbook.generation import generate, generation_config, number_of_new_tokens
from lightning_unitscale.cookbook.inference.evaluation import compare_formats
from lightning_unitscale.cookbook.inference.prediction import predict_rows
from lightning_unitscale.cookbook.inference.prediction_file import PredictionWriter, finish, read_rows, rows_done
from lightning_unitscale.cookbook.inference.text import generate_texts
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.runs import new_module
from lightning_unitscale.cookbook.tasks import text_generation
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import export

PROMPTS = ["The class", "An", "import statement; ", "x", "def function(a, b):", "yield", "0", "Python"]
KINDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "plain": ("llama", None),
    "preserve": ("gpt2", {"scheme": "preserve"}),
    "umup-folded": ("llama", {"scheme": "umup"}),
    "umup-unit": ("gpt2", {"scheme": "umup", "storage": "unit"}),
    "umup-fp8": ("llama", {"scheme": "umup", "format": "fp8"}),
    "preserve-fp8": ("gpt2", {"scheme": "preserve", "format": "fp8"}),
}


@dataclass
class Trained:
    path: Path
    text: Path
    logged: float  # the validation loss at this checkpoint


@contextmanager
def composing(name: str, *overrides: str) -> Iterator[DictConfig]:
    """The configuration; in the block, more can be composed, as in a running recipe."""
    config.register()
    with initialize_config_dir(str(config.shipped("conf")), version_base="1.3"):
        yield compose(name, overrides=list(overrides))


def compose_config(name: str, *overrides: str) -> DictConfig:
    with composing(name, *overrides) as cfg:
        return cfg


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """`unitscale inference` as a module."""
    folder = str(config.shipped("recipes"))
    sys.path.insert(0, folder)
    yield importlib.import_module("inference")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One trained for some steps in each parametrization."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("class", "function", "import", "with"):
        (folder / f"{name}.txt").write_text(topics[name])
    made = {}
    for kind, (model, options) in KINDS.items():
        cfg = compose_config("pretrain", "experiment=tiny", f"model={model}", "optimizer.lr=0.01")
        pl.seed_everything(1, verbose=False)
        module = new_module(cfg)
        data = TokenText(
            text_files(str(folder / "*.txt")),
            byte_tokenizer(),
            sequence_length=32,
            batch_size=4,
            steps=30,
            held_out=0.3,
            seed=1,
            test_part=False,
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=30,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[UnitScaling(**options)] if options else [],
        )
        trainer.fit(module, data)
        (scores,) = trainer.validate(module, data, verbose=False)
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        made[kind] = Trained(folder / f"{kind}.ckpt", folder / "*.txt", scores["val/loss"])
    return made


@pytest.fixture(scope="module")
def umup(checkpoints: dict[str, Trained]) -> Pretrained:
    found = load_pretrained(str(checkpoints["umup-unit"].path))
    assert found.plan is not None
    assert not found.plan.is_plain
    return found


def settings(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 3.0, **changes}  # else it writes spaces


def texts(found: Pretrained, prompts: list[str], **changes: Any) -> list[str]:
    assert found.tokenizer is not None
    chosen = generation_config(found.model, found.tokenizer, settings(**changes))
    return generate(found.model, found.tokenizer, prompts, chosen).texts


# --- the same numbers as training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", by_day(KINDS, list(KINDS)[:2]))
def test_held_out_loss_is_the_logged_validation_loss(
    kind: str, checkpoints: dict[str, Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    trained = checkpoints[kind]
    assert trained.logged < 4.5  # 5.55 is chance
    with composing("inference", "mode=evaluate", "data=text", f"data.path={trained.text}", "data.held_out=0.3") as cfg:
        for batch_size in (1, 16):
            cfg.batch_size = batch_size
            (scores,) = compare_formats(cfg, str(trained.path)).values()
            assert scores["loss"] == pytest.approx(trained.logged, abs=1e-5)
            assert scores["perplexity"] == pytest.approx(math.exp(trained.logged), rel=1e-4)
    assert "loss" in capsys.readouterr().out


def test_exported_folder_gives_the_same_text(checkpoints: dict[str, Trained], umup: Pretrained, tmp_path: Path) -> None:
    export(umup.model, tmp_path / "folder", tokenizer=umup.tokenizer)
    assert texts(load_pretrained(str(tmp_path / "folder")), PROMPTS) == texts(umup, PROMPTS)


@torch.inference_mode()
def test_cache_gives_the_logits_of_a_full_forward_pass(umup: Pretrained) -> None:
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    full = umup.model(input_ids=ids, use_cache=False).logits
    first = umup.model(input_ids=ids[:, :7], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(7, 20):
        step = umup.model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        steps, cache = [*steps, step.logits], step.past_key_values
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-5 * float(full.abs().max()))
    assert texts(umup, PROMPTS, use_cache=False) == texts(umup, PROMPTS)


@torch.inference_mode()
def test_a_padded_batch_gives_what_each_prompt_gives_alone(umup: Pretrained) -> None:
    assert umup.tokenizer is not None
    alone = [texts(umup, [prompt])[0] for prompt in PROMPTS]
    assert texts(umup, PROMPTS) == alone
    assert len(set(alone)) > 1
    run: Any = umup.model.generate
    chosen = generation_config(umup.model, umup.tokenizer, settings(output_logits=True, return_dict_in_generate=True))
    padded = umup.tokenizer(
        PROMPTS, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    )
    batch = run(**padded, generation_config=chosen).logits
    for row, prompt in enumerate(PROMPTS):
        single = run(
            **umup.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), generation_config=chosen
        )
        for found, expected in zip(batch, single.logits, strict=True):
            torch.testing.assert_close(found[row], expected[0], rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- text -------------------------------------------------------------------------------------------------------------


def test_sampling_and_beams(umup: Pretrained) -> None:
    torch.manual_seed(0)
    first = texts(umup, PROMPTS, do_sample=True)
    assert texts(umup, PROMPTS, do_sample=True) != first
    torch.manual_seed(0)
    assert texts(umup, PROMPTS, do_sample=True) == first
    assert all(len(text) > 0 for text in texts(umup, PROMPTS, num_beams=3))


def test_tokens_are_counted_up_to_the_end(umup: Pretrained) -> None:
    assert umup.tokenizer is not None
    prompts = ["The class", "x"]
    chosen = generation_config(umup.model, umup.tokenizer, settings())
    whole = generate(umup.model, umup.tokenizer, prompts, chosen)
    assert whole.tokens == 16
    assert 0 < whole.first_token_s < whole.seconds
    end = umup.tokenizer(whole.texts[0])["input_ids"][3]  # the third token of the first text, taken for its end
    before = umup.model.generation_config.eos_token_id
    umup.model.generation_config.eos_token_id = end
    try:
        chosen = generation_config(umup.model, umup.tokenizer, settings(eos_token_id=end))
        ended = generate(umup.model, umup.tokenizer, prompts[:1], chosen)
    finally:
        umup.model.generation_config.eos_token_id = before
    assert ended.tokens <= 3


def test_command_streams_what_it_returns(checkpoints: dict[str, Trained], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoints["umup-folded"].path)
    cfg = compose_config("inference", "prompt=The", "generation.max_new_tokens=12", "generation.do_sample=false")
    (text,) = generate_texts(cfg, path)
    printed = capsys.readouterr().out
    assert f"The{text}" in printed
    assert "tokens/s" in printed
    assert "time to first token" in printed
    assert "peak memory" in printed


# --- predictions in a file --------------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """Any module with a predict_step; stops the run at one batch."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.stop_at = stop_at

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        if batch_idx == self.stop_at:
            raise KeyboardInterrupt
        scores, label = self.layer(batch).softmax(-1).max(-1)
        return {"label": label, "score": scores}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lightning switches Ctrl-C off for good once it was pressed."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def predict(module: pl.LightningModule, output: Path, data: Tensor) -> None:
    start = rows_done(output)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionWriter(output, start)],
    )
    trainer.predict(module, DataLoader(data[start:], batch_size=3), return_predictions=False)  # type: ignore[arg-type]


class Captions(pl.LightningModule):
    """A predict_step that returns a list of texts."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[str]:
        return [f"an image of {int(image.argmax())}" for image in batch]


def test_captions_of_any_module(tmp_path: Path) -> None:
    predict(Captions(), tmp_path / "captions.jsonl", torch.eye(4))
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert rows == [{"row": n, "prediction": f"an image of {n}"} for n in range(4)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("crash", ["interrupt", "cut line"])
def test_interrupted_prediction_goes_on(crash: str, tmp_path: Path, ctrl_c: None) -> None:
    data = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    predict(Classifier(), tmp_path / "whole.jsonl", data)
    whole = (tmp_path / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["row"] for row in rows] == list(range(10))
    expected = Classifier().layer(data).softmax(-1).max(-1)
    assert [row["label"] for row in rows] == expected.indices.tolist()
    assert [row["score"] for row in rows] == pytest.approx(expected.values.tolist(), rel=1e-5)

    part = tmp_path / "part.jsonl"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(Classifier(stop_at=2), part, data)
    assert part.read_text() == "".join(whole.splitlines(keepends=True)[:6])  # readable, whole rows
    if crash == "cut line":
        part.write_text(whole[: len(part.read_text()) + 9])
    predict(Classifier(), part, data)
    assert part.read_text() == whole


def test_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    data = torch.randn(4, 4)
    predict(Classifier(), tmp_path / "out.parquet", data)
    finish(tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert found["label"] == Classifier().layer(data).argmax(-1).tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]
    with pytest.raises(InputError, match="exists"):
        rows_done(tmp_path / "out.parquet")


def test_predict_command_goes_on_and_reads_every_kind_of_rows(
    checkpoints: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: None,
) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.txt").write_text("\n".join(PROMPTS[:3]))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in PROMPTS[:3]))
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(f'"{prompt}"' for prompt in PROMPTS[:3]))
    pyarrow.parquet.write_table(pyarrow.table({"text": PROMPTS[:3]}), tmp_path / "rows.parquet")
    for kind in ("txt", "jsonl", "csv", "parquet"):
        assert read_rows(str(tmp_path / f"rows.{kind}"), "text") == PROMPTS[:3]
    path = str(checkpoints["umup-unit"].path)
    cfg = compose_config(
        "inference",
        "mode=predict",
        f"rows={tmp_path}/rows.txt",
        f"output={tmp_path}/out.jsonl",
        "batch_size=2",
        "progress_bar=false",
        "generation.max_new_tokens=8",
        "generation.do_sample=false",
    )
    generated = text_generation.generate
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generated(*args)

    monkeypatch.setattr(text_generation, "generate", interrupted)
    with pytest.raises(SystemExit, match="130"):
        predict_rows(cfg, path)
    assert "Stopped after 2 of 3 rows" in capsys.readouterr().out
    predict_rows(cfg, path)
    assert [len(prompts) for _, _, prompts, _ in calls] == [2, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["row"], row["input"]) for row in rows] == list(enumerate(PROMPTS[:3]))
    found = [row["text"] for row in rows]
    assert found == texts(load_pretrained(path), PROMPTS[:3], repetition_penalty=1.0)


def test_the_newest_checkpoint_that_can_be_used_is_taken(
    checkpoints: dict[str, Trained],
    recipe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    good = torch.load(checkpoints["umup-unit"].path, weights_only=True)
    diverged = {**good, "state_dict": {"weight": torch.tensor([1.0, float("nan")])}}
    for age, (name, content) in enumerate(
        [("cut", b"PK\x03"), ("diverged", diverged), ("good", good), ("older", good)]
    ):
        file = tmp_path / "outputs" / "pretrain" / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        os.utime(file, (1000 - age, 1000 - age))
    assert "/good/" in recipe.newest_checkpoint(compose_config("inference"))
    shown = capsys.readouterr().out
    assert "cut/checkpoints/last.ckpt: not a readable checkpoint" in shown
    assert "diverged/checkpoints/last.ckpt: its training diverged" in shown


def test_the_newest_of_a_run_that_was_meant_comes_before_newer_ones_with_debug(
    checkpoints: dict[str, Trained],
    recipe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, (name, debug) in enumerate([("trial", "limit"), ("meant", "null"), ("earlier", "fdr")]):
        run = tmp_path / "outputs" / "pretrain" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / ".hydra").mkdir()
        (run / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{choices: {{debug: {debug}}}}}}}")
        file = run / "checkpoints" / "last.ckpt"
        shutil.copy(checkpoints["umup-unit"].path, file)
        os.utime(file, (1000 - age, 1000 - age))
    cfg = compose_config("inference")
    assert recipe.newest_checkpoint(cfg) == "outputs/pretrain/meant/checkpoints/last.ckpt"
    shown = capsys.readouterr().out
    assert "passed over outputs/pretrain/trial/checkpoints/last.ckpt: of a run with debug=limit" in shown
    assert "earlier" not in shown and "model outputs/pretrain/meant/checkpoints/last.ckpt" in shown
    shutil.rmtree(tmp_path / "outputs" / "pretrain" / "meant")
    assert "/trial/" in recipe.newest_checkpoint(cfg)


def test_without_a_number_of_new_tokens_the_context_is_filled(
    checkpoints: dict[str, Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("prompt=The", "generation.do_sample=false")
    generate_texts(compose_config("inference", *settings), str(checkpoints["plain"].path))
    assert f"{32 - len('|The')} in " in capsys.readouterr().out  # BOS and the prompt


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(umup: Pretrained, checkpoints: dict[str, Trained], recipe: ModuleType, tmp_path: Path) -> None:
    assert umup.tokenizer is not None
    with pytest.raises(InputError, match=r"prompt 2 .* has 31 tokens.* the 32 of the .*max_new_tokens=1$"):
        number_of_new_tokens(umup.model, umup.tokenizer, ["a", "b" * 30], 8)
    with pytest.raises(InputError, match=r"has 33 tokens.* more than the 32 of the model's context; shorten it$"):
        number_of_new_tokens(umup.model, umup.tokenizer, ["b" * 32], None)
    with pytest.raises(InputError, match="no prompt"):
        number_of_new_tokens(umup.model, umup.tokenizer, [], 8)
    with pytest.raises(InputError, match=r"generation\.heat is not"):
        generation_config(umup.model, umup.tokenizer, {"heat": 2})
    with pytest.raises(InputError, match="temperature"):
        generation_config(umup.model, umup.tokenizer, {"do_sample": True, "temperature": -1.0})
    for overrides, message in (
        (["mode=dream"], "mode=dream is not known"),
        (["mode=predict"], "needs output="),
        (["weights=int4"], "weights=int4 is not known"),
        (["batch_size=0"], "positive whole number"),
    ):
        with pytest.raises(InputError, match=message):
            recipe.check(compose_config("inference", *overrides))
    with pytest.raises(InputError, match="no such file"):
        generate_texts(compose_config("inference"), "nowhere.ckpt")
    (tmp_path / "file").write_text("text\n")
    for output, message in (("file", "must end in"), ("file/out.jsonl", "cannot be written")):
        with pytest.raises(InputError, match=message):
            rows_done(tmp_path / output)
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="line 1 is no prediction"):
        rows_done(tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == "my notes\n"
    (tmp_path / "rows.csv").write_text("name\nx\n")
    with pytest.raises(InputError, match=r"row 1 has no text in column 'text'; its columns are name"):
        read_rows(str(tmp_path / "rows.csv"), "text")
    export(umup.model, tmp_path / "folder")
    with pytest.raises(InputError, match="no tokenizer"):
        generate_texts(compose_config("inference"), str(tmp_path / "folder"))


@pytest.mark.slow
def test_default_command_from_nothing(tmp_path: Path) -> None:
    unitscale = [sys.executable, "-m", "lightning_unitscale.cli"]
    done = subprocess.run([*unitscale, "inference"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training a small model first" in done.stdout
    assert "tokens/s" in done.stdout
