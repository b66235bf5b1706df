"""Export: plain models with the same function, written in formats that need nothing of this package."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support import zoo
from support.by_day import by_day
from support.prepared import adamw, build, prepared, train
from support.zoo_batches import Batch, causal_batch
from support.zoo_transformers import TOKENS
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import export, to_plain
from lightning_unitscale.export.examples import example_inputs, logits_of
from lightning_unitscale.export.plain import exact_outputs
from lightning_unitscale.export.targets import files_of


def trained(name: str, storage: str) -> nn.Module:
    """Prepared, then a few real steps: no two parts of a weight are alike any more."""
    case = zoo.CASES[name]
    model, plan = prepared(case, storage=storage, verify=False)
    train(case, model, [adamw(model, plan, lr=1e-2)], 3)
    return model.eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels" or "decoder" in name}).logits


def inputs_of(case: zoo.Case, seed: int) -> Batch:
    batch = case.batch(seed)
    labels = batch.pop("labels")
    if case.name.startswith(("t5", "whisper")):
        batch["decoder_input_ids"] = labels
    return batch


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("name", by_day(zoo.TWELVE, [name for name in zoo.TWELVE if name.endswith("-sdpa")]))
def test_plain_transformers_loads_the_folder_with_the_same_logits(name: str, storage: str, tmp_path: Path) -> None:
    model, case = trained(name, storage), zoo.CASES[name]
    untouched = build(case)
    export(model, tmp_path / "folder")
    attention = name.partition("-")[2]
    loaded = type(untouched).from_pretrained(tmp_path / "folder", attn_implementation=attention).eval()
    assert plan_of(loaded) is None
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in untouched.named_parameters()}
    for seed in (5, 6):
        inputs = inputs_of(case, seed)
        expected = logits(model, inputs)
        assert difference(logits(loaded, inputs), expected) <= 1e-5
        assert difference(logits(untouched.eval(), inputs), expected) > 1e-2  # weights that were not written differ


def test_the_model_is_left_as_it_was() -> None:
    model = trained("gpt2-sdpa", "unit")
    inputs = inputs_of(zoo.CASES["gpt2-sdpa"], 5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model, inputs)
    to_plain(model, partial(logits_of, inputs=inputs))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, inputs), before)


def test_only_the_query_part_of_a_packed_weight_changes() -> None:
    case = zoo.CASES["gpt2-sdpa"]
    model, plan = prepared(case, verify=False, hyperparameters={"attn_exponent": 1.0})
    (factor,) = {site.factors[""] for site in plan.explicit_sites if site.role == "attention"}
    plain = to_plain(model, partial(logits_of, inputs=inputs_of(case, 1)))
    for before, after in zip(model.transformer.h, plain.transformer.h, strict=True):
        query = torch.tensor([factor] * 32 + [1.0] * 64)
        torch.testing.assert_close(after.attn.c_attn.weight, before.attn.c_attn.weight * query, rtol=1e-6, atol=0)
        torch.testing.assert_close(after.attn.c_attn.bias, before.attn.c_attn.bias * query, rtol=1e-6, atol=0)


def test_a_readout_whose_input_is_used_elsewhere_is_untied(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, **TOKENS)
    torch.manual_seed(0)
    model: PreTrainedModel = GPT2DoubleHeadsModel(config)
    ids = causal_batch(0)["input_ids"].view(2, 2, 16)  # questions, choices, tokens

    def loss(module: nn.Module) -> Tensor:
        output = module(input_ids=ids, labels=ids, mc_labels=torch.tensor([0, 1]))
        return output.loss + output.mc_loss

    unit_scale(model, loss, verify=False)
    export(model, tmp_path / "folder")
    loaded = GPT2DoubleHeadsModel.from_pretrained(tmp_path / "folder").eval()
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    with torch.no_grad():
        found, expected = (m(input_ids=ids) for m in (loaded, model.eval()))
    assert difference(found.logits, expected.logits) <= 1e-5
    assert difference(found.mc_logits, expected.mc_logits) <= 1e-5


@pytest.mark.parametrize(
    "name",
    ["einsum-attention", "multihead-attention", "shared-layer", "tied-embedding", "weight-norm", "conv-transformer"],
)
def test_models_of_any_library(name: str) -> None:
    model, case = trained(name, "unit"), zoo.CASES[name]
    batch = case.batch(7)
    example = batch["image"] if "image" in batch else batch["input_ids"]
    plain = to_plain(model, lambda module: module(example))
    with torch.no_grad():
        assert difference(plain(example.flip(0)), model(example.flip(0))) <= 1e-5


@pytest.mark.parametrize("model_type", ["gemma2", "distilbert", "gpt_neox", "qwen2", "opt", "convnext"])
def test_other_architectures(model_type: str) -> None:
    """Gains stored as w in 1 + w, a readout factor of 1/768, queries interleaved with keys and values."""
    case = zoo.unseen_case(model_type)
    model, plan = prepared(case, storage="unit", verify=False)
    with torch.no_grad():
        for parameter in model.parameters():  # trained weights are no longer all alike
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    assert not plan.is_plain
    plain = to_plain(model.eval(), partial(logits_of, inputs=example_inputs(model)))
    inputs = example_inputs(model, batch=3, seed=4)
    with torch.no_grad():
        assert difference(logits_of(plain, inputs), logits_of(model, inputs)) <= 5e-6


def test_casts_of_training_are_not_exported(tmp_path: Path) -> None:
    case = zoo.CASES["gpt2-sdpa"]
    model, plan = prepared(case, verify=False, format="fp8")
    exact, _ = prepared(case, verify=False)
    assert plan.cast_sites
    assert export(model, tmp_path / "folder") <= 1e-5  # of the logits without casts
    inputs = inputs_of(case, 5)
    loaded = logits(type(model).from_pretrained(tmp_path / "folder").eval(), inputs)
    assert difference(loaded, logits(exact.eval(), inputs)) <= 1e-5
    assert difference(loaded, logits(model.eval(), inputs)) > 1e-3


def test_exact_outputs_are_those_without_casts_and_the_model_keeps_them() -> None:
    case = zoo.CASES["llama-sdpa"]
    model, exact = (
        prepared(case, storage="unit", verify=False, **format)[0].eval() for format in ({"format": "fp8"}, {})
    )
    forward = partial(logits, batch=inputs_of(case, 5))
    cast = forward(model)
    assert difference(exact_outputs(model, forward), forward(exact)) <= 1e-6
    assert difference(cast, forward(exact)) > 1e-3
    assert torch.equal(forward(model), cast)
    assert torch.equal(exact_outputs(exact, forward), forward(exact))


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_experts_in_a_loop_over_slices_of_one_weight(storage: str, tmp_path: Path) -> None:
    """Which slices are used is up to the data, and those that got no token have their factors too."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=8, **TOKENS)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model: PreTrainedModel = MixtralForCausalLM(config)
    one = torch.full((1, 2), 5)  # two of the eight experts at most
    plan = unit_scale(model, lambda m: m(input_ids=one, labels=one).loss, storage=storage, verify=False)
    assert {plan.roles[f"model.layers.{i}.mlp.experts.down_proj"] for i in (0, 1)} == {"hidden"}
    export(model, tmp_path / "folder")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "folder").eval()
    inputs = causal_batch(5)
    assert difference(logits(loaded, inputs), logits(model.eval(), inputs)) <= 1e-5


