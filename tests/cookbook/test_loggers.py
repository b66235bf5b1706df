"""Loggers that send nothing anywhere: what a run leaves on this machine. Skipped where the logger's package is missing.

(CSV and TensorBoard, the default, are looked at in test_pretrain.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.recipe_runs import run_recipe


def logged(logger: str, folder: Path, *arguments: str) -> tuple[Path, float]:
    """The folder of a tiny run, and its held-out loss."""
    run, _ = run_recipe("pretrain", folder, "experiment=tiny", f"logger={logger}", *arguments)
    assert (run / "csv" / "metrics.csv").stat().st_size > 0  # the curves of the report
    return run, json.loads((run / "report" / "metrics.json").read_text())["val/loss"]


@pytest.mark.parametrize("logger", ["wandb", "many"])
def test_weights_and_biases_offline(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run, _ = logged(logger, tmp_path, "logger.wandb.offline=true")
    wandb.finish()
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert {b"train/loss", b"val/loss", b"unitscale/"} <= {
        name for name in (b"train/loss", b"val/loss", b"unitscale/") if name in kept.read_bytes()
    }
    if logger == "many":
        assert list((run / "tensorboard").glob("events*"))


def test_mlflow_in_a_file(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    _, loss = logged("mlflow", tmp_path)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'pretrain'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found.info.status == "FINISHED"


def test_aim_in_a_folder(tmp_path: Path) -> None:
    aim = pytest.importorskip("aim")
    _, loss = logged("aim", tmp_path)
    (found,) = aim.Repo(str(tmp_path)).iter_runs()
    values = [values.values_list() for metric in found.metrics() if (values := metric.values) and "loss" in metric.name]
    assert any(value == pytest.approx(loss, rel=1e-5) for series in values for value in series)


def test_a_logger_whose_package_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aim", None)
    monkeypatch.setitem(__import__("sys").modules, "aim.pytorch_lightning", None)
    with pytest.raises(SystemExit, match=r"aim") as ended:
        run_recipe("pretrain", tmp_path, "experiment=tiny", "logger=aim")
    assert "pip install" in str(ended.value)
