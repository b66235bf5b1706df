"""mxfp8 and nvfp4 against gfloat, against torchao's reference, and in the three products of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gfloat
import pytest
import torch
import torch.nn.functional as F
from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e4m3, format_info_ocp_e8m0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.block_formats import MXFP8, NVFP4, e2m1, in_groups, rotated
from lightning_unitscale.formats import FORMATS, range_of
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.products import EinsumProducts, GroupedProducts, MatrixProducts, Products
from lightning_unitscale.ops.torch_functions import short_name
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


def test_groups_of_rows_share_no_block() -> None:
    rows, ends = torch.randn(75, 3), torch.tensor([20, 20, 55, 71], dtype=torch.int32)
    found = in_groups(rows, ends, 16, lambda t: NVFP4.rounded(t, 0))
    parts = [NVFP4.rounded(part, 0) for part in rows.split([20, 0, 35, 16, 4]) if len(part)]
    assert torch.equal(found, torch.cat(parts))
    assert in_groups(rows[:0], torch.zeros(2, dtype=torch.int32), 16, lambda t: t).shape == (0, 3)


def of_call(function: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: Any) -> Products:
    call = FunctionCall(function, (x, weight) if options.pop("x_first", True) else (weight, x), options)
    return MATMULS[short_name(function)].products(call, x, weight)


# a function, shapes of x and of the weight; what x, the weight and the gradient sum over in their two products
ENDS = torch.tensor([3, 3, 40], dtype=torch.int32)
CALLS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[int], list[int], Any, list[tuple[int, int]]]] = {
    "conv2d": (
        lambda x, w: F.conv2d(x, w, padding=1, stride=2), [2, 40, 7, 9], [24, 40, 3, 3],
        lambda x, w: of_call(F.conv2d, x, w, padding=1, stride=2), [(1, 3), (1, 0), (1, 3)],
    ),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2), [2, 40, 9], [40, 24, 3],
        lambda x, w: of_call(F.conv_transpose1d, x, w, stride=2), [(1, 2), (0, 1), (1, 2)],
    ),
    "experts, batched": (
        torch.bmm, [3, 20, 40], [3, 40, 24],
        lambda x, w: of_call(torch.bmm, x, w), [(2, 1), (1, 2), (2, 1)],
    ),
    "weight first": (
        lambda x, w: w @ x, [3, 40, 20], [24, 40],
        lambda x, w: of_call(torch.matmul, x, w, x_first=False), [(1, 2), (1, 0), (1, 2)],
    ),
    "einsum": (
        lambda x, w: torch.einsum("bnhd,hdo->bno", x, w), [2, 5, 3, 40], [3, 40, 24],
        lambda x, w: EinsumProducts("bnhd", "hdo", "bno"), [(3, 1), (1, 2), (2, 1)],
    ),
    "experts, grouped": (
        lambda x, w: torch.cat([x[:3] @ w[0], x[3:3] @ w[1], x[3:] @ w[2]]), [40, 40], [3, 40, 24],
        lambda x, w: GroupedProducts(ENDS), [(1, 0), (1, 2), (1, 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", CALLS)
def test_products_of_other_kinds(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd of torch's own function, of operands that are rounded along what each product sums over."""
    function, x_shape, weight_shape, products_of, dims = CALLS[kind]
    numbers, (sx, sw, sg, a) = NUMBERS[name], (2.0, 16.0, 1024.0, 0.75)
    monkeypatch.setattr(type(numbers), "rounded_at_random", type(numbers).rounded)
    monkeypatch.setattr("lightning_unitscale.ops.cast_for_products.rotated", lambda t, dim: t)  # no change but rounding
    x, w = torch.randn(x_shape), torch.randn(weight_shape) / 16
    g = torch.randn_like(function(x, w)) / 1024
    products = products_of(x, w)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    scales = Scales(*(torch.tensor(n) for n in (sx, sw, sg, a / sx, 1 / sx, 1 / sw, a / sg)))
    y = cast_product(*leaves, products, FORMATS[name], scales)
    found = (y.detach(), *torch.autograd.grad(y, leaves, g))

    def rounded(t: Tensor, scale: float, dims: tuple[int, int], which: int) -> Tensor:
        if name == "nvfp4" and t is w:
            matrices = (t * scale).movedim(dims, (-2, -1))
            flat = [NVFP4.rounded_in_squares(m) for m in matrices.reshape(-1, *matrices.shape[-2:])]
            whole = torch.stack(flat).view(matrices.shape).movedim((-2, -1), dims)
        elif kind == "experts, grouped" and which == 1 and t is not w:
            whole = torch.cat([numbers.rounded(part, 0) for part in (t * scale).split([3, 37])])
        else:
            whole = numbers.rounded(t * scale, dims[which])
        return (whole / scale).double().requires_grad_()

    first, second = (
        [rounded(t, s, d, i) for t, s, d in zip((x, w, g), (sx, sw, sg), dims, strict=True)] for i in (0, 1)
    )
    x_leaf, w_leaf = x.double().requires_grad_(), w.double().requires_grad_()
    wanted = (
        a * function(first[0], first[1]).detach(),
        a * torch.autograd.grad(function(x_leaf, second[1]), x_leaf, first[2])[0],
        a * torch.autograd.grad(function(second[0], w_leaf), w_leaf, second[2])[0],
    )
    for what, one, other in zip(("y", "gx", "gw"), found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5, what


def test_rotating_a_dimension_of_a_batch() -> None:
    x, g = torch.randn(3, 20, 5).double(), torch.randn(3, 20, 4).double()
    assert torch.allclose(rotated(g, -2).mT @ rotated(x, -2), g.mT @ x)
    assert torch.equal(rotated(x, -2)[1], rotated(x[1]))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_a_model_learns_and_says_what_it_leaves_out(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(6, 8, 1, groups=2), nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)
    )
    x, target = torch.randn(64, 6, 8), torch.randn(64, 16)

    def loss(m: nn.Module) -> Tensor:
        return (m(x) - target).square().mean()

    plan = unit_scale(model, loss, "preserve", format=name)
    reasons = {site.params[0]: site.format_reason for site in plan.sites if site.op in ("linear", "conv1d")}
    assert "each group of its channels would need blocks of its own" in reasons["0.weight"]
    assert ("paper keeps weights of the role readout" in reasons["5.weight"]) == (name == "nvfp4")
    cast = {"1.weight", "3.weight"} | ({"5.weight"} if name == "mxfp8" else set())
    assert {site.params[0] for site in plan.cast_sites} == cast
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = float(loss(model).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model).detach()) < 0.3 * first


def test_an_override_casts_what_the_paper_keeps() -> None:
    model, x = nn.Linear(32, 32), torch.randn(64, 32)
    plan = unit_scale(
        model, lambda m: m(x).square().mean(), "preserve", format="nvfp4", overrides={"weight": {"format": "nvfp4"}}
    )
    assert [site.params[0] for site in plan.cast_sites] == ["weight"]


def test_a_product_that_sums_over_nothing_has_no_blocks() -> None:
    assert "sums over nothing" in EinsumProducts("bd", "hd", "bhd").no_blocks
    assert EinsumProducts("bhd", "hdo", "bo").no_blocks == ""


@pytest.mark.parametrize("name", NUMBERS)
def test_attention_s_own_products_have_no_blocks(name: str) -> None:
    assert name not in ATTENTION_FORMATS
    with pytest.raises(UnitScalingError, match=rf"attention_format='{name}' is not known; choose one of 'fp8'"):
        unit_scale(nn.Linear(2, 2), lambda m: m, overrides={"*": {"attention_format": name}})
