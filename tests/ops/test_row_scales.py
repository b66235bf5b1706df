"""Rows with scales of their own, in the casts and in the three products: against float64, and by the rules of CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_unitscale.formats import FORMATS, cast, exponent, exponents
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.fp8_cast import fp8_cast
from lightning_unitscale.ops.products import MatrixProducts

FORMAT = FORMATS["fp8_rowwise"]
A = 0.75  # the site's factor


def powers(size: int) -> Tensor:
    return torch.exp2(torch.randint(-4, 5, (1, size)).float())


def vectors(inputs: int, outputs: int) -> Scales:
    x, gradient = torch.tensor(2.0), torch.tensor(1024.0)
    rows, x_columns, weight_columns, gradient_columns = (
        *(powers(outputs).t() * 16, powers(inputs)),
        *(powers(inputs) * 16, powers(outputs) * 1024),
    )
    return Scales(
        *(x, rows, gradient, A / x, 1 / x_columns, 1 / rows, A / gradient),
        *(x_columns, weight_columns, gradient_columns, 1 / weight_columns, A / gradient_columns),
    )


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, inputs), torch.randn(outputs, inputs) / 16, torch.randn(rows, outputs) / 1024


def products(x: Tensor, w: Tensor, g: Tensor, scales: Scales, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
    y = cast_product(leaves[0], leaves[1], MatrixProducts(), FORMAT, scales)
    return (y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype)))


SHAPES = pytest.mark.parametrize(("rows", "inputs", "outputs"), [(50, 40, 30), (1, 17, 33), (16, 32, 48), (0, 24, 7)])


@SHAPES
def test_three_products(rows: int, inputs: int, outputs: int) -> None:
    x, w, g = operands(rows, inputs, outputs)
    s = vectors(inputs, outputs)

    def rounded(t: Tensor, operand: str, which: int) -> Tensor:
        scale = s.of(operand)[which]
        return cast(t, FORMAT.numbers(operand), scale).double() / scale.double()

    x1, w1, g1 = (rounded(t, name, 0) for t, name in ((x, "x"), (w, "weight"), (g, "gradient")))
    x2, w2, g2 = (rounded(t, name, 1) for t, name in ((x, "x"), (w, "weight"), (g, "gradient")))
    wanted = (A * x1 @ w1.t(), A * g1 @ w2, A * g2.t() @ x2)
    for found, one in zip(products(x, w, g, s, torch.float32), wanted, strict=True):
        assert float((found - one).norm()) <= 1e-5 * float(one.norm())


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_tensor_cores_the_same(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU's own scaled_mm stands in for CUDA's."""
    x, w, g = operands(rows, inputs, outputs)
    s = vectors(inputs, outputs)
    upcast, used = products(x, w, g, s, dtype), set()
    scaled_mm = F.scaled_mm

    def spy(*arguments: Tensor, **options: object) -> Tensor:
        used.add(arguments[3])
        return scaled_mm(*arguments, **options)

    monkeypatch.setattr(F, "scaled_mm", spy)
    for module in ("multiply", "cast_for_products"):
        monkeypatch.setattr(f"lightning_unitscale.ops.{module}.has_tensor_cores", lambda device: True)
    for found, wanted in zip(products(x, w, g, s, dtype), upcast, strict=True):
        assert found.shape == wanted.shape
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max() if rows else 1))
    scaling = F.ScalingType.TensorWise if dtype == torch.float32 else F.ScalingType.RowWise
    assert used == ({scaling} if rows else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_are_those_that_cuda_takes(dtype: torch.dtype) -> None:
    """ "meta" has its rules."""
    with torch.device("meta"):
        x, weight = (torch.empty(n, 40, dtype=dtype, requires_grad=True) for n in (33, 30))
        s = vectors(40, 30).to("meta")
        y = cast_product(x, weight, MatrixProducts(), FORMAT, s)
        gx, gw = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    assert (y.shape, gx.shape, gw.shape) == ((33, 30), x.shape, weight.shape)


def test_an_outlier_row_costs_no_other_its_range() -> None:
    """One row of the weight, larger by 2^20: under one scale for the tensor the others are flushed to zero."""
    x, w, _ = operands(64, 32, 16)
    w[3] *= 2.0**20
    exact = x @ w.t()
    others = [i for i in range(16) if i != 3]

    def error(s: Scales, name: str) -> float:
        y = cast_product(x, w, MatrixProducts(), FORMATS[name], s)
        return float((y - exact)[:, others].norm() / exact[:, others].norm())

    def k_of(t: Tensor) -> Tensor:
        return torch.tensor(2.0 ** exponent(float(t.square().mean().sqrt()), float(t.abs().max()), torch.float8_e4m3fn))

    one, whole, rows = torch.tensor(1.0), k_of(w), torch.stack([k_of(row) for row in w])[:, None]
    assert error(Scales(one, whole, one, one, one, 1 / whole, one), "fp8") == 1.0
    columns = [torch.ones(1, n) for n in (32, 32, 16, 32, 16)]
    assert error(Scales(one, rows, one, one, torch.ones(1, 32), 1 / rows, one, *columns), "fp8_rowwise") < 0.05


@pytest.mark.parametrize("transposed", [False, True])
def test_two_scales_in_one_cast(transposed: bool) -> None:
    t = torch.randn(20, 33).t() if transposed else torch.randn(33, 20)
    rows, columns = powers(33).t(), powers(20)
    dtype = torch.float8_e4m3fn
    first, second, _ = fp8_cast(t, rows, dtype, columns=True, alignment=16, column_scale=columns)
    assert torch.equal(first[:33, :20].float(), (t * rows).to(dtype).float())
    assert torch.equal(second[:20, :33].float(), (t * columns).to(dtype).t().float())
    assert first.shape == (48, 32)
    assert first.float().count_nonzero() <= t.numel()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_exponents_of_rows_are_those_of_tensors(dtype: torch.dtype) -> None:
    rms = torch.exp2(torch.linspace(-30, 30, 61)) * torch.rand(61).add(0.5)
    largest = rms * torch.exp2(torch.linspace(0, 20, 61))
    wanted = [exponent(float(r), float(m), dtype) for r, m in zip(rms, largest, strict=True)]
    assert exponents(rms, largest, dtype, otherwise=7).tolist() == wanted
    assert exponents(torch.zeros(2), torch.zeros(2), dtype, otherwise=7).tolist() == [7, 7]
