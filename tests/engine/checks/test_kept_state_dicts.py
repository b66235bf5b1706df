"""State dicts taken before the model was prepared: right where theirs have one form, else refused or warned of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling, UnitScalingError

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
Begin = Callable[["Averaged"], dict[str, Tensor]]


class Averaged(pl.LightningModule):
    """Keeps an average of its network; `begin` takes what it goes on from."""

    def __init__(self, begin: Begin, normed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin = begin
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32) if normed else nn.Identity(), nn.ReLU(), nn.Linear(32, 4)
        )
        self.average: dict[str, Tensor] = {}

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_fit_start(self) -> None:
        self.average = self.begin(self)


class ByStateDict(Averaged):
    def on_train_batch_end(self, *_: Any) -> None:
        for name, value in self.net.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 0.5)


class ByName(Averaged):
    def on_train_batch_end(self, *_: Any) -> None:
        for name, value in self.net.named_parameters():
            self.average[name].lerp_(value.detach(), 0.5)


BEGIN: dict[str, Begin] = {
    "comprehension": lambda m: {name: value.clone() for name, value in m.net.state_dict().items()},
    "deep copy": lambda m: copy.deepcopy(m.net.state_dict()),
}


def fitted(model: Averaged, storage: str) -> list[str]:
    """Two steps; what was warned of."""
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[UnitScaling(storage=storage)], **options).fit(  # type: ignore[arg-type]
            model, DataLoader(TensorDataset(X, Y), batch_size=32)
        )
    return [str(w.message) for w in caught if "unit scaling: " in str(w.message)]


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("normed", [True, False])
def test_an_average_by_state_dicts_goes_on_where_all_is_folded(begin: str, normed: bool) -> None:
    model = ByStateDict(BEGIN[begin], normed)
    assert not fitted(model, "folded")
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(model.average[name], parameter.detach())  # no step is taken at a rate of 0


@pytest.mark.parametrize(("begin", "normed"), [("deep copy", True), ("deep copy", False), ("comprehension", True)])
def test_what_is_known_to_be_a_state_dict_is_refused_where_its_form_changes(begin: str, normed: bool) -> None:
    model = ByStateDict(BEGIN[begin], normed)
    before = copy.deepcopy(model.net.state_dict())
    with pytest.raises(UnitScalingError, match=r"ByStateDict\.average holds the weights of net .* after the first"):
        fitted(model, "unit")
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_what_may_be_a_state_dict_is_warned_of_before_its_own_code_fails() -> None:
    with (
        pytest.warns(UserWarning, match=r"ByStateDict\.average holds .* named_parameters"),
        pytest.raises(RuntimeError),
    ):
        pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[UnitScaling(storage="unit")], logger=False).fit(
            ByStateDict(BEGIN["comprehension"], normed=False), DataLoader(TensorDataset(X, Y), batch_size=32)
        )


def test_an_average_by_names_is_rescaled_and_nothing_is_said() -> None:
    model = ByName(lambda m: {name: value.detach().clone() for name, value in m.net.named_parameters()}, normed=False)
    assert not fitted(model, "unit")
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(model.average[name], parameter.detach())
