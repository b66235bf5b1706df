"""mxfp8 and nvfp4 against gfloat, against torchao's reference, and in the three products of a layer."""

from __future__ import annotations

import math

import gfloat
import pytest
import torch
from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e4m3, format_info_ocp_e8m0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.block_formats import MXFP8, NVFP4, e2m1, rotated
from lightning_unitscale.formats import FORMATS, range_of
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.products import MatrixProducts
from lightning_unitscale.options import ATTENTION_FORMATS

NEAREST, UP = gfloat.RoundMode.TiesToEven, gfloat.RoundMode.TowardPositive
NUMBERS = {"mxfp8": MXFP8, "nvfp4": NVFP4}


def by_gfloat(block: list[float], name: str) -> list[float]:
    """One block, in Python's numbers."""
    largest = max(map(abs, block))
    if name == "mxfp8":
        elements = format_info_ocp_e4m3
        scale = gfloat.round_float(format_info_ocp_e8m0, largest / 448, UP, sat=True) if largest else 1.0
    else:
        elements = format_info_ocp_e2m1
        scale = gfloat.round_float(format_info_ocp_e4m3, min(max(largest / 6, 2.0**-6), 448.0), NEAREST, sat=True)
    return [gfloat.round_float(elements, value / scale, NEAREST, sat=True) * scale for value in block]


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(-6, 6))
def test_blocks_as_in_gfloat(name: str, data: st.DataObject, size: int) -> None:
    numbers = NUMBERS[name]
    # multiples of 2^-6, such that dividing them by a scale of four bits is near no tie that float32 could miss
    whole = st.lists(st.integers(-512, 512), min_size=numbers.size, max_size=numbers.size)
    block = [value * 2.0 ** (size - 6) for value in data.draw(whole)]
    found = numbers.rounded(torch.tensor(block)).tolist()
    wanted = by_gfloat(block, name)
    spacing = max(map(abs, block)) * 2.0**-3
    for value, one, other in zip(block, found, wanted, strict=True):
        if one != other:  # the quotient of float32 fell on a tie that the exact one is not
            assert abs(abs(value - one) - abs(value - other)) <= 1e-6 * spacing, (value, one, other)


