"""The comparison of gradients with and without casts."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import unit_scale
from lightning_unitscale.engine.checks import verify_casts


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 16, sparse=sparse)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.table(x).mean(1))  # type: ignore[no-any-return]


def loss_of(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(0, high, shape, generator=generator) for high, shape in ((50, (64, 5)), (16, (64,))))
    return F.cross_entropy(module(x), y)


@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_sparse_gradients_are_compared_as_dense_ones_are(format: str) -> None:
    found = []
    for sparse in (True, False):
        plan = unit_scale(Words(sparse), loss_of, "preserve", format=format)
        found.append(plan.gradient_cosine)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert "table.weight" in found[0]


@pytest.mark.parametrize("format", ["fp8", "bf16", "fp16"])
def test_low_cosines_are_warned_of_in_every_format(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit_scale(Words(sparse=False), loss_of, "preserve", format=format)
    monkeypatch.setattr(verify_casts.F, "cosine_similarity", lambda *_, **__: torch.tensor(0.9))
    with pytest.warns(UserWarning, match="cosine below"):
        unit_scale(Words(sparse=False), loss_of, "preserve", format=format)
