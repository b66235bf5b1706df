"""The benchmark recipe: what it compares is the same model, and what it saves is complete. Times decide nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from lightning_unitscale import cli, unit_scale
from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.measuring.training_step import loss_of, new_model, random_batch

SMALL = ["model.width=64", "model.head_width=32", "model.depth=1", "task.sequence_length=16", "batch_size=2"]
SHORT = ["rounds=2", "warm_up=1", "preparations=1"]


@pytest.fixture(scope="module")
def cfg() -> DictConfig:
    config.register()
    with initialize_config_dir(str(config.shipped("conf")), version_base="1.3"):
        return compose("benchmark", overrides=SMALL)


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["unitscale", "benchmark", *SMALL, *SHORT, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    GlobalHydra.instance().clear()
    cli.main()


def test_written_model_is_the_llama_of_transformers(cfg: DictConfig) -> None:
    theirs, ours = new_model(cfg, "transformers"), new_model(cfg, "written")
    names = {
        "embed_tokens": "embedding",
        "layers": "blocks",
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "out",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "lm_head": "readout",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.removeprefix("model.").removeprefix("model.")
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    tokens, _ = random_batch(cfg)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("kind", ["transformers", "written"])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_scaled_models_compile_without_a_break(cfg: DictConfig, kind: str, storage: str) -> None:
    batch = random_batch(cfg)
    model = new_model(cfg, kind)
    unit_scale(model, lambda module: loss_of(module, batch), storage=storage)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch[0]), model(batch[0]))


def test_every_variant_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("unit_scaling")
    command(tmp_path, monkeypatch, "modes=[eager]")
    (file,) = tmp_path.glob("outputs/benchmark/*/benchmark.json")
    results = json.loads(file.read_text())
    rows = {(row["model"], row["variant"]): row for row in results["steps"]}
    assert set(rows) == {
        (kind, variant)
        for kind in ("transformers", "written")
        for variant in ("plain", "folded", "unit", "unit-scaling")
    }
    failed = [key for key, row in rows.items() if "error" in row]
    assert failed == [("transformers", "unit-scaling")]
    for key, row in rows.items():
        if key not in failed:
            assert len(row["samples"]) == 2
            assert all(seconds > 0 for seconds in row["samples"])
    assert rows["written", "plain"]["ratio"] == [1, 1, 1]
    assert [(row["model"], row["storage"]) for row in results["preparation"]] == [
        ("transformers", "folded"),
        ("transformers", "unit"),
        ("written", "folded"),
        ("written", "unit"),
    ]
    assert "unit-scaling can't run the model transformers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants=[plain,fold]", "variants: 'fold' is not known; choose from plain, folded"),
        ("variants=[folded]", "variants must contain plain"),
        ("modes=[fast]", "modes: 'fast' is not known"),
        ("rounds=0", "rounds=0 must be a positive whole number"),
        ("clock=sun", "clock=sun is not known; choose one of cpu, wall"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=message):
        command(tmp_path, monkeypatch, override)


@pytest.mark.slow
@pytest.mark.by_hand
def test_compiled_variants_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, monkeypatch, "modes=[compiled]", "models=[written]")
    (file,) = tmp_path.glob("outputs/benchmark/*/benchmark.json")
    assert not [row for row in json.loads(file.read_text())["steps"] if "error" in row]
