"""Fine-tuning of other heads than the task's own, of models by the name of a hub, of other tasks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from support.by_day import by_day
from support.finetuning import LORA, OTHER_HEADS, QUICK, SMALL, TEXT, any_head, logits, words
from support.recipe_runs import run_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ViTForImageClassification,
)

from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer

# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hub_name_goes_to_the_hub(llama: str, tmp_path: Path) -> None:
    """The cache as huggingface_hub lays it out after a download; there is no network in a test."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--somebody--tiny-llama"
    shutil.copytree(llama, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)

    def finetune(name: str, folder: str) -> subprocess.CompletedProcess[str]:
        arguments = [*TEXT, *LORA, "monitor=none", "test_before=false", f"model.path={name}", f"hydra.run.dir={folder}"]
        return subprocess.run(
            [sys.executable, "-m", "lightning_unitscale.cli", "finetune", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        )

    run = finetune("somebody/tiny-llama", "run")
    assert run.returncode == 0, run.stderr
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/tiny-llama"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)

    run = finetune("somebody/not-there", "other")
    assert run.returncode == 1
    (message,) = (line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert "model.path=somebody/not-there: the Hugging Face hub did not deliver it" in message
    assert "and here there is no such file or folder (looked in" in message


# --- other heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("head", by_day(OTHER_HEADS, [next(iter(OTHER_HEADS))]))
def test_any_other_head_is_trained_on_data_of_ones_own(
    head: str, settings: list[str], bert: str, tmp_path: Path
) -> None:
    folder, _ = run_recipe(
        "finetune",
        tmp_path,
        *any_head(head),
        f"task.head={head}",
        *(setting for setting in QUICK if not setting.startswith("data.")),
        f"model.path={bert}",
        *(["+model.changes.num_labels=3"] if head == "AutoModelForTokenClassification" else []),
        *settings,
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["test/loss"] < metrics["test/loss, before"]
    plain = getattr(transformers, head).from_pretrained(folder / "model").eval()
    with torch.no_grad():
        assert float(plain(**OTHER_HEADS[head]).loss) == pytest.approx(metrics["test/loss"], rel=1e-4)
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    matmuls = {name for site in plan.sites for name in site.params}
    new_head = {
        "AutoModelForMaskedLM": "cls.predictions.transform.dense",
        "AutoModelForQuestionAnswering": "qa_outputs",
    }
    assert any(new_head.get(head, "classifier") in name for name in matmuls)


# --- the other tasks --------------------------------------------------------------------------------------------------


def test_text_classification_of_a_csv_file(llama: str, tmp_path: Path) -> None:
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={llama}")
    assert "new, with random weights: score.weight" in printed
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.id2label == {0: "rain", 1: "sun"}
    assert json.loads((folder / "report" / "metrics.json").read_text())["test/accuracy"] >= 0.75


def test_a_classifier_that_knows_the_classes_keeps_their_numbers(tmp_path: Path) -> None:
    names = {0: "sun", 1: "rain"}  # sorted, they would change places
    config = BertConfig(vocab_size=257, max_position_embeddings=32, num_labels=2, id2label=names, **SMALL)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer().save_pretrained(tmp_path / "classifier")
    settings = [*words(tmp_path), f"model.path={tmp_path / 'classifier'}", "trainer.max_steps=40"]
    folder, printed = run_recipe("finetune", tmp_path, *settings)
    assert "with random weights" not in printed
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert model.config.id2label == names
    tokens = byte_tokenizer()(["sun 1", "rain 1"], padding=True, return_tensors="pt")
    assert model(tokens.input_ids, tokens.attention_mask).logits.argmax(-1).tolist() == [0, 1]


def test_sequence_to_sequence(tmp_path: Path) -> None:
    sizes = ["d_model=32", "d_kv=16", "num_heads=2", "num_layers=1", "num_decoder_layers=1"]
    folder, _ = run_recipe(
        "finetune",
        tmp_path,
        "experiment=seq2seq",
        *QUICK,
        *(f"model.config.{size}" for size in sizes),
        "optimizer.lr=0.5",
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert 0 <= metrics["test/exact_match"] <= 1
    assert metrics["test/character_error_rate"] > 0
    assert metrics["test/loss"] < metrics["test/loss, before"]


@pytest.mark.slow
def test_digits_reach_95_percent(tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, "experiment=digits", "trainer.enable_progress_bar=false")
    assert json.loads((folder / "report" / "metrics.json").read_text())["test/accuracy"] >= 0.95


@pytest.mark.slow
@pytest.mark.by_hand
def test_text_classification_learns(tmp_path: Path) -> None:
    folder, printed = run_recipe(
        "finetune", tmp_path, "experiment=text_classification", "trainer.enable_progress_bar=false"
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert 0.4 < metrics["test/majority_class_accuracy"] < 0.55
    assert metrics["test/accuracy"] > metrics["test/majority_class_accuracy"] + 0.25
    assert "test/majority_class_accuracy" in printed


def test_digits_run(tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, "experiment=digits", *QUICK, "lora=none")
    assert ViTForImageClassification.from_pretrained(folder / "model").config.num_labels == 10