class Saturating(nn.Module):
    """A branch that no weight can scale: it ends in tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.readout = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.readout(x + torch.tanh(self.layer(x)))


def test_what_cannot_be_moved_is_named() -> None:
    model, ids = Saturating(), torch.arange(12).view(2, 6)
    unit_scale(model, lambda m: nn.functional.cross_entropy(m(ids).flatten(0, 1), ids.flatten()), verify=False)
    with pytest.raises(UnitScalingError, match=r"1 factors cannot be moved.*<root>:add \(residual"):
        to_plain(model, lambda m: m(ids))


def test_a_query_with_two_uses_is_named() -> None:
    """DeBERTa's: with the keys, and with the positions."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=32)
    model, ids = DebertaV2ForSequenceClassification(config), torch.arange(12).view(2, 6)
    unit_scale(model, lambda m: m(input_ids=ids, labels=torch.tensor([0, 1])).loss, verify=False)
    with pytest.raises(UnitScalingError, match=r"attention\.self:bmm#0 \(attention: .* used elsewhere too"):
        to_plain(model.eval(), partial(logits_of, inputs=example_inputs(model)))


def test_wrong_logits_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama-sdpa", "folded")
    save = type(model).save_pretrained

    def spoil(self: PreTrainedModel, folder: Path) -> None:
        with torch.no_grad():
            self.lm_head.weight *= 1.001
        save(self, folder)

    monkeypatch.setattr(type(model), "save_pretrained", spoil)
    monkeypatch.setattr(type(model), "from_pretrained", classmethod(lambda cls, _: build(zoo.CASES["llama-sdpa"])))
    with pytest.raises(UnitScalingError, match="outputs differ"):
        export(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_model

    model, case = trained("t5-sdpa", "unit"), zoo.CASES["t5-sdpa"]
    export(model, tmp_path / "weights.safetensors", "safetensors")
    torch.manual_seed(9)
    fresh = case.build()
    load_model(fresh, tmp_path / "weights.safetensors")
    inputs = inputs_of(case, 5)
    assert difference(logits(fresh.eval(), inputs), logits(model, inputs)) <= 1e-5


def test_program_runs_without_this_package(tmp_path: Path) -> None:
    model = trained("gpt2-sdpa", "folded")
    export(model, tmp_path / "model.pt2", "pt2")
    inputs = example_inputs(model, batch=5, length=21, seed=3)
    torch.save((inputs, logits_of(model, inputs).detach()), tmp_path / "case.pt")
    script = (
        "import sys, torch; sys.modules['lightning_unitscale'] = sys.modules['transformers'] = None\n"
        "inputs, expected = torch.load('case.pt')\n"
        "found = torch.export.load('model.pt2').module()(**inputs)\n"
        "print(float((found - expected).abs().max() / expected.abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) <= 1e-5


def test_onnx_at_another_batch_and_length(tmp_path: Path) -> None:
    import onnxruntime

    model = trained("gpt2-sdpa", "folded")
    export(model, tmp_path / "model.onnx", "onnx")
    inputs = example_inputs(model, batch=5, length=21, seed=3)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert difference(torch.from_numpy(found), logits_of(model, inputs).detach()) <= 1e-5
    written = files_of(tmp_path / "model.onnx")
    assert sorted(written) == sorted(tmp_path.iterdir())
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weights < sum(file.stat().st_size for file in written) < 2 * weights + 2**20


def test_all_that_was_written_counts_and_nothing_beside_it(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "other.onnx", "model.data", "folder/a", "folder/sub/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files_of(tmp_path / "model.onnx") == [tmp_path / "model.onnx", tmp_path / "model.onnx.data"]
    assert files_of(tmp_path / "other.onnx") == [tmp_path / "other.onnx"]
    assert {file.name for file in files_of(tmp_path / "folder")} == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["llama-sdpa", "bert-sdpa", "vit-sdpa", "t5-sdpa", "whisper-sdpa"])
def test_programs_of_every_kind_of_model(name: str, format: str, tmp_path: Path) -> None:
    """`export` runs what it wrote at another batch and length than it was traced with."""
    assert export(trained(name, "unit"), tmp_path / f"model.{format}", format) <= 1e-5


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, **TOKENS))
    with pytest.raises(InputError, match=r"format=onnx cannot hold MixtralForCausalLM.*grouped_mm.*hf and safetensors"):
        export(model, tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_half_the_size(tmp_path: Path) -> None:
    model = trained("gpt2-sdpa", "folded")
    exact = export(model, tmp_path / "float32")
    rounded = export(model, tmp_path / "bfloat16", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "bfloat16")]
    assert sizes[1] < 0.6 * sizes[0]
    assert exact <= 1e-5 < rounded < 0.05
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16


