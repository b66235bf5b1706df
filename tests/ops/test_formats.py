"""Casts to narrow formats against gfloat, an independent model of the OCP and IEEE formats."""

import math
from fractions import Fraction

import gfloat
import pytest
import torch
from gfloat.formats import format_info_bfloat16, format_info_binary16, format_info_ocp_e4m3, format_info_ocp_e5m2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_unitscale.formats import FORMATS, OPERANDS, ROOM_FOR_OUTLIERS, cast, exponent, range_of, supports

ORACLES = {
    torch.float8_e4m3fn: format_info_ocp_e4m3,
    torch.float8_e5m2: format_info_ocp_e5m2,
    torch.float16: format_info_binary16,
    torch.bfloat16: format_info_bfloat16,
}
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", ORACLES, ids=str)


def expected(value: float, dtype: torch.dtype) -> float:
    """Rounded to nearest, ties to even, saturating."""
    oracle = ORACLES[dtype]
    return gfloat.round_float(oracle, value, gfloat.RoundMode.TiesToEven, sat=True)


def as_floats(tensor: Tensor) -> list[float]:
    return [float(value) for value in tensor.double()]


def same(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or (
        left == right and math.copysign(1, left) == math.copysign(1, right)
    )


def every_number_of(dtype: torch.dtype) -> Tensor:
    """All the finite numbers that the dtype has."""
    codes = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    codes = codes.to(torch.uint8) if dtype.itemsize == 1 else (codes - 2**15).to(torch.int16)
    values = codes.view(dtype).double()
    return values[values.isfinite()].unique()


@each_dtype
def test_every_number_stays_itself(dtype: torch.dtype) -> None:
    values = every_number_of(dtype).float()
    assert torch.equal(cast(values, dtype).float(), values)


@pytest.mark.parametrize("dtype", NARROW[:2], ids=str)
def test_midpoints_and_their_neighbours(dtype: torch.dtype) -> None:
    numbers = every_number_of(dtype).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    values = torch.cat([middle, middle.nextafter(up), middle.nextafter(down)])
    found = as_floats(cast(values, dtype))
    assert all(same(f, expected(v, dtype)) for f, v in zip(found, values.tolist(), strict=True))


@each_dtype
@settings(max_examples=150, deadline=None)
@given(value=st.floats(width=32), k=st.integers(-12, 12))
@example(value=math.nan, k=0)
@example(value=math.inf, k=0)
@example(value=-math.inf, k=3)
@example(value=-0.0, k=0)
def test_any_number(dtype: torch.dtype, value: float, k: int) -> None:
    scaled = torch.tensor(value) * 2.0**k
    if dtype == torch.bfloat16 and scaled.abs() > range_of(dtype).largest:
        return  # its range is float32's, and what float32 can't hold stays infinite
    for scale in (2.0**k, torch.tensor(2.0**k)):
        (found,) = as_floats(cast(torch.tensor([value]), dtype, scale))
        assert same(found, expected(float(scaled), dtype))


@pytest.mark.parametrize("source", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=100, deadline=None)
@given(value=st.floats(-60_000, 60_000, width=16), k=st.integers(-24, 24))
def test_from_other_dtypes(dtype: torch.dtype, source: torch.dtype, value: float, k: int) -> None:
    """The scale is exact whatever the operand's own dtype, though 2^24 is no number of float16."""
    operand = torch.tensor([value], dtype=source)
    wanted = expected(float(operand) * 2.0**k, dtype)
    (found,) = as_floats(cast(operand, dtype, torch.tensor(2.0**k)))
    assert same(found, wanted), (value, k)


@each_dtype
def test_ranges(dtype: torch.dtype) -> None:
    oracle, found = ORACLES[dtype], range_of(dtype)
    assert (found.largest, found.normal, found.subnormal) == (
        oracle.max,
        oracle.smallest_normal,
        oracle.smallest_subnormal,
    )
    half = Fraction(found.subnormal) / 2
    if dtype != torch.bfloat16:  # float32's own subnormals may be flushed
        assert float(cast(torch.tensor([float(half)]), dtype).double()) == 0
        assert float(cast(torch.tensor([float(half * Fraction(9, 8))]), dtype).double()) == found.subnormal
        assert float(cast(torch.tensor([found.largest * 2]), dtype).double()) == found.largest


def test_the_formats() -> None:
    assert [FORMATS["fp8"].numbers(operand) for operand in OPERANDS] == [*[torch.float8_e4m3fn] * 2, torch.float8_e5m2]
    assert FORMATS["fp8"].dtypes == [torch.float8_e4m3fn, torch.float8_e5m2]
    assert FORMATS["bf16"].dtypes == [torch.bfloat16]
    assert FORMATS["fp16"].dtypes == [torch.float16]


@each_dtype
@settings(max_examples=150, deadline=None)
@given(rms=st.floats(1e-18, 1e15), spread=st.floats(1.0, 1e6))
def test_exponent(dtype: torch.dtype, rms: float, spread: float) -> None:
    k = exponent(rms, rms * spread, dtype)
    scaled, fits = rms * 2.0**k, rms * spread * 2.0**k <= range_of(dtype).largest
    assert scaled <= math.sqrt(2) * (1 + 1e-12)
    assert scaled >= math.sqrt(0.5) * 2.0**-ROOM_FOR_OUTLIERS * (1 - 1e-12)
    if scaled < math.sqrt(0.5) * (
        1 - 1e-12
    ):  # smaller than 1 for the sake of the largest, and no smaller than that needs
        assert rms * spread * 2.0 ** (k + 1) > range_of(dtype).largest
    assert fits or scaled <= math.sqrt(2) * 2.0**-ROOM_FOR_OUTLIERS * (1 + 1e-12)


def test_exponent_of_nothing() -> None:
    assert [exponent(rms, 1.0, torch.float16) for rms in (0.0, math.nan, math.inf)] == [0, 0, 0]
    assert exponent(4.0, math.inf, torch.float16) == exponent(4.0, 0.0, torch.float16) == -2


@pytest.mark.parametrize(
    ("dtype", "octaves", "error"), [(torch.float8_e4m3fn, (-4, 6), 0.027), (torch.float8_e5m2, (-12, 10), 0.053)]
)
def test_a_power_of_two_off_costs_nothing(dtype: torch.dtype, octaves: tuple[int, int], error: float) -> None:
    """The flat part of the curves that the module's docstring speaks of."""
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for k in range(octaves[0], octaves[1] + 1):
        scaled = normal * 2.0**k
        assert float((cast(scaled, dtype).float() - scaled).norm() / scaled.norm()) == pytest.approx(error, abs=0.002)


@pytest.mark.parametrize(
    ("dtype", "shift", "most", "loss"),
    [(torch.float8_e5m2, 0.065, 0.16, 3.7e-4), (torch.float8_e4m3fn, 0.033, 0.08, 0.9e-4)],
)
def test_rounding_moves_what_a_softmax_settles_at(dtype: torch.dtype, shift: float, most: float, loss: float) -> None:
    """What a cast readout costs at any scale: p - y averages 0 over y where p is right, its rounded values do not."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    of_one, of_zero = (cast(g, dtype, 16.0).double() / 16 for g in (p - 1, p))
    variance = p * (1 - p)
    shifts = (p * of_one + (1 - p) * of_zero) / variance
    assert float(shifts.square().mean().sqrt()) == pytest.approx(shift, rel=0.02)
    assert float(shifts.abs().max()) == pytest.approx(most, rel=0.05)
    assert float((shifts.square() * variance / 2).mean()) == pytest.approx(loss, rel=0.05)


def test_supports() -> None:
    assert all(supports(dtype, torch.device("cpu")) for dtype in ORACLES)
