"""The fine-tuning recipe: what goes in, what is trained, and what comes out, against plain transformers and peft."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.finetuning import SMALL, TEXT, TOKENS, any_head, logits
from support.recipe_runs import run_recipe
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_unitscale import unit_scale
from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tasks.task import freeze_parameters
from lightning_unitscale.errors import InputError


@pytest.fixture(scope="module")
def full(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A language model fine-tuned in whole."""
    return run_recipe("finetune", tmp_path_factory.mktemp("full"), *TEXT, f"model.path={llama}")


# --- what goes in -----------------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    torch.manual_seed(1)
    labels = torch.tensor([0, 2])
    return {
        "causal": (LlamaForCausalLM(LlamaConfig(vocab_size=257, **SMALL)), {"input_ids": TOKENS, "labels": TOKENS}),
        "text": (
            BertForSequenceClassification(BertConfig(vocab_size=257, num_labels=3, **SMALL)),
            {"input_ids": TOKENS, "labels": labels},
        ),
        "image": (
            ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)),
            {"pixel_values": torch.randn(2, 3, 8, 8), "labels": labels},
        ),
        "seq2seq": (
            T5ForConditionalGeneration(
                T5Config(
                    vocab_size=257, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            ),
            {"input_ids": TOKENS, "labels": TOKENS},
        ),
    }


@pytest.mark.parametrize("name", ["causal", "text", "image", "seq2seq"])
def test_preserve_leaves_logits_and_weights_bit_for_bit(name: str) -> None:
    model, batch = models()[name]
    model.eval()
    before, weights = model(**batch).logits, {key: value.clone() for key, value in model.state_dict().items()}
    plan = unit_scale(model, lambda m: m(**batch).loss, scheme="preserve")
    assert any(site.params for site in plan.sites)
    assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_freezing_by_parameter_or_module() -> None:
    model, _ = models()["causal"]
    freeze_parameters(model, ["model.embed_tokens", "model.layers.0", "*.norm.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("model.layers.1", "lm_head"))}
    with pytest.raises(
        InputError, match=r"'model\.layer\.1' matches no parameter and no module\. Did you mean 'model\.layers\.1'"
    ):
        freeze_parameters(model, ["model.layer.1"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze_parameters(model, ["*"])


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_run_trains_and_keeps_the_best(full: tuple[Path, str], llama: str) -> None:
    folder, printed = full
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["test/loss"] < metrics["test/loss, before"]
    assert "test/loss" in printed
    with (folder / "csv" / "metrics.csv").open() as stream:
        held_out = [float(row["val/loss"]) for row in csv.DictReader(stream) if row.get("val/loss")]
    assert metrics["best val/loss"] == pytest.approx(min(held_out), rel=1e-6)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    assert plan.scheme == "preserve"
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_exported_folder_is_the_best_checkpoint(full: tuple[Path, str]) -> None:
    folder, _ = full
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(logits(plain), logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model))
    assert AutoTokenizer.from_pretrained(folder / "model")("a\n").input_ids == [256, 97, 10]


WITHOUT_THE_PACKAGE = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as the package is installed here, torch itself would import it
sys.modules["lightning_unitscale"] = None  # importing it fails
import torch, pytorch_lightning as pl
from transformers import AutoConfig, AutoModelForCausalLM

class Plain(pl.LightningModule):
    def __init__(self, model, **others):
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))

folder, tokens = sys.argv[1], torch.load(sys.argv[2])
a = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
b = Plain.load_from_checkpoint(folder + "/checkpoints/best.ckpt", weights_only=True).model.eval()
with torch.no_grad():
    torch.save([m(input_ids=tokens).logits for m in (a, b)], sys.argv[3])
"""


def test_what_comes_out_loads_where_this_package_is_not(full: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = full
    torch.save(TOKENS, tmp_path / "tokens")
    arguments = [str(folder), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    expected = logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model)
    for found in torch.load(tmp_path / "logits"):
        assert torch.equal(found, expected)


def test_early_stopping(llama: str, tmp_path: Path) -> None:
    settings = [
        "trainer.max_steps=20",
        "patience=1",
        "optimizer.lr=1e-30",
        "optimizer.weight_decay=0",
        "test_before=false",
    ]
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, f"model.path={llama}", *settings)
    assert (
        json.loads((folder / "report" / "metrics.json").read_text())["steps"] == 4
    )  # the second validation was no better


def test_frozen_layers_stay(llama: str, tmp_path: Path) -> None:
    folder, _ = run_recipe(
        "finetune", tmp_path, *TEXT, f"model.path={llama}", "model.freeze=[model.embed_tokens,model.layers.0]"
    )
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0."))}


def test_sequences_are_no_longer_than_the_models_context(llama: str, tmp_path: Path) -> None:
    """Unless a length is asked for, which is an error of its own (below)."""
    shorter = [setting for setting in TEXT if not setting.startswith("task.sequence_length")]
    run, printed = run_recipe("finetune", tmp_path, *shorter, "test_before=false", f"model.path={llama}")
    assert "task.sequence_length=32, the model's context, in place of 128" in printed
    path = f"model.path={run}/checkpoints/last.ckpt"
    _, printed = run_recipe("inference", tmp_path, "mode=evaluate", path, "hydra.run.dir=evaluation")
    assert "float32" in printed  # though the run's record says 128


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.path=missing.ckpt"], "no such file or folder"),
        (["model.base=null"], "there is no model to start from"),
        (["task=text_classification"], "this task needs data with `labelled`, and what was chosen has documents"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be a positive whole number"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be a positive number"),
        (["ckpt_path=missing.ckpt"], "ckpt_path=missing.ckpt: no such file"),
        (["model.path=LLAMA", "task.sequence_length=64"], "longer than the model's context of 32 tokens"),
        (
            ["model.path=LLAMA", "task.sequence_length=16", "model.freeze=[nothing]"],
            "model.freeze: 'nothing' matches no",
        ),
        (["model.path=LLAMA", "task.sequence_length=16", "lora=all_linear", "lora.target_modules=[nothing]"], "lora: "),
        (["model.path=LLAMA", "task.sequence_length=16", "lora=all_linear", "+lora.rank=2"], "lora: "),
        (["model.path=LLAMA", "task.head=AutoModelForMaskedLM"], "task.head=AutoModelForMaskedLM does not go with"),
        (
            ["model.path=LLAMA", *any_head("AutoModelForMaskedLM"), "task.head=AutoModelForImageClassification"],
            "AutoModelForImageClassification does not fit a llama model; these do: AutoModel, AutoModelForCausalLM",
        ),
        (
            ["model.path=LLAMA", *any_head("AutoModelForMaskedLM"), "task.head=AutoModel"],
            "AutoModel computes no loss from a batch of",
        ),
        (
            ["model.path=LLAMA", *any_head("AutoModelForMaskedLM"), "task.head=AutoModelForTokens"],
            "is not an auto class of transformers",
        ),
        (
            ["model.path=LLAMA", "task=any_head", "task.head=AutoModelForTokenClassification"],
            "needs data with `module`",
        ),
        (["model.path=LLAMA", "+model.changes.dropout_rate=1"], "has no setting dropout_rate"),
    ],
)
def test_bad_input_is_one_clear_message(settings: list[str], message: str, llama: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        run_recipe("finetune", tmp_path, *[setting.replace("LLAMA", llama) for setting in settings])
    assert message in str(raised.value)
    assert str(raised.value).startswith("error: ")
