"""`format="fp8_rowwise"` in a model: which rows have scales, what they are, and that they travel with the plan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import Plan, UnitScalingError, recalibrating, unit_scale
from lightning_unitscale.engine.runtime.row_statistics import RowAccumulator

WIDTH = 32


class Transposed(nn.Module):
    """A weight on the right, as GPT-2's Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 48) / 6), nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(WIDTH, WIDTH), Transposed(), nn.Linear(48, 16)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.mid(torch.relu(self.up(x))))
        return self.down(h + self.conv(h[:, None])[:, 0])


def data(features: float = 1.0) -> Tensor:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= features
    return x


def prepared(x: Tensor, row: float = 1.0) -> tuple[Net, Plan]:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.up.weight[5] *= row
        model.mid.weight[:, 7] *= row  # its outputs are its columns
    return model, unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8_rowwise", recalibrate=[2])


def k_of(values: Tensor) -> int:
    return -round(math.log2(float(values.square().mean().sqrt())))


def test_each_row_is_brought_to_one() -> None:
    x = data(2.0**5)
    model, plan = prepared(x, row=2.0**10)
    sites = {str(site.params[0]): site for site in plan.cast_sites}
    up, mid = sites["up.weight"].row_exponents, sites["mid.weight"].row_exponents
    weight = model.up.weight.detach()
    assert up["weight rows"] == [k_of(row) for row in weight]
    assert up["weight columns"] == [k_of(column) for column in weight.t()]
    assert up["x columns"] == [k_of(column) for column in x.t()]
    assert up["x columns"][0] == k_of(x[:, 0]) <= up["x columns"][1] - 4
    assert mid["weight rows"] == [k_of(column) for column in model.mid.weight.detach().t()]
    assert len(mid["gradient columns"]) == 48
    assert sites["conv.weight"].row_sizes == []  # no matrix: one scale for each operand


def test_gradients_are_those_of_the_true_function() -> None:
    x = data(2.0**4)
    model, _ = prepared(x, row=2.0**6)
    model(x).square().mean().backward()
    exact = Net()
    exact.load_state_dict(model.state_dict())
    exact(x).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert float(torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0)) > 0.99, name


def test_they_travel_with_the_plan_and_are_measured_again() -> None:
    x = data()
    model, plan = prepared(x)
    again = Plan.from_dict(plan.to_dict())
    before = [site.row_exponents for site in plan.cast_sites]
    assert [site.row_exponents for site in again.cast_sites] == before
    x[:, 3] *= 2.0**6
    with recalibrating(plan, 2):
        model(x).square().mean().backward()
    after = plan.cast_sites[0].row_exponents["x columns"]
    assert [now - was for now, was in zip(after, before[0]["x columns"], strict=True)] == [
        -6 if column == 3 else 0 for column in range(WIDTH)
    ]


def test_a_feature_that_is_always_zero_has_the_scale_of_the_others() -> None:
    x = data()
    x[:, 4] = 0
    _, plan = prepared(x)
    site = plan.cast_sites[0]
    assert 2.0 ** site.row_exponents["x columns"][4] == site.operand_scales["x"]


def test_switches_hold_for_rows_too() -> None:
    x, torch_model = data(), Net()
    plan = unit_scale(
        torch_model, lambda m: m(x).square().mean(), "preserve", format="fp8_rowwise", weights=False, verify=False
    )
    assert set(plan.cast_sites[0].row_exponents["weight rows"]) == {0}


def test_a_checkpoint_casts_as_training_did(tmp_path: Path) -> None:
    x = data(8.0)
    model, _ = prepared(x, row=2.0**8)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


def test_compiled_it_is_the_same() -> None:
    x = data(8.0)
    model, _ = prepared(x, row=2.0**8)
    wanted = model(x)
    assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(x), wanted, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_operands_split_over_processes_are_refused_by_name() -> None:
    rows = RowAccumulator(torch.float8_e4m3fn, 1.0, {-1: 64}, torch.device("cpu"))
    with pytest.raises(UnitScalingError, match=r"a scale for each of 64 rows.*\[4, 32\].*use format='fp8'"):
        rows.add(torch.randn(4, 32))
