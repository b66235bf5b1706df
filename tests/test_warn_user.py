"""`warn_user`: whose line a warning shows."""

from __future__ import annotations

import inspect

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_unitscale import UnitScaling, unit_scale


def loss(model: nn.Module) -> Tensor:
    """A regression on noise."""
    y: Tensor = model(torch.randn(4, 8))
    return y.square().mean()


class Regression(pl.LightningModule):
    """With a learning rate that is unusual in the scheme's units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor) -> Tensor:
        return loss(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def here(lines_on: int) -> int:
    """The number of the caller's line, and some more."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno + lines_on


def test_a_warning_shows_the_line_that_called_the_library() -> None:
    torch.manual_seed(0)  # of one seed in twelve the first loss rises, and the model is left alone
    model = Regression().net
    unit_scale(model, loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss(model).backward()
    with pytest.warns(UserWarning, match="without the learning-rate multipliers") as caught:
        line = here(1)
        optimizer.step()
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


def test_a_trainers_and_torchs_lines_between_are_passed_over() -> None:
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[UnitScaling(lr_units="umup")],
    )  # fmt: skip
    torch.manual_seed(0)
    module = Regression()
    with pytest.warns(UserWarning, match="a learning rate of") as caught:
        line = here(1)
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(2, 1)))
    ours = [w for w in caught if "a learning rate of" in str(w.message)]
    assert [(w.filename, w.lineno) for w in ours] == [(__file__, line)]
