"""Parts that have their turn by the Trainer's counts are planned before they had it, and the counts stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 4


class TwoHeads(pl.LightningModule):
    """A head has its turn by `turn`; without, both have it at once."""

    def __init__(self, turn: Callable[[TwoHeads], bool] | None, automatic: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.automatic_optimization = turn, automatic
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor | None:
        h, (_, y) = F.relu(self.body(batch[0])), batch
        self.seen.append((self.global_step, self.current_epoch))
        if self.turn is None:
            loss = F.cross_entropy(self.head(h), y) + F.cross_entropy(self.other(h), y)
        else:
            loss = F.cross_entropy((self.other if self.turn(self) else self.head)(h), y)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fitted(turn: Callable[[TwoHeads], bool] | None, automatic: bool) -> tuple[dict[str, float], TwoHeads]:
    model, callback = TwoHeads(turn, automatic), UnitScaling()
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unit scaling")
        pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **options).fit(  # type: ignore[arg-type]
            model, DataLoader(TensorDataset(X, Y), batch_size=16)
        )
    assert callback.plan is not None
    return {name: p.multiplier for name, p in callback.plan.parameters.items()}, model


TURNS: dict[str, Callable[[TwoHeads], bool]] = {
    "every other step": lambda m: m.global_step % 2 == 1,
    "every other epoch": lambda m: m.trainer.current_epoch % 2 == 1,
}


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("turn", TURNS)
def test_a_head_whose_turn_is_counted_by_the_trainer_is_planned_with_the_first(turn: str, automatic: bool) -> None:
    expected, _ = fitted(None, automatic)
    multipliers, model = fitted(TURNS[turn], automatic)
    assert multipliers == pytest.approx(expected)
    assert model.seen == [(0, 0), (1, 0), (2, 1), (3, 1)]
