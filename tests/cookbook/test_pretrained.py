"""What a user names as `model.path`: folders, checkpoints and adapters, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_unitscale import UnitScaling, remove_unit_scaling
from lightning_unitscale.cookbook import hub
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tokenizers import BOS, byte_tokenizer, load_tokenizer
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.plan.rename import plan_around, plan_inside
from lightning_unitscale.errors import InputError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "vocab_size": 257, "bos_token_id": BOS, "eos_token_id": None, **SMALL}
GPT2 = {"model_type": "gpt2", "vocab_size": 257, "bos_token_id": BOS, "n_embd": 32, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(1))


class Trained(pl.LightningModule):
    """A module as the recipes have them: the model below `model`, its config in the hyperparameters."""

    def __init__(self, model: dict[str, Any], lora: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        built: nn.Module = AutoModelForCausalLM.from_config(
            {"llama": LlamaConfig, "gpt2": GPT2Config}[model["model_type"]](**model)
        )
        self.model = get_peft_model(built, LoraConfig(**lora)) if lora else built

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(file: Path, model: dict[str, Any], lora: dict[str, Any] | None = None, **scaling: Any) -> Trained:
    """Two steps, and a checkpoint."""
    pl.seed_everything(1)
    module = Trained(model, lora)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[UnitScaling(**scaling)] if scaling else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=file.parent,
    )
    trainer.fit(module, torch.utils.data.DataLoader([TOKENS[0], TOKENS[1]], batch_size=1))
    trainer.save_checkpoint(file, weights_only=False)
    return module.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "scaling",
    [{}, {"scheme": "preserve"}, {"scheme": "umup"}, {"scheme": "umup", "storage": "unit"}],
    ids=["none", "preserve", "folded", "unit"],
)
def test_checkpoint_gives_the_function_that_was_trained(
    model: dict[str, Any], scaling: dict[str, Any], tmp_path: Path
) -> None:
    module = trained(tmp_path / "a.ckpt", model, **scaling)
    found = load_pretrained(str(tmp_path / "a.ckpt"))
    assert torch.equal(logits(found.model), logits(module.model))
    assert (found.plan is None) == (not scaling)
    assert found.tokenizer is not None
    assert found.fresh == []
    if found.plan is not None:
        assert set(found.plan.parameters) == set(dict(found.model.named_parameters()))
        assert found.plan is plan_of(found.model)


def test_scaling_of_a_loaded_model_can_be_removed(tmp_path: Path) -> None:
    module = trained(tmp_path / "a.ckpt", LLAMA, scheme="umup", storage="unit")
    found = load_pretrained(str(tmp_path / "a.ckpt"))
    assert found.plan is not None
    assert not found.plan.is_plain
    plain = LlamaForCausalLM(found.model.config).eval()
    plain.load_state_dict(remove_unit_scaling(found.model).state_dict())
    torch.testing.assert_close(logits(plain), logits(module.model), rtol=1e-5, atol=1e-5)


def test_plan_of_the_inside_and_back(tmp_path: Path) -> None:
    trained(tmp_path / "a.ckpt", GPT2, scheme="umup", storage="unit")
    inside = load_pretrained(str(tmp_path / "a.ckpt")).plan
    assert inside is not None
    assert plan_inside(plan_around(inside, "model"), "model").to_dict() == inside.to_dict()
    with pytest.raises(ValueError, match="is not part of model"):
        plan_inside(inside, "model")


def test_lora_checkpoint_is_merged(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    module = trained(tmp_path / "a.ckpt", LLAMA, lora)
    found = load_pretrained(str(tmp_path / "a.ckpt"))
    assert type(found.model) is LlamaForCausalLM
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    torch.testing.assert_close(logits(found.model), logits(module.model), rtol=1e-5, atol=1e-6)


def test_plain_umup_checkpoint_takes_another_head(tmp_path: Path) -> None:
    module = trained(tmp_path / "a.ckpt", LLAMA, scheme="umup")
    found = load_pretrained(str(tmp_path / "a.ckpt"), "AutoModelForSequenceClassification", num_labels=3)
    assert found.plan is None
    assert found.fresh == ["score.weight"]
    assert found.unused == ["lm_head.weight"]
    assert torch.equal(found.model.model.norm.weight, module.model.model.norm.weight)
    trained(tmp_path / "b.ckpt", GPT2, scheme="umup")
    with pytest.raises(InputError, match="can't take another head"):
        load_pretrained(str(tmp_path / "b.ckpt"), "AutoModelForSequenceClassification")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_gives_what_from_pretrained_gives(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    path = saved(model, tmp_path)
    found = load_pretrained(path, attn_implementation="eager")
    assert found.plan is None
    assert found.tokenizer is None  # none lies there
    assert found.model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(found.model), logits(model))
    byte_tokenizer().save_pretrained(path)
    assert load_pretrained(path).tokenizer is not None
    half = load_pretrained(path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16


def test_folder_has_the_head_of_its_architecture(tmp_path: Path) -> None:
    saved(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL)), tmp_path / "vit")
    found = load_pretrained(str(tmp_path / "vit"))
    assert (found.head, type(found.model), found.fresh) == (
        "AutoModelForImageClassification",
        ViTForImageClassification,
        [],
    )


def test_fresh_head_is_named_and_other_missing_weights_are_an_error(tmp_path: Path) -> None:
    bert = BertForMaskedLM(BertConfig(vocab_size=300, **SMALL))
    path = saved(bert, tmp_path)
    found = load_pretrained(path, "AutoModelForSequenceClassification", num_labels=5)
    assert {"classifier.weight", "classifier.bias"} <= set(found.fresh)
    assert found.model.classifier.out_features == 5
    assert torch.equal(found.model.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"weights of BertForSequenceClassification are missing .*encoder\.layer\.2"):
        load_pretrained(path, "AutoModelForSequenceClassification")


def test_classifier_of_another_size_is_fresh(tmp_path: Path) -> None:
    path = saved(BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=2, **SMALL)), tmp_path)
    assert load_pretrained(path, "AutoModelForSequenceClassification").fresh == []
    found = load_pretrained(path, "AutoModelForSequenceClassification", num_labels=7)
    assert found.fresh == ["classifier.bias", "classifier.weight"]


def test_adapter_folder_is_merged_into_its_base(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    base = saved(model, tmp_path / "base")
    model.name_or_path = base
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    found = load_pretrained(str(tmp_path / "adapter"))
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    torch.testing.assert_close(logits(found.model), logits(lora), rtol=1e-5, atol=1e-6)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_byte_tokenizer_has_a_token_for_every_byte_and_one_that_begins_documents(tmp_path: Path) -> None:
    text = "naïve 文字\n\n\tif x:  pass \x00"
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text).input_ids == [BOS, *text.encode()]
        assert tokenizer.decode([BOS, *text.encode()], skip_special_tokens=True) == text
        assert tokenizer.decode([0xE6, 65]) == bytes([0xE6, 65]).decode(errors="replace")
        assert tokenizer.bos_token_id == tokenizer.pad_token_id == BOS


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("", {}, "model.path is empty"),
        ("missing.ckpt", {}, "no such file or folder"),
        ("./missing", {}, "no such file or folder"),
        ("void", {}, "a folder without config.json"),
        ("run", {}, r"did you mean .*last\.ckpt"),
        ("broken.ckpt", {}, "not a readable checkpoint"),
        ("other.ckpt", {}, "not a checkpoint of a transformers model"),
        (
            "vit",
            {"head": "AutoModelForCausalLM"},
            "AutoModelForCausalLM does not fit a vit model; these do: .*AutoModelForImageClassification",
        ),
        ("llama", {"head": "AutoModelForCausalLLM"}, "did you mean AutoModelForCausalLM"),
        ("llama", {"tokenizer": "void"}, "no tokenizer there"),
        ("llama", {"tokenizer": "bytes"}, "token numbers up to 256, but the model's vocabulary has only 100"),
        ("llama", {"num_label": 3}, "has no setting num_label; did you mean num_labels"),
        ("weightless", {}, "model.path=weightless"),
    ],
)
def test_bad_input(
    path: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    saved(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL)), tmp_path / "vit")
    saved(LlamaForCausalLM(LlamaConfig(vocab_size=100, **SMALL)), tmp_path / "llama")
    saved(LlamaForCausalLM(LlamaConfig(vocab_size=100, **SMALL)), tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        load_pretrained(path, **options)


def test_hub_name_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the Hugging Face hub did not deliver it"):
        load_pretrained("nobody/no-such-model-at-all")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Unreachable:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Unreachable)
    named = (
        r"=nobody/nothing: the Hugging Face hub can't be reached \(Name or service not known\), and here there is no"
    )
    with pytest.raises(InputError, match=f"model.path{named}"):
        load_pretrained("nobody/nothing")
    with pytest.raises(InputError, match=f"model.tokenizer{named}"):
        load_tokenizer("nobody/nothing")
    assert len(asked) == 2
