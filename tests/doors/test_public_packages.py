"""Modules that others published, trained through their own interfaces with the callback; they import `lightning`.

Their packages are no requirements: `pip install pytorch-forecasting chemprop scvi-tools`, and run this file with
`pytest -m slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_unitscale import UnitScaling

pytestmark = pytest.mark.slow
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def forecasting(callbacks: list[Any]) -> float:
    pytest.importorskip("pytorch_forecasting")
    import lightning.pytorch as pl
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    noise = np.random.default_rng(0)
    time = np.arange(200)
    series = [
        pd.DataFrame({"t": time, "g": str(g), "y": 2 + np.sin(time / 5 + g) + 0.1 * noise.normal(size=200)})
        for g in range(4)
    ]
    data = TimeSeriesDataSet(
        pd.concat(series, ignore_index=True),
        time_idx="t",
        target="y",
        group_ids=["g"],
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["y"],
        time_varying_known_reals=["t"],
        static_categoricals=["g"],
    )
    pl.seed_everything(0)
    model = TemporalFusionTransformer.from_dataset(data, hidden_size=16, learning_rate=3e-3)
    trainer = pl.Trainer(max_steps=60, callbacks=callbacks, **QUIET)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=64, num_workers=0))
    return float(trainer.callback_metrics["train_loss_step"])


def molecules(callbacks: list[Any]) -> float:
    pytest.importorskip("chemprop")
    import lightning.pytorch as pl
    from chemprop import data, models
    from chemprop import nn as layers

    names = [carbons * "C" + end for carbons in range(1, 20) for end in "ON"]
    lengths = np.array([[len(name)] for name in names], dtype=float)
    targets = (lengths - lengths.mean()) / lengths.std()
    points = [data.MoleculeDatapoint.from_smi(name, y) for name, y in zip(names, targets, strict=True)]
    pl.seed_everything(0)
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=16, num_workers=0)
    model = models.MPNN(layers.BondMessagePassing(), layers.MeanAggregation(), layers.RegressionFFN())
    trainer = pl.Trainer(max_epochs=15, callbacks=callbacks, **QUIET)
    trainer.fit(model, loader)
    return float(trainer.callback_metrics["train_loss_epoch"])


def cells(callbacks: list[Any]) -> float:
    scvi = pytest.importorskip("scvi")
    import anndata

    draw = np.random.default_rng(0)
    counts = draw.poisson(draw.gamma(2, 1, size=(1, 50)), size=(400, 50)).astype("float32")
    scvi.settings.seed = 0
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_hidden=32)
    model.train(max_epochs=10, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False, logger=False)
    return -float(model.get_elbo())


@pytest.mark.parametrize("train", [forecasting, molecules, cells])
def test_umup_learns_at_least_as_well(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = UnitScaling()
    untouched, scaled = train([]), train([callback])
    assert callback.plan is not None
    assert scaled <= untouched + 0.02 * abs(untouched)


@pytest.mark.parametrize("train", [forecasting, molecules, cells])
def test_preserve_is_bit_identical(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([UnitScaling("preserve")]) == train([])
