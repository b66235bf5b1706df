"""The kernel of the fused cast without a GPU: its values in Triton's interpreter, and that it compiles for GPUs.

Triton decides at import whether it interprets, so `test_in_triton_s_interpreter` runs the others of this file in a
process of their own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gfloat
import pytest
import torch
from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_e5m2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_unitscale.formats import range_of
from lightning_unitscale.ops.cast_sums import cast_sums
from lightning_unitscale.ops.fp8_cast import fp8_cast, in_torch, triton_problem

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
ORACLES = {torch.float8_e4m3fn: format_info_ocp_e4m3, torch.float8_e5m2: format_info_ocp_e5m2}
pytestmark = pytest.mark.skipif(bool(triton_problem()), reason=triton_problem())
interpreted = pytest.mark.skipif(not INTERPRETS, reason="run by test_in_triton_s_interpreter")
each_dtype = pytest.mark.parametrize("dtype", ORACLES, ids=str)


@pytest.mark.skipif(INTERPRETS, reason="this is it")
def test_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    found = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    nan = one.float().isnan()
    bits, others = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(nan, other.float().isnan()) and bool(((bits == others) | nan).all())


@st.composite
def operands(draw: Any) -> Tensor:
    """Matrices with ragged sizes and strides, spread over the exponents, with NaN, infinity and zeros in them."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    height, width = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    step, order = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["rows", "columns"]))
    t = torch.randn(height, width * step, generator=generator)
    t *= torch.exp2(torch.randint(-20, 18, t.shape, generator=generator).float())
    for value in draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]), max_size=4)):
        t.view(-1)[torch.randint(t.numel(), (1,), generator=generator)] = value
    t = t.to(dtype)[:, ::step]
    return t if order == "rows" else t.t()


@interpreted
@each_dtype
@settings(max_examples=25, deadline=None)
@given(t=operands(), k=st.integers(-6, 6), alignment=st.sampled_from([1, 16]), layouts=st.integers(0, 3))
def test_as_in_torch_to_the_bit(dtype: torch.dtype, t: Tensor, k: int, alignment: int, layouts: int) -> None:
    options = bool(layouts & 1), bool(layouts & 2), alignment, True
    found = torch.ops.lightning_unitscale.fp8_cast(t, torch.tensor(2.0**k), dtype, *options)
    wanted = in_torch(t, torch.tensor(2.0**k), dtype, *options)
    assert all(same(one, other) for one, other in zip(found[:2], wanted[:2], strict=True))
    assert torch.allclose(found[2], wanted[2], rtol=1e-4)


@interpreted
@settings(max_examples=20, deadline=None)
@given(t=operands(), alignment=st.sampled_from([1, 16]), along=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_scales_of_rows_as_in_torch_to_the_bit(t: Tensor, alignment: int, along: tuple[int, int]) -> None:
    shapes = [(), (t.shape[0], 1), (1, t.shape[1])]
    one, other = (torch.exp2(torch.randint(-6, 7, shapes[dim]).float()) for dim in along)
    options = torch.float8_e4m3fn, True, True, alignment, False, other
    for found, wanted in zip(
        torch.ops.lightning_unitscale.fp8_cast(t, one, *options), in_torch(t, one, *options), strict=True
    ):
        assert same(found, wanted) or found.numel() == 0


@interpreted
@each_dtype
def test_midpoints_and_their_neighbours_as_in_gfloat(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    numbers = codes[codes.isfinite()].unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    values = torch.cat([numbers, middle, middle.nextafter(up), middle.nextafter(down)])
    beyond = range_of(dtype).largest * torch.tensor([1.02, 1.06, 1.1, -1.06, 1e6, math.inf, -math.inf])
    values = torch.cat([values, beyond])
    found = fp8_cast(values[None], torch.tensor(1.0), dtype)[0].float()[0]
    wanted = [gfloat.round_float(ORACLES[dtype], v, gfloat.RoundMode.TiesToEven, sat=True) for v in values.tolist()]
    assert found.tolist() == wanted


@interpreted
def test_empty_operands_and_float64_run_in_torch() -> None:
    for t in (torch.empty(0, 24), torch.empty(24, 0), torch.randn(3, 5).double()):
        for one, other in zip(
            fp8_cast(t, torch.tensor(1.0), torch.float8_e5m2, columns=True, alignment=16),
            in_torch(t, torch.tensor(1.0), torch.float8_e5m2, True, True, 16, False),
            strict=True,
        ):
            assert torch.equal(one.float(), other.float())


@interpreted
def test_sums_of_sizes_that_square_out_of_float32() -> None:
    """They are taken of the scaled numbers."""
    for size in (2.0**70, 2.0**-70):
        t = torch.randn(9, 33) * size
        scale = torch.tensor(1 / size)
        _, _, found = fp8_cast(t, scale, torch.float8_e4m3fn, rows=False, measured=True)
        wanted = cast_sums(t / size, torch.float8_e4m3fn, 1.0)
        powers = torch.tensor([2, 0, 0, 0, 2, 0, 4, 1])
        assert torch.allclose(found, wanted * torch.tensor(size).double() ** powers, rtol=1e-4)


@pytest.mark.skipif(INTERPRETS, reason="compiled or interpreted")
@pytest.mark.parametrize(("capability", "in_hardware"), [(80, False), (90, True)])
def test_it_compiles_for_a_gpu_without_one(
    capability: int, in_hardware: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code: what torch would do at the first call on an A100 or H100."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler, target = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from lightning_unitscale.ops import fp8_kernel

    constants = {**fp8_kernel.constants(torch.float8_e4m3fn), "IN_HARDWARE": in_hardware}
    constants |= {"ROWS": True, "COLUMNS": True, "MEASURED": True, "BLOCK": fp8_kernel.BLOCK}
    constants |= {"ALONG": 1, "COLUMNS_ALONG": 2, "TWO_SCALES": True}
    pointers = {
        "source": "*bf16",
        "scale": "*fp32",
        "column_scale": "*fp32",
        "rows": "*u8",
        "columns": "*u8",
        "sums": "*fp32",
    }
    types = {name: pointers.get(name, "i32") for name in fp8_kernel.cast_tile.arg_names}
    signature = {name: "constexpr" if name in constants else of_name for name, of_name in types.items()}
    source = compiler.ASTSource(fn=fp8_kernel.cast_tile, signature=signature, constexprs=constants)
    code = compiler.compile(source, target=target.GPUTarget("cuda", capability, 32)).asm
    assert code["cubin"]
    assert ("cvt.rn.satfinite.e4m3x2.f32" in code["ptx"]) == in_hardware