def test_bad_output_is_an_error_before_work(tmp_path: Path) -> None:
    model = build(zoo.CASES["llama-sdpa"])
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        export(model, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export(model, tmp_path / "file" / "folder")
    with pytest.raises(InputError, match="gguf is not known; choose one of hf"):
        export(model, tmp_path / "new", "gguf")


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    unitscale = [sys.executable, "-m", "lightning_unitscale.cli"]
    made = run([*unitscale, "pretrain", "experiment=tiny", "model=gpt2", "hydra.run.dir=run"])
    assert made.returncode == 0, made.stderr
    done = run([*unitscale, "export", "model.path=run/checkpoints/last.ckpt", "output=folder"])
    assert done.returncode == 0, done.stderr
    assert "unit scaling: umup, folded storage" in done.stdout
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "gpt2"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert loaded.config.vocab_size == 257


class Gated(nn.Module):
    """A sum whose second term ends in a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + h * self.gate(h).sigmoid())


def test_both_ways_out_of_a_factor_that_no_weight_can_take() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    unit_scale(model := Gated(), lambda net: net(x).square().mean())
    with pytest.raises(UnitScalingError, match=r"activations=False .* torch\.export\.export"):
        to_plain(model, lambda net: net(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    unit_scale(other := Gated(), lambda net: net(x).square().mean(), activations=False)
    torch.testing.assert_close(to_plain(other, lambda net: net(x))(x), other(x))
