"""Weights in fewer bits: what is kept, what is used, what is on disk, and the casts of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipe_runs import run_recipe
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import export, logits_of, to_plain
from lightning_unitscale.export.fp8_weights import FP8_FILE, load_fp8, quantize_weights, save_fp8, stored_bytes
from lightning_unitscale.formats import cast

SPEECH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
IDS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))


def plain_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, tie_word_embeddings=tied, **sizes)).eval()


@pytest.mark.parametrize(("format", "bytes_each", "error"), [("bfloat16", 2, 0.003), ("fp8", 1, 0.04)])
@pytest.mark.parametrize("tied", [False, True])
def test_narrow_weights(format: str, bytes_each: int, error: float, tied: bool) -> None:
    narrow, exact = plain_model(tied), plain_model(tied)
    full = stored_bytes(narrow)
    matrices = sum(p.numel() for p in narrow.parameters() if p.dim() == 2)
    quantize_weights(narrow, format)
    scales = 4 * (len([p for p in exact.parameters() if p.dim() == 2]))
    assert full - stored_bytes(narrow) == (4 - bytes_each) * matrices - scales
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            kept = narrow.get_submodule(name.rpartition(".")[0]).weight
            if parameter.dim() == 2:
                relative = float((kept - parameter).norm() / parameter.norm())
                assert 0 < relative < error
                mantissa = torch.frexp(kept).mantissa * 2 ** (8 if format == "bfloat16" else 4)
                assert torch.equal(mantissa, mantissa.round())  # representable with this many bits
            parameter.copy_(kept)
        ids = torch.arange(40).view(2, 20)
        torch.testing.assert_close(narrow(ids).logits, exact(ids).logits, rtol=1e-5, atol=1e-6)


def prepared_model(**options: Any) -> tuple[LlamaForCausalLM, Any]:
    model = plain_model()
    return model, unit_scale(model, lambda m: m(IDS, labels=IDS).loss, verify=False, **options)


def test_activations_are_rounded_with_the_scales_of_the_plan() -> None:
    model, plan = prepared_model(format="fp8")
    with pytest.raises(UnitScalingError, match="to_plain"):
        quantize_weights(model, "fp8", plan)
    narrow: Any = to_plain(model, lambda m: logits_of(m, {"input_ids": IDS}))
    quantize_weights(narrow, "fp8", plan)
    layer, name = narrow.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj.weight"
    (site,) = [site for site in plan.cast_sites if name in site.params]
    scale = site.operand_scales["x"]
    x = torch.randn(5, 64)
    expected = F.linear(cast(x, torch.float8_e4m3fn, scale).float() / scale, layer.weight)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight), rtol=1e-3)


@torch.no_grad()
def test_the_numerics_are_those_of_training() -> None:
    """The same casts with the same scales; besides, the embedding is rounded, which training does not cast."""
    model, plan = prepared_model(format="fp8")
    narrow: Any = to_plain(model, lambda m: logits_of(m, {"input_ids": IDS}))
    exact = narrow(IDS).logits
    quantize_weights(narrow, "fp8", plan)
    model.eval().model.embed_tokens.weight.copy_(narrow.model.embed_tokens.weight)
    expected = model(IDS).logits
    torch.testing.assert_close(narrow(IDS).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((exact - expected).norm() / expected.norm()) > 1e-2


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [None, {"format": "fp8"}, {"storage": "unit"}, {"storage": "unit", "format": "fp8"}]
)
@torch.no_grad()
def test_what_is_read_back_is_what_was_kept(options: dict[str, Any] | None, tmp_path: Path) -> None:
    model, plan = prepared_model(**options) if options is not None else (plain_model(), None)
    narrow: Any = to_plain(model, lambda m: logits_of(m, {"input_ids": IDS}))
    quantize_weights(narrow, "fp8", plan)
    difference = export(model, tmp_path / "fp8", tokenizer=byte_tokenizer(), dtype=torch.float8_e4m3fn)
    assert 1e-3 < difference < 0.2
    found = load_pretrained(str(tmp_path / "fp8"))
    assert found.weights == "fp8"
    assert torch.equal(found.model(IDS).logits, narrow(IDS).logits)
    assert stored_bytes(found.model) == stored_bytes(narrow)
    export(model, tmp_path / "float32", tokenizer=byte_tokenizer())
    size, full = (tmp_path / "fp8" / FP8_FILE), (tmp_path / "float32" / "model.safetensors")
    assert size.stat().st_size < 0.32 * full.stat().st_size  # of this tiny model, a tenth is the file's own table


@torch.no_grad()
def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = plain_model(tied=True)
    export(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    found: Any = load_pretrained(str(tmp_path / "fp8")).model
    assert torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert stored_bytes(found) < 1.05 * matrices


def test_buffers_and_made_weights_survive(tmp_path: Path) -> None:
    """BatchNorm's statistics, and a weight made by weight norm, which stays as it is."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    config.image_size = 16
    model = ResNetForImageClassification(config)
    pixels = {"pixel_values": torch.randn(4, 3, 16, 16)}
    model.train()(**pixels)
    quantize_weights(model.eval(), "fp8")
    save_fp8(model, tmp_path / "fp8")
    found = load_pretrained(str(tmp_path / "fp8"))
    assert found.head == "AutoModelForImageClassification"
    assert torch.equal(found.model(**pixels).logits, model(**pixels).logits)

    speech = Wav2Vec2Model(Wav2Vec2Config(**SPEECH)).eval()
    quantize_weights(speech, "fp8")
    save_fp8(speech, tmp_path / "speech")
    again = Wav2Vec2Model(Wav2Vec2Config(**SPEECH)).eval()
    load_fp8(again, tmp_path / "speech")
    sound = torch.randn(2, 4000)
    assert torch.equal(again(sound).last_hidden_state, speech(sound).last_hidden_state)


