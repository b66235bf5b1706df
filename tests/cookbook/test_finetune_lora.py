"""Fine-tuning by LoRA: what peft loads, new heads, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.finetuning import LORA, TEXT, logits, words
from support.recipe_runs import run_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.model_path import load_pretrained


def test_lora_saves_what_peft_loads(llama: str, tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, f"model.path={llama}", "lora=all_linear", "lora.r=2")
    base = AutoModelForCausalLM.from_pretrained(llama)
    untouched = logits(base)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(adapted), untouched, atol=1e-4)
    torch.testing.assert_close(
        logits(load_pretrained(str(folder / "adapter")).model), logits(merged), rtol=1e-4, atol=1e-5
    )
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    adapters = {name for name in plan.parameters if "lora_" in name}
    in_matmuls = {name for site in plan.sites for name in site.params if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2  # layers, linear layers in each, matrices
    assert in_matmuls == adapters


@pytest.mark.parametrize(
    ("base", "head"),
    [
        pytest.param("llama", ["score"], marks=pytest.mark.slow),
        ("bert", ["bert.pooler.dense", "classifier"]),
    ],
)
def test_lora_trains_and_saves_a_new_head(
    base: str, head: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(base)
    folder, _ = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={path}", *LORA)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == head
    assert settings["base_model_name_or_path"] == path

    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    in_matmuls = {name for site in plan.sites for name in site.params}
    for module in head:
        trained = f"model.base_model.model.{module}.modules_to_save.default.weight"
        assert trained in in_matmuls
        assert not plan.parameters[trained].reason  # it is not left alone
        start = trained.replace("modules_to_save.default", "original_module")
        assert not torch.equal(checkpoint["state_dict"][trained], checkpoint["state_dict"][start])

    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, pad_token_id=256)
    adapted = PeftModel.from_pretrained(plain, folder / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    ours = load_pretrained(str(folder / "adapter"), "AutoModelForSequenceClassification")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours.model), logits(merged), rtol=1e-4, atol=1e-5)
    assert ours.model.config.id2label == {0: "rain", 1: "sun"}
    assert ours.fresh == []


def test_lora_on_a_umup_checkpoint_leaves_a_plain_base(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), *LORA, f"model.path={base}")
    assert "unit scaling: scheme=preserve" in printed
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")
    body = AutoModelForCausalLM.from_pretrained(folder / "base").model.state_dict()
    trained = torch.load(base, weights_only=True)["state_dict"]
    assert all(torch.equal(value, trained[f"model.model.{name}"]) for name, value in body.items())
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "base", pad_token_id=256)
    adapted = PeftModel.from_pretrained(plain, folder / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


def test_factors_in_the_forward_pass_keep_lora_and_new_heads_away(tmp_path: Path) -> None:
    """GPT-2: its tied readout and its packed query can't be folded."""
    base = ["model=gpt2", "experiment=tiny", "trainer.enable_progress_bar=false"]
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.base={base}".replace(" ", ""))
    assert "own parametrization goes on: umup" in printed
    assert "Use unitscale export format=hf" in printed
    for settings, message in (([*TEXT, *LORA], "lora can't do without"), (words(tmp_path), "can't take another head")):
        with pytest.raises(SystemExit, match=message):
            run_recipe("finetune", tmp_path, *settings, f"model.path={folder / 'base.ckpt'}")