def test_every_midpoint_of_e2m1() -> None:
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = [
        sign * v for sign in (1, -1) for a, b in zip(numbers, [*numbers[1:], 20], strict=True) for v in (a, (a + b) / 2)
    ]
    near = [math.nextafter(v, to) for v in values for to in (-math.inf, math.inf)]
    for value in (*values, *near):
        wanted = gfloat.round_float(format_info_ocp_e2m1, value, NEAREST, sat=True)
        assert float(e2m1(torch.tensor(value, dtype=torch.float64))) == wanted, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_torchao_s_reference(dtype: torch.dtype) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    fp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    torch.manual_seed(0)
    t = (torch.randn(64, 128) * torch.exp2(torch.randint(-10, 8, (64, 128)).float())).to(dtype)
    t[0, :32], t[1, :32], t[2, 0] = 0, 448, -896
    scales, elements = mx.to_mx(t, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
    powers = torch.exp2(scales.view(torch.uint8).float() - 127).repeat_interleave(32, -1)
    assert torch.equal(MXFP8.rounded(t.float()), elements.float() * powers)
    scales, packed = fp4.nvfp4_quantize(t)
    elements = kernels.f4_unpacked_to_f32(kernels.unpack_uint4(packed))
    assert torch.equal(NVFP4.rounded(t.float()), elements * scales.float().repeat_interleave(16, -1))


@pytest.mark.parametrize("name", NUMBERS)
def test_ragged_blocks_and_other_dimensions(name: str) -> None:
    numbers = NUMBERS[name]
    t = torch.randn(40, 70)
    padded = nn.functional.pad(t, (0, 96 - 70))
    assert torch.equal(numbers.rounded(t), numbers.rounded(padded)[:, :70])
    assert torch.equal(numbers.rounded(t.t(), 0), numbers.rounded(t).t())
    assert numbers.rounded(torch.empty(0, 70)).shape == (0, 70)
    assert numbers.rounded(torch.zeros(3, 5)).count_nonzero() == 0
    t[3, 4] = math.nan
    assert numbers.rounded(t)[3, 0].isnan()  # of the same block
    limits = range_of(numbers)
    extremes = torch.tensor([min(limits.largest, 3e38), limits.normal, limits.subnormal]).double()
    if name == "nvfp4":
        for value in extremes.float():
            assert numbers.rounded(value[None])[0] == value
        assert numbers.rounded(extremes[2:].float() * 0.4)[0] == 0


def test_squares_are_the_same_seen_from_both_sides() -> None:
    w = torch.randn(40, 70)
    assert torch.equal(NVFP4.rounded_in_squares(w).t(), NVFP4.rounded_in_squares(w.t()))
    block = NVFP4.rounded_in_squares(w)[:16, :16]
    assert torch.equal(block.flatten(), e2m1(w[:16, :16].flatten() / _scale(w[:16, :16])) * _scale(w[:16, :16]))


def _scale(block: Tensor) -> Tensor:
    return (block.abs().max() / 6).to(torch.float8_e4m3fn).float()


def test_rounding_at_random_is_right_on_average() -> None:
    torch.manual_seed(0)
    t = torch.randn(16)
    t[0] = 6 * 0.375  # the largest, and its sixth is a number of e4m3: else the largest saturates, or could be larger
    mean = torch.stack([NVFP4.rounded_at_random(t) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, t, atol=4 * 0.375 / 4000**0.5)
    assert not torch.allclose(NVFP4.rounded(t), t, atol=0.02)
    assert torch.equal(MXFP8.rounded_at_random(t), MXFP8.rounded(t))  # whose paper rounds to the nearest


def test_rotating_both_sides_leaves_a_product() -> None:
    x, g = torch.randn(70, 5).double(), torch.randn(70, 3).double()
    assert torch.allclose(rotated(g).t() @ rotated(x), g.t() @ x)
    outlier = torch.zeros(16, 1)
    outlier[3] = 16.0
    assert torch.equal(rotated(outlier).abs(), torch.full((16, 1), 4.0))


@pytest.mark.parametrize("name", NUMBERS)
def test_three_products(name: str) -> None:
    """Each rounds blocks along what it sums over; with a seed, also those that are rounded at random."""
    numbers, sx, sw, sg, a = NUMBERS[name], 2.0, 16.0, 1024.0, 0.75
    x, w, g = torch.randn(50, 40), torch.randn(30, 40) / 16, torch.randn(50, 30) / 1024
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    scales = Scales(*(torch.tensor(n) for n in (sx, sw, sg, a / sx, 1 / sx, 1 / sw, a / sg)))
    y = cast_product(*leaves, MatrixProducts(), FORMATS[name], scales)
    torch.manual_seed(5)
    found = (y.detach(), *torch.autograd.grad(y, leaves, g))
    torch.manual_seed(5)
    x, w, g = (t.double() for t in (x * sx, w * sw, g * sg))

    def rounded(t: Tensor, dim: int) -> Tensor:
        return numbers.rounded(t.float(), dim).double()

    if name == "mxfp8":
        rows, columns = [rounded(t, 1) for t in (x, w, g)], [rounded(t, 0) for t in (x, w, g)]
    else:
        square = NVFP4.rounded_in_squares(w.float()).double()
        at_random = [NVFP4.rounded_at_random(t.float(), dim).double() for t, dim in ((g, 1), (rotated(g.float()), 0))]
        rows = [rounded(x, 1), square, at_random[0]]
        columns = [rounded(rotated(x.float()), 0), square, at_random[1]]
    wanted = (
        rows[0] @ rows[1].t() * a / (sx * sw),
        rows[2] @ columns[1] * a / (sg * sw),
        columns[2].t() @ columns[0] * a / (sg * sx),
    )
    for what, one, other in zip(("y", "gx", "gw"), found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5, what


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_a_model_learns_and_says_what_it_leaves_out(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    x, target = torch.randn(64, 3, 8), torch.randn(64, 16)

    def loss(m: nn.Module) -> Tensor:
        return (m(x) - target).square().mean()

    plan = unit_scale(model, loss, "preserve", format=name)
    reasons = {site.params[0]: site.format_reason for site in plan.sites if site.op in ("linear", "conv1d")}
    assert "blocks lie along what a product sums over" in reasons["0.weight"]
    assert not reasons["2.weight"]
    assert {site.params[0] for site in plan.cast_sites} == {"2.weight", "4.weight"}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = float(loss(model).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model).detach()) < 0.3 * first


@pytest.mark.parametrize("name", NUMBERS)
def test_attention_s_own_products_have_no_blocks(name: str) -> None:
    assert name not in ATTENTION_FORMATS
    with pytest.raises(UnitScalingError, match=rf"attention_format='{name}' is not known; choose one of 'fp8'"):
        unit_scale(nn.Linear(2, 2), lambda m: m, overrides={"*": {"attention_format": name}})