def test_nobody_takes_the_numbers_without_their_scales(tmp_path: Path) -> None:
    export(plain_model(), tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    with pytest.raises(InputError, match="dtype=fp8 is for format=hf"):
        export(plain_model(), tmp_path / "model.pt2", "pt2", dtype=torch.float8_e4m3fn)
    with pytest.raises(InputError, match="own head"):
        load_pretrained(str(tmp_path / "fp8"), "AutoModelForSequenceClassification")
    other = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(InputError, match="is not of a LlamaForCausalLM"):
        load_fp8(other, tmp_path / "fp8")
    (tmp_path / "fp8" / FP8_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        load_pretrained(str(tmp_path / "fp8"))


@torch.no_grad()
def test_bfloat16_folder_gives_the_rounded_weights(tmp_path: Path) -> None:
    model = plain_model()
    export(model, tmp_path / "bfloat16", dtype=torch.bfloat16)
    found = load_pretrained(str(tmp_path / "bfloat16")).model
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_commands(tmp_path: Path) -> None:
    export(plain_model(), tmp_path / "plain", tokenizer=byte_tokenizer())
    _, printed = run_recipe("export", tmp_path, f"model.path={tmp_path}/plain", "dtype=fp8", f"output={tmp_path}/fp8")
    assert "read back" in printed
    quick = ["generation.max_new_tokens=4", "prompt=The"]
    _, printed = run_recipe("inference", tmp_path, f"model.path={tmp_path}/fp8", *quick)
    assert "tokens/s" in printed
    with pytest.raises(SystemExit, match="weights in fp8; leave out weights=float32"):
        run_recipe("inference", tmp_path, f"model.path={tmp_path}/fp8", "weights=float32", *quick)
    with pytest.raises(SystemExit, match="weights in fp8; export the checkpoint"):
        run_recipe("export", tmp_path, f"model.path={tmp_path}/fp8", f"output={tmp_path}/again")
