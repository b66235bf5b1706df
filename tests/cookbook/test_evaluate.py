"""`unitscale inference mode=evaluate`: the scores that validation logged, for whatever `unitscale finetune` makes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from support.by_day import by_day
from support.recipe_runs import run_recipe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_unitscale.cookbook.tokenizers import byte_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "trainer.enable_progress_bar=false",
    "schedule.warmup_steps=1",
    "test_before=false",
    "+trainer.limit_test_batches=1",
    "logger=csv",
    "monitor=none",
    "optimizer.lr=1e-2",
]
T5 = ["d_model=32", "d_kv=16", "num_heads=2", "num_layers=1", "num_decoder_layers=1"]
TASKS: dict[str, list[str]] = {
    "words": ["model.path=WORDS", "data=text", "data.path=TEXT", "data.held_out=0.3", "task.sequence_length=16"],
    "lora": [
        "model.path=WORDS",
        "lora=all_linear",
        "data=text",
        "data.path=TEXT",
        "data.held_out=0.3",
        "task.sequence_length=16",
    ],
    "umup": [
        "model.base=['experiment=tiny','trainer.enable_progress_bar=false']",
        "data=text",
        "data.path=TEXT",
        "data.held_out=0.3",
        "task.sequence_length=16",
    ],
    "classes": ["experiment=text_classification", "model.path=BERT", "data=labelled_file", "data.path=CLASSES"],
    "digits": ["experiment=digits"],
    "digits-fp8": ["experiment=digits", "unitscale.format=fp8"],
    "seq2seq": ["experiment=seq2seq", *(f"model.config.{size}" for size in T5), "data=paired_file", "data.path=PAIRS"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of transformers and data, by the names that `TASKS` uses."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text").mkdir()
    for name in ("class", "function", "import", "with", "try", "for", "lambda"):
        (folder / "text" / f"{name}.txt").write_text(topics.get(name) or topics["yield"])
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        [topics["class"]], trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"])
    )
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=backend.get_vocab_size(), max_position_embeddings=32, **SMALL)
    ).save_pretrained(folder / "words")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>").save_pretrained(
        folder / "words"
    )
    BertForSequenceClassification(
        BertConfig(vocab_size=257, pad_token_id=256, max_position_embeddings=128, **SMALL)
    ).save_pretrained(folder / "bert")
    byte_tokenizer().save_pretrained(folder / "bert")
    rows = [f"{word} {number},{word}" for number in range(40) for word in ("sun", "rain")]
    (folder / "classes.csv").write_text("\n".join(["text,label", *rows]))
    pairs = [f"ab{number},{number}ba" for number in range(60)]
    (folder / "pairs.csv").write_text("\n".join(["source,target", *pairs]))
    return {
        "WORDS": str(folder / "words"),
        "BERT": str(folder / "bert"),
        "TEXT": str(folder / "text"),
        "CLASSES": str(folder / "classes.csv"),
        "PAIRS": str(folder / "pairs.csv"),
    }


def finetuned(task: str, inputs: dict[str, str], folder: Path) -> tuple[Path, dict[str, float]]:
    """The run folder, and what it logged at its only validation."""
    settings = [*TASKS[task], *QUICK]
    for name, value in inputs.items():
        settings = [setting.replace(name, value) for setting in settings]
    run, _ = run_recipe("finetune", folder, *settings)
    (log,) = run.rglob("metrics.csv")
    (row,) = [row for row in csv.DictReader(log.open()) if row["val/loss"]]
    return run, {name.removeprefix("val/"): float(v) for name, v in row.items() if name.startswith("val/") and v}


def evaluated(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """The rows of the table."""
    shutil.rmtree(folder / "run-of-inference", ignore_errors=True)
    _, printed = run_recipe("inference", folder, "mode=evaluate", "hydra.run.dir=run-of-inference", *settings)
    head, *rows = [line.split() for line in printed.split("\n\n")[0].splitlines() if line.strip()]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("task", by_day(TASKS, list(TASKS)[:2]))
def test_scores_are_those_that_validation_logged(task: str, inputs: dict[str, str], tmp_path: Path) -> None:
    run, logged = finetuned(task, inputs, tmp_path)
    (found,) = evaluated(tmp_path, f"model.path={run}/checkpoints/best.ckpt")
    assert set(logged) <= set(found)
    for name, value in logged.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-5, rel=1e-4 if name == "perplexity" else 0), name
    assert found["weights"] == "float32"


def test_pretraining_is_measured_in_every_weight_format(inputs: dict[str, str], tmp_path: Path) -> None:
    text = ["data=text", f"data.path={inputs['TEXT']}", "data.held_out=0.3"]
    quick = ["trainer.limit_val_batches=null", "trainer.enable_progress_bar=false", "logger=csv", "monitor=none"]
    run, _ = run_recipe("pretrain", tmp_path, "experiment=tiny", *text, *quick, "task.sequence_length=40")
    logged = [
        float(row["val/loss"]) for row in csv.DictReader(next(run.rglob("metrics.csv")).open()) if row["val/loss"]
    ]
    path = f"model.path={run}/checkpoints/last.ckpt"
    full, bfloat16, fp8 = evaluated(tmp_path, path, "weights=[float32,bfloat16,fp8]")
    assert float(full["loss"]) == pytest.approx(logged[-1], abs=1e-5)
    assert 0 < abs(float(bfloat16["loss"]) - logged[-1]) < 0.01
    assert 0 < abs(float(fp8["loss"]) - logged[-1]) < 0.1
    sizes = [float(row["MiB"]) for row in (full, bfloat16, fp8)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    assert sizes[2] == pytest.approx(sizes[0] / 4, rel=0.04)
    (shorter,) = evaluated(tmp_path, path, "sequence_length=20")
    assert shorter["loss"] != full["loss"]


@pytest.mark.slow
def test_other_data_other_part_and_an_exported_folder(inputs: dict[str, str], tmp_path: Path) -> None:
    run, logged = finetuned("classes", inputs, tmp_path)
    (folder,) = evaluated(tmp_path, f"model.path={run}/model")
    assert float(folder["loss"]) == pytest.approx(logged["loss"], abs=1e-5)
    (test,) = evaluated(tmp_path, f"model.path={run}/checkpoints/best.ckpt", "part=test")
    assert float(test["loss"]) != pytest.approx(logged["loss"], abs=1e-5)
    (moved := tmp_path / "elsewhere").mkdir()
    shutil.copytree(run / "model", moved / "model")
    with pytest.raises(SystemExit, match=r"nothing beside .* records what it was trained on"):
        evaluated(tmp_path, f"model.path={moved}/model")
    (named,) = evaluated(tmp_path, f"model.path={moved}/model", "data=labelled_file", f"data.path={inputs['CLASSES']}")
    assert named["loss"] == folder["loss"]
    (tmp_path / "other.csv").write_text("text,label\n" + "\n".join(f"{n},{('rain', 'snow')[n % 2]}" for n in range(40)))
    for settings, message in (
        (
            ["data=labelled_file", f"data.path={tmp_path}/other.csv"],
            "class 'snow', but the model knows only 'rain', 'sun'",
        ),
        (["task=seq2seq"], "task is for AutoModelForSeq2SeqLM, but the model's head is AutoModelForSequenceClass"),
        (["data=topics"], "needs data with `labelled`"),
        (["part=training"], "part=training is not known"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluated(tmp_path, f"model.path={run}/model", *settings)


def test_a_head_with_random_weights_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no weights for score\.weight of LlamaForSequenceClassification"):
        evaluated(tmp_path, f"model.path={inputs['WORDS']}", "model.head=AutoModelForSequenceClassification")


# --- predictions of what was held out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["digits", "classes"])
def test_predictions_have_the_accuracy_that_was_logged(task: str, inputs: dict[str, str], tmp_path: Path) -> None:
    run, logged = finetuned(task, inputs, tmp_path)
    path = f"model.path={run}/checkpoints/best.ckpt"
    output = tmp_path / "answers.jsonl"
    predict = ["mode=predict", path, f"output={output}", "progress_bar=false", "hydra.run.dir=predictions"]
    run_recipe("inference", tmp_path, *predict)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    right = sum(row["label"] == row["target"] for row in rows) / len(rows)
    assert right == pytest.approx(logged["accuracy"], abs=1e-6)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:5]))  # as an interrupt leaves it
    run_recipe("inference", tmp_path, *predict, "batch_size=5")
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["label"] for row in again] == [row["label"] for row in rows]


def test_texts_longer_than_the_context_are_cut_and_other_heads_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("short\n" + 300 * "long")
    predict = ["mode=predict", f"rows={tmp_path}/rows.txt", "progress_bar=false"]
    run_recipe("inference", tmp_path, *predict, f"model.path={inputs['BERT']}", f"output={tmp_path}/a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["label"] in ("LABEL_0", "LABEL_1") for row in rows] == [True, True]
    with pytest.raises(SystemExit, match="BertForSequenceClassification does not write text"):
        run_recipe("inference", tmp_path, f"model.path={inputs['BERT']}")
    with pytest.raises(SystemExit, match="needs rows="):
        run_recipe("inference", tmp_path, "mode=predict", f"model.path={inputs['WORDS']}", f"output={tmp_path}/b.jsonl")


def test_a_tokenizer_without_a_pad_token(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The class\nA class is")
    settings = [f"prompt_file={tmp_path}/prompts.txt", "generation.max_new_tokens=4"]
    _, printed = run_recipe("inference", tmp_path, f"model.path={inputs['WORDS']}", *settings)
    assert "8 in" in printed
