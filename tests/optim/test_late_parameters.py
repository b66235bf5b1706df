"""A parameter that the plan leaves alone because the recorded step had no use for it is named when it learns."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling, scale_learning_rates, unit_scale

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor, use_other: bool = False) -> Tensor:
        h = F.relu(self.body(x))
        return self.other(h)[:, :3] if use_other else self.head(h)


def prepared(net: Net, **options: object) -> torch.optim.Optimizer:
    plan = unit_scale(net, lambda m: F.cross_entropy(m(X), Y), **options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    return optimizer


def step(net: Net, optimizer: torch.optim.Optimizer, use_other: bool = False) -> list[str]:
    """The warnings of one step."""
    optimizer.zero_grad()
    F.cross_entropy(net(X, use_other), Y % 3).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


def test_the_head_of_a_loss_that_comes_much_later_is_named_once() -> None:
    net = Net()
    optimizer = prepared(net)
    assert not step(net, optimizer)
    (message,) = step(net, optimizer, use_other=True)
    assert "other.weight" in message and "skip" in message
    assert not step(net, optimizer, use_other=True)


def test_a_layer_unfrozen_later_is_named_once() -> None:
    net = Net()
    net.body.requires_grad_(False)
    optimizer = prepared(net)
    assert not step(net, optimizer)
    net.body.requires_grad_(True)
    (message,) = step(net, optimizer)
    assert "body.weight (frozen)" in message and "skip" in message
    assert not step(net, optimizer)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_listed_in_skip_is_not_warned_of(frozen: bool) -> None:
    net = Net()
    net.other.requires_grad_(not frozen)
    optimizer = prepared(net, skip=["other"])
    net.other.requires_grad_(True)
    assert not step(net, optimizer, use_other=True)


def test_a_closure_is_looked_at_after_it_ran() -> None:
    net = Net()
    optimizer = prepared(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X, use_other=True), Y % 3)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"other\.weight"):
        optimizer.step(closure)


class Finetuned(pl.LightningModule):
    """Its backbone is frozen for an epoch; what is left, a head, takes the user's own steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_the_trainer_names_a_backbone_unfrozen_by_a_callback() -> None:
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[BackboneFinetuning(1), UnitScaling()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    with pytest.warns(UserWarning, match=r"4 parameters learn now.*backbone\.0\.weight \(frozen\)"):
        trainer.fit(Finetuned(), DataLoader(TensorDataset(X, Y), 8))
