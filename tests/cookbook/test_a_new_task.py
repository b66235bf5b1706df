"""A new task is one Python file and one option of the group `task`: it is trained, measured, predicted and exported."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.recipe_runs import run_recipe

PYTHON = '''
"""Adding numbers: an architecture, its task and its data."""

from types import SimpleNamespace

import torch
from torchmetrics import MeanAbsoluteError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from lightning_unitscale.cookbook.data import Examples, split_by
from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.tasks import Task


class AdderConfig(PreTrainedConfig):
    model_type = "adder"

    def __init__(self, width=16, **others):
        self.width = width
        super().__init__(**others)


class Adder(PreTrainedModel):
    config_class = AdderConfig
    main_input_name = "summands"

    def __init__(self, config):
        super().__init__(config)
        self.inner = torch.nn.Linear(3, config.width)
        self.outer = torch.nn.Linear(config.width, 1)
        self.post_init()

    def forward(self, summands, labels=None, **others):
        logits = self.outer(self.inner(summands).relu()).squeeze(-1)  # [batch]
        loss = None if labels is None else torch.nn.functional.mse_loss(logits, labels)
        return ModelOutput(loss=loss, logits=logits) if loss is not None else ModelOutput(logits=logits)


AutoConfig.register("adder", AdderConfig)
AutoModel.register(AdderConfig, Adder)


def sums(count):
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).tolist()
    return [(row, sum(row)) for row in rows]


def collate(examples):
    summands, labels = zip(*examples)
    return {"summands": torch.tensor(summands), "labels": torch.tensor(labels)}


class Addition(Task):
    predicts_held_out = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error = MeanAbsoluteError()

    @classmethod
    def data_module(cls, examples, found, cfg):
        return Examples(split_by(str, examples, cfg.data.held_out), collate, **loading(cfg))

    def count(self, batch):
        return len(batch["labels"])

    def score(self, batch, output):
        self.error.update(output.logits, batch["labels"])

    def scores(self):
        return {"absolute_error": self.error.compute()}

    def predict_step(self, batch, batch_idx):
        return {"sum": self.model(batch["summands"]).logits, "target": batch["labels"]}

    @staticmethod
    def example_inputs(model, batch=2, length=12, seed=0):
        return {"summands": torch.randn(batch, 3, generator=torch.Generator().manual_seed(seed))}
'''

YAML = """
# @package _global_
task:
  _target_: adding.Addition
  head: AutoModel
  data: sums
  monitor: val/absolute_error
  mode: min
data:
  sums:
    _target_: adding.sums
    count: 300
  held_out: 0.1
  batch_size: 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The two files, as a user would have them."""
    folder = tmp_path_factory.mktemp("adding")
    (folder / "adding.py").write_text(PYTHON)
    (folder / "conf" / "task").mkdir(parents=True)
    (folder / "conf" / "task" / "adding.yaml").write_text(YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("adding", None)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The folder of its training."""
    settings = [
        "task=adding",
        "~experiment",
        "model.config={model_type: adder, width: 16}",
        "unitscale=umup",
        "optimizer.lr=0.01",
        "trainer.max_steps=150",
        "trainer.val_check_interval=50",
        "trainer.enable_progress_bar=false",
        "logger=csv",
        f"--config-dir={folder / 'conf'}",
    ]
    made, printed = run_recipe("finetune", folder, *settings)
    assert "test/absolute_error" in printed
    return made


def test_it_is_trained_by_its_own_score(run: Path) -> None:
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["test/absolute_error"] < 0.3 < metrics["test/absolute_error, before"]
    with (run / "csv" / "metrics.csv").open() as stream:
        logged = [float(row["val/absolute_error"]) for row in csv.DictReader(stream) if row["val/absolute_error"]]
    assert metrics["best val/absolute_error"] == pytest.approx(min(logged), rel=1e-6)


def test_it_is_measured(folder: Path, run: Path) -> None:
    best = json.loads((run / "report" / "metrics.json").read_text())["best val/absolute_error"]
    settings = ["mode=evaluate", f"model.path={run}/checkpoints/best.ckpt", "hydra.run.dir=evaluated"]
    _, printed = run_recipe("inference", folder, *settings, "weights=[float32,fp8]")
    head, full, fp8 = [line.split() for line in printed.splitlines()[:3]]
    assert head == ["weights", "MiB", "loss", "absolute_error", "examples/s"]
    assert float(full[3]) == pytest.approx(best, abs=1e-5)
    assert fp8[0] == "fp8"


def test_what_was_held_out_is_predicted(folder: Path, run: Path) -> None:
    best = json.loads((run / "report" / "metrics.json").read_text())["best val/absolute_error"]
    settings = [f"model.path={run}/checkpoints/best.ckpt", "hydra.run.dir=predicted", "progress_bar=false"]
    run_recipe("inference", folder, "mode=predict", "output=sums.jsonl", *settings)
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    errors = [abs(row["sum"] - row["target"]) for row in rows]
    assert sum(errors) / len(errors) == pytest.approx(best, abs=1e-5)
    with pytest.raises(SystemExit, match="has no tokenizer beside it"):
        (folder / "rows.txt").write_text("a text")
        run_recipe("inference", folder, "mode=predict", "output=more.jsonl", "rows=rows.txt", *settings)


def test_its_own_inputs_check_an_export(folder: Path, run: Path) -> None:
    settings = [f"model.path={run}/checkpoints/best.ckpt", "output=adder.safetensors", "format=safetensors"]
    _, printed = run_recipe("export", folder, *settings, "hydra.run.dir=exported")
    assert "read back" in printed
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert weights["model.inner.weight"].shape == (16, 3)
