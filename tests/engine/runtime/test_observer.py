"""What is counted at operands, against closed forms in float64, autograd and `gfloat`; and where the observer looks."""

from __future__ import annotations

import math
from typing import Any

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from support import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import unit_scale
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.monitor.exponent_histogram import HIGHEST, LOWEST, ExponentHistogram, count_exponents

ORACLE = {
    torch.float8_e4m3fn: gfloat.formats.format_info_ocp_e4m3,
    torch.float8_e5m2: gfloat.formats.format_info_ocp_e5m2,
    torch.float16: gfloat.formats.format_info_binary16,
    torch.bfloat16: gfloat.formats.format_info_bfloat16,
}


def spread(seed: int, count: int = 4000, octaves: float = 8.0) -> Tensor:
    """Magnitudes over many powers of two, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(count, generator=generator) * torch.exp2(octaves * torch.randn(count, generator=generator))
    t[::50] = 0
    return t


def observed(module: nn.Module, run: Any) -> dict[Any, dict[str, Accumulator]]:
    observer = OperandObserver(module, lambda use, operand: Accumulator(torch.float32))
    with observer:
        run(module)
    return observer.found


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ORACLE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**9])
def test_statistics_of_a_cast_against_gfloat(dtype: torch.dtype, scale: float) -> None:
    t = spread(0)
    accumulator = Accumulator(dtype, scale)
    for part in t.split(1500):  # over several calls
        accumulator.add(part)
    found = accumulator.result()
    assert found is not None

    exact = t.double().numpy()
    oracle = ORACLE[dtype]
    cast = np.array([gfloat.round_float(oracle, float(v) * scale, sat=True) / scale for v in exact])
    assert found.elements == len(exact)
    assert found.rms == pytest.approx(math.sqrt(np.mean(exact**2)), rel=1e-5)
    assert found.largest == np.abs(exact).max()
    assert found.flushed == pytest.approx(((cast == 0) & (exact != 0)).sum() / (exact != 0).sum(), abs=1e-7)
    assert found.saturated == pytest.approx((np.abs(exact * scale) > oracle.max).mean(), abs=1e-7)
    error = math.sqrt(np.sum((cast - exact) ** 2) / np.sum(exact**2))
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.snr_db == pytest.approx(-20 * math.log10(error), abs=1e-3)


def test_non_finite_elements_are_counted_and_change_nothing_else() -> None:
    t = spread(1, 100)
    clean, dirty = Accumulator(torch.float8_e4m3fn), Accumulator(torch.float8_e4m3fn)
    clean.add(torch.cat([t, torch.zeros(3)]))
    dirty.add(torch.cat([t, torch.tensor([math.inf, -math.inf, math.nan])]))
    expected, found = clean.result(), dirty.result()
    assert expected is not None
    assert found is not None
    assert (expected.non_finite, found.non_finite) == (0, 3)
    assert found.rms == expected.rms
    assert found.largest == expected.largest
    assert found.error == expected.error


def test_nothing_seen_and_all_zero() -> None:
    accumulator = Accumulator(torch.float8_e5m2)
    accumulator.add(torch.empty(0))
    assert accumulator.result() is None
    accumulator.add(torch.zeros(4))
    found = accumulator.result()
    assert found is not None
    assert (found.rms, found.largest, found.flushed, found.error) == (0, 0, 0, 0)
    assert found.snr_db == math.inf


def test_exponents_against_the_definition() -> None:
    t = torch.cat([spread(2), torch.tensor([math.inf, math.nan, 1e-38, 1.0, 2.0, 0.99999994])])
    exponents = ExponentHistogram.of(count_exponents(t))
    finite = [v for v in t.tolist() if v and math.isfinite(v)]
    expected = [min(max(math.frexp(v)[1] - 1, LOWEST), HIGHEST) for v in finite]
    assert exponents.first == min(expected) == LOWEST
    for position, number in enumerate(exponents.counts):
        assert number == expected.count(exponents.first + position)
    for share in (0.01, 0.5, 1.0):
        assert exponents.quantile(share) == sorted(expected)[math.ceil(share * len(expected)) - 1]
    assert ExponentHistogram.of(count_exponents(torch.zeros(3))).quantile(0.5) is None


# --- where it looks ---------------------------------------------------------------------------------------------------


class Everywhere(nn.Module):
    """A matmul of each kind, one weight used twice, and one product without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.linear(self.linear(x)).mT).mT
        x = x @ self.weight + torch.einsum("bld,de->ble", x, self.weight.t())
        return x @ x.mT


def test_every_parameter_matmul_is_seen_and_no_other() -> None:
    torch.manual_seed(0)
    module = Everywhere()
    found = observed(module, lambda m: m(torch.randn(2, 8, 8)).square().mean().backward())
    assert set(found) == {
        ("linear.weight", "linear"),
        ("conv.weight", "conv1d"),
        ("weight", "matmul"),
        ("weight", "einsum"),
    }
    both = found["linear.weight", "linear"]["x"].result()
    assert both is not None
    assert both.elements == 2 * 2 * 8 * 8


def test_operands_and_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    found = observed(module, lambda m: F.mse_loss(m(x), torch.ones(3, 4)).backward())

    hidden = module[0](x)
    output = module[2](hidden.tanh())
    hidden.retain_grad()
    output.retain_grad()
    F.mse_loss(output, torch.ones(3, 4)).backward()
    for key, tensors in {
        "0.weight": (x, module[0].weight, hidden.grad),
        "2.weight": (hidden.tanh(), module[2].weight, output.grad),
    }.items():
        for operand, tensor in zip(("x", "weight", "gradient"), tensors, strict=True):
            result = found[key, "linear"][operand].result()
            assert result is not None
            assert tensor is not None
            assert result.rms == pytest.approx(float(tensor.detach().double().square().mean().sqrt()), rel=1e-6)
            assert result.largest == float(tensor.detach().abs().max())


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-sdpa"])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_observing_changes_no_gradient(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    torch.manual_seed(0)
    model, batch = case.build(), case.batch(0)
    unit_scale(model, lambda m: case.loss(m, batch), storage=storage, verify=False)
    case.loss(model, batch).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    found = observed(model, lambda m: case.loss(m, batch).backward())
    assert found
    for value, parameter in zip(expected, model.parameters(), strict=True):
        assert value is None or torch.equal(value, parameter.grad)
    if storage == "unit":  # it sees what is stored, before the explicit factors
        weights = [operands["weight"].result() for (key, _), operands in found.items() if len(key.names) == 1]
        assert all(w is not None and w.rms == pytest.approx(1, rel=1e-5) for w in weights)
