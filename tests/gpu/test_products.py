"""The kernel and the three products on a GPU against the same on a CPU, where casts are torch's and products upcast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_unitscale import unit_scale
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.fp8_cast import in_torch
from lightning_unitscale.ops.products import GroupedProducts, MatrixProducts

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
ELEMENTWISE = [name for name, format in FORMATS.items() if not format.has_blocks]
SIZES = [(64, 32, 48), (5, 24, 7), (1, 17, 33), (0, 32, 16), (4096, 512, 384), (333, 1000, 77)]
SCALES = (2.0, 16.0, 1024.0, 0.375, 0.5, 1 / 16, 0.75 / 1024)  # factor 0.75


def spread(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers over all exponents of the formats, and what is none."""
    t = torch.randn(shape) * torch.exp2(torch.randint(-20, 18, shape).float())
    t.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    return t.to(dtype)


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_casts_are_those_of_the_cpu_to_the_bit(
    source: torch.dtype, dtype: torch.dtype, in_hardware: bool, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from lightning_unitscale.ops import fp8_kernel

    if in_hardware and not fp8_kernel.rounds_in_hardware(cuda):
        pytest.skip("this device has no such instruction")
    monkeypatch.setattr(fp8_kernel, "rounds_in_hardware", lambda device: in_hardware)
    scale, options = torch.tensor(0.25), (dtype, True, True, 16, True)
    for t in (spread((300, 1000), source), spread((77, 130), source).t(), spread((64, 300), source)[:, ::3]):
        found = [tensor.cpu() for tensor in fp8_kernel.run(t.to(cuda), scale.to(cuda), *options)]
        wanted = in_torch(t, scale, *options)
        for one, other in zip(found[:2], wanted[:2], strict=True):
            nan = other.float().isnan()
            assert torch.equal(one.float().isnan(), nan)
            assert torch.equal(one.view(torch.uint8)[~nan], other.view(torch.uint8)[~nan])
        assert torch.allclose(found[2], wanted[2], rtol=1e-3)


def products(
    operands: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype, format: str, autocast: bool = False
) -> tuple[Tensor, ...]:
    """The output and both gradients, in float64 on the CPU."""
    x, w, g = (t.to(device, dtype) for t in operands)
    x.requires_grad_()
    w.requires_grad_()
    scales = Scales(*(torch.tensor(number, device=device) for number in SCALES))
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = cast_product(x, w, MatrixProducts(), FORMATS[format], scales)
    found = (y.detach(), *torch.autograd.grad(y, (x, w), g.to(y.dtype)))
    assert {t.dtype for t in found[1:]} == {dtype}
    return tuple(t.double().cpu() for t in found)


@pytest.mark.parametrize("format", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_three_products(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, format: str, device: torch.device
) -> None:
    x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs) / 16, torch.randn(rows, outputs) / 1024
    operands = tuple(t.to(dtype) for t in (x, w.t().contiguous().t(), g.t().contiguous().t()))
    # Tensor cores may accumulate the forward product in about 14 bits; gradients are accumulated in float32.
    for name, one, other in zip(
        ("y", "gx", "gw"),
        products(operands, device, dtype, format),
        products(operands, torch.device("cpu"), torch.float32, format),
        strict=True,
    ):
        fast = name == "y" and format.startswith("fp8") and device.type == "cuda"
        tolerance = max(2.0**-9 if fast else 1e-5, torch.finfo(dtype).eps)
        assert one.shape == other.shape, name
        assert float((one - other).norm()) <= tolerance * float(other.norm()), name


def test_under_autocast(device: torch.device) -> None:
    operands = torch.randn(64, 128), torch.randn(48, 128) / 16, torch.randn(64, 48) / 1024
    found = products(operands, device, torch.float32, "fp8", autocast=True)
    wanted = products(operands, torch.device("cpu"), torch.float32, "fp8", autocast=True)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 2.0**-7 * float(other.norm())


def test_products_run_on_tensor_cores(fp8_cores: torch.device) -> None:
    """One kernel for each cast, and no copy to another layout."""
    pytest.importorskip("triton")
    operands = torch.randn(256, 512), torch.randn(384, 512), torch.randn(256, 384)
    products(operands, fp8_cores, torch.bfloat16, "fp8")  # compiles
    x, w, g = (t.to(fp8_cores, torch.bfloat16).requires_grad_() for t in operands)
    scales = Scales(*(torch.tensor(number, device=fp8_cores) for number in SCALES))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        cast_product(x, w, MatrixProducts(), FORMATS["fp8"], scales).backward(g.detach())
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages() for _ in range(event.count)]
    assert sum("cast_tile" in name for name in names) == 3, names
    assert not any("copy" in name.lower() for name in names), names


def test_bf16_products_accumulate_in_float32(cuda: torch.device) -> None:
    """2^13 terms of 1: a sum in bfloat16 stops at 256."""
    x, w = (torch.ones(16, 2**13, dtype=torch.bfloat16, device=cuda) for _ in range(2))
    one = Scales(*(torch.ones((), device=cuda) for _ in SCALES))
    for format in ELEMENTWISE:
        y = cast_product(x, w, MatrixProducts(), FORMATS[format], one)
        assert torch.equal(y, F.linear(x.float(), w.float()).to(y.dtype)), format


def test_cast_weights_are_never_stale_in_a_cuda_graph(fp8_cores: torch.device) -> None:
    """What is captured is the cast as well, not its result."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)).to(fp8_cores)
    x = torch.randn(32, 64, device=fp8_cores)
    unit_scale(layer, lambda m: m(x).square().mean(), "preserve", format="fp8")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y: Any = layer(x)
    with torch.no_grad():
        layer[0].weight.mul_(2)
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("format", ["fp8", "fp8_e4m3"])
def test_products_of_experts(format: str, device: torch.device) -> None:
    """Groups of any size, one of them empty."""
    ends = torch.tensor([37, 37, 200], dtype=torch.int32)
    x, w, g = torch.randn(200, 64), torch.randn(3, 64, 96) / 16, torch.randn(200, 96) / 1024

    def made(place: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.bfloat16().to(place, dtype).requires_grad_() for t in (x, w)]
        scales = Scales(*(torch.tensor(number, device=place) for number in SCALES))
        y = cast_product(*leaves, GroupedProducts(ends.to(place)), FORMATS[format], scales)
        found = (y.detach(), *torch.autograd.grad(y, leaves, g.bfloat16().to(place, dtype)))
        return tuple(t.double().cpu() for t in found)

    for one, other in zip(made(device, torch.bfloat16), made(torch.device("cpu"), torch.float32), strict=True):
        assert float((one - other).norm()) <= 2.0**-7 * float(other.norm())


def test_a_convolution_of_single_pixels(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 9, 7)

    def made(place: torch.device) -> Tensor:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(64, 48, 1)).to(place, memory_format=torch.channels_last)
        there = x.to(place, memory_format=torch.channels_last)
        unit_scale(model, lambda m: m(there).square().mean(), "preserve", format="fp8")
        return model(there).detach().double().cpu()

    one, other = made(device), made(torch.device("cpu"))
    assert float((one - other).norm()) <= 2.0**-8 * float(other.norm())
