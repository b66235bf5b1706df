"""Every scheme in the recipes: from random weights to text, scores and exports; `amax` from a pretrained folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from support.recipe_runs import run_recipe
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.schemes import SCHEMES

TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
QUICK = [
    *("model.width=32", "model.depth=2", "model.head_width=16", "task.sequence_length=32", "data.batch_size=4"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=null", "logger=csv", "monitor=none"),
]
STEPS = ["trainer.max_steps=30", "trainer.val_check_interval=15", "schedule.warmup_steps=2"]
FINE = [
    *QUICK[3:],
    "trainer.limit_val_batches=4",
    "+trainer.limit_test_batches=4",
    "data.documents._target_=lightning_unitscale.cookbook.data.python_topics",
]
RATES = {"umup": "1e-2", "unit": "1e-2", "amax": "1e-2"}  # the others bring rates of their own
TRAINED = [name for name, scheme in SCHEMES.items() if scheme.changes_training]
# The run folder, what was printed, and the settings of `unitscale pretrain unitscale=<scheme>`
Runs = Callable[[str], tuple[Path, str, list[str]]]
SLOW = pytest.mark.slow
of_schemes = pytest.mark.parametrize(
    "scheme", [pytest.param(name, marks=[] if name == "amax" else SLOW) for name in TRAINED]
)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def losses_in(printed: str) -> list[float]:
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("val/loss ")]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`unitscale pretrain unitscale=<scheme>`, once for each."""
    text = tmp_path_factory.mktemp("text")
    for name in ("class", "function", "import", "with", "try", "for", "lambda"):
        (text / f"{name}.txt").write_text(topics[name])

    @cache
    def run(scheme: str) -> tuple[Path, str, list[str]]:
        settings = [*QUICK, *STEPS, f"unitscale={scheme}", "data=text", f"data.path={text}", "data.held_out=0.3"]
        settings += [f"optimizer.lr={RATES[scheme]}"] if scheme in RATES else []
        return (*run_recipe("pretrain", tmp_path_factory.mktemp(scheme), *settings), settings)

    return run


def last_checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@of_schemes
def test_pretraining_learns(scheme: str, pretrained: Runs) -> None:
    _, printed, _ = pretrained(scheme)
    (loss,) = losses_in(printed)
    assert loss < 4.5  # log 257 = 5.55 is guessing


@of_schemes
def test_a_run_goes_on_from_its_checkpoint(scheme: str, pretrained: Runs, tmp_path: Path) -> None:
    run, printed, settings = pretrained(scheme)
    longer = ["trainer.max_steps=45", "schedule.decay_steps=45", f"ckpt_path={last_checkpoint(run)}"]
    _, after = run_recipe("pretrain", tmp_path, *settings, *longer)
    assert losses_in(after)[-1] < losses_in(printed)[-1]


@of_schemes
def test_text_and_scores_come_out_of_it(scheme: str, pretrained: Runs, tmp_path: Path) -> None:
    run, trained, _ = pretrained(scheme)
    path = f"model.path={last_checkpoint(run)}"
    _, printed = run_recipe("inference", tmp_path, path, "prompt=The", "generation.max_new_tokens=4")
    assert "The" in printed
    _, printed = run_recipe("inference", tmp_path, path, "mode=evaluate", "progress_bar=false")
    head, row = [line.split() for line in printed.split("\n\n")[0].splitlines() if line.strip()]
    assert float(dict(zip(head, row, strict=True))["loss"]) == pytest.approx(losses_in(trained)[-1], abs=1e-3)


@of_schemes
@pytest.mark.parametrize("format", ["hf", "safetensors", *(pytest.param(f, marks=SLOW) for f in ("pt2", "onnx"))])
def test_every_export_is_its_function(scheme: str, format: str, pretrained: Runs, tmp_path: Path) -> None:
    run, _, _ = pretrained(scheme)
    checkpoint = load_pretrained(last_checkpoint(run))
    assert checkpoint.plan is not None
    assert checkpoint.plan.scheme == scheme
    expected = logits(checkpoint.model)
    output = tmp_path / ("plain" if format == "hf" else f"plain.{format}")
    run_recipe("export", tmp_path, f"model.path={last_checkpoint(run)}", f"output={output}", f"format={format}")
    if format == "hf":
        found = logits(AutoModelForCausalLM.from_pretrained(output))
    elif format == "safetensors":
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.model.config.to_dict()))
        load_model(plain, output)
        found = logits(plain)
    elif format == "pt2":
        found = torch.export.load(str(output)).module()(**INPUTS)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in INPUTS.items()})[0])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- from a pretrained folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pretrained: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `unitscale export` makes of it."""
    where = tmp_path_factory.mktemp("export")
    run_recipe("export", where, f"model.path={last_checkpoint(pretrained('amax')[0])}", "output=plain")
    return where / "plain"


def test_pretraining_says_what_the_optimizer_sees(pretrained: Runs) -> None:
    assert "divided by max|gradient| / √d" in pretrained("amax")[1]


def test_finetuning_keeps_the_function_of_a_pretrained_folder(folder: Path, tmp_path: Path) -> None:
    settings = ["trainer.max_steps=2", "trainer.val_check_interval=1", "schedule.warmup_steps=1", "optimizer.lr=1e-12"]
    run, printed = run_recipe("finetune", tmp_path, *FINE, *settings, f"model.path={folder}", "unitscale=amax")
    assert "scheme=amax" in printed
    checkpoint = torch.load(next((run / "checkpoints").glob("last.ckpt")), weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    assert plan.keeps_function
    assert any(p.from_initial != 1 for p in plan.parameters.values())
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, run / "model"))
    assert torch.allclose(logits(before), logits(after), rtol=1e-4, atol=1e-5)


def test_finetuning_that_would_change_it_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds trained weights"):
        run_recipe(
            "finetune", tmp_path, *FINE, "trainer.max_steps=2", "trainer.val_check_interval=1", f"model.path={folder}",
            "unitscale=amax", "unitscale.hyperparameters.keep_function=false", "test_before=false",
        )  # fmt: skip


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'umup' has no hyperparameter 'keep_function'"):
        run_recipe("pretrain", tmp_path, *QUICK, *STEPS, "+unitscale.hyperparameters.keep_function=true")
