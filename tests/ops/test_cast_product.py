"""The three products of cast operands against torch's own autograd on the same operands in float64."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.formats import FORMATS, OPERANDS, Format, cast
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.multiply import Cast
from lightning_unitscale.ops.multiply_groups import multiplies_groups
from lightning_unitscale.ops.products import ConvolutionProducts, MatrixProducts
from lightning_unitscale.ops.torch_functions import short_name

SCALES = {"x": 2.0, "weight": 16.0, "gradient": 1024.0}
FACTOR = 0.75
ENDS = torch.tensor([3, 3, 8], dtype=torch.int32)  # of three groups of rows, one of them empty
FP8 = FORMATS["fp8"]
ELEMENTWISE = [name for name, format in FORMATS.items() if not format.has_blocks]


def scales(factor: float = FACTOR, **powers: float) -> Scales:
    x, weight, gradient = ({**SCALES, **powers}[operand] for operand in OPERANDS)
    numbers = (x, weight, gradient, factor / x, 1 / x, 1 / weight, factor / gradient)
    return Scales(*(torch.tensor(number, dtype=torch.float32) for number in numbers))


def rounded(tensor: Tensor, format: Format, operand: str) -> Tensor:
    """What the cast leaves of an operand, in float64."""
    return cast(tensor.detach(), format.numbers(operand), SCALES[operand]).double() / SCALES[operand]


class Call:
    """A torch function of x, w and other arguments, as a model would call it."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        x: tuple[int, ...],
        weight: tuple[int, ...],
        arguments: Callable[[Tensor, Tensor], tuple[Any, ...]] = lambda x, w: (x, w),
        **kwargs: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.function, self.arguments, self.kwargs = function, arguments, kwargs
        self.x = torch.randn(x, generator=generator)
        self.weight = torch.randn(weight, generator=generator) * 0.1

    def plain(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        args = [a.to(dtype) if _is_float(a) else a for a in self.arguments(x, weight)]
        kwargs = {name: a.to(dtype) if _is_float(a) else a for name, a in self.kwargs.items()}
        return self.function(*args, **kwargs)

    def cast(self, x: Tensor, weight: Tensor, format: Format = FP8, bias_factor: float = 1.0) -> Tensor:
        op = MATMULS[short_name(self.function)]
        call = FunctionCall(self.function, self.arguments(x, weight), self.kwargs)

        def is_weight(operand: Any) -> bool:
            return operand is weight or (isinstance(operand, Tensor) and operand._base is weight)

        operands = op.cast_operands(call, is_weight)
        assert operands is not None
        own_x, own_weight = operands

        def casting(x: Tensor, weight: Tensor, products: Any) -> Tensor:
            return cast_product(x, weight, products, format, scales())

        return op.cast(call, own_x, own_weight, casting, bias_factor)


def _is_float(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def bias(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


CALLS: dict[str, Call] = {
    "linear": Call(F.linear, (2, 5, 24), (7, 24)),
    "linear-vector": Call(F.linear, (24,), (7, 24)),
    "linear-bias": Call(F.linear, (2, 5, 24), (7, 24), bias=bias(7)),
    "linear-empty": Call(F.linear, (0, 24), (7, 24)),
    "addmm": Call(torch.addmm, (5, 24), (24, 7), lambda x, w: (bias(7), x, w)),
    "addmm-alpha": Call(torch.addmm, (5, 24), (24, 7), lambda x, w: (bias(5, 7), x, w), alpha=0.5, beta=3),
    "addmm-left": Call(torch.addmm, (24, 5), (7, 24), lambda x, w: (bias(7, 1), w, x)),
    "baddbmm": Call(torch.baddbmm, (3, 5, 8), (3, 8, 4), lambda x, w: (bias(3, 1, 4), x, w), beta=2),
    "matmul": Call(torch.matmul, (2, 5, 24), (24, 7)),
    "matmul-vector": Call(torch.matmul, (24,), (24, 7)),
    "matmul-transposed": Call(torch.matmul, (2, 5, 24), (7, 24), lambda x, w: (x, w.t())),
    "operator": Call(Tensor.__matmul__, (5, 24), (24, 7)),
    "operator-right": Call(Tensor.__rmatmul__, (5, 24), (24, 7), lambda x, w: (w, x)),
    "matmul-left": Call(torch.matmul, (2, 24, 5), (7, 24), lambda x, w: (w, x)),
    "matmul-left-matrix": Call(torch.matmul, (24, 5), (7, 24), lambda x, w: (w, x)),
    "mm": Call(torch.mm, (5, 24), (24, 7)),
    "bmm": Call(torch.bmm, (3, 5, 8), (3, 8, 4)),
    "bmm-left": Call(torch.bmm, (3, 8, 5), (3, 4, 8), lambda x, w: (w, x)),
    "matmul-stacked": Call(torch.matmul, (2, 1, 5, 8), (3, 8, 4)),
    "matmul-stacked-matrix": Call(torch.matmul, (5, 8), (3, 8, 4)),
    "inner": Call(torch.inner, (2, 5, 24), (7, 24)),
    "einsum": Call(torch.einsum, (2, 5, 3, 4), (3, 4, 6), lambda x, w: ("b t h d, h d o -> b t o", x, w)),
    "einsum-left": Call(torch.einsum, (2, 5, 6), (6, 3, 4), lambda x, w: ("dhk,btd->bhtk", w, x)),
    "einsum-list": Call(torch.einsum, (2, 5), (5, 3), lambda x, w: ("bi,io->ob", [x, w])),
    "einsum-elementwise": Call(torch.einsum, (2, 5), (5, 3), lambda x, w: ("bi,io->bio", x, w)),
    "einsum-vector": Call(torch.einsum, (2, 5), (5,), lambda x, w: ("bi,i->b", x, w)),
    "conv1d": Call(F.conv1d, (2, 4, 9), (6, 4, 3), bias=bias(6)),
    "conv2d": Call(F.conv2d, (2, 4, 9, 8), (6, 2, 3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    "conv2d-positional": Call(F.conv2d, (2, 4, 9, 8), (6, 4, 3, 3), lambda x, w: (x, w, bias(6), 2, 1, 1, 1)),
    "conv2d-same": Call(F.conv2d, (2, 4, 9, 8), (6, 4, 3, 5), padding="same", dilation=2),
    "conv2d-valid": Call(F.conv2d, (2, 4, 9, 8), (6, 4, 3, 5), padding="valid"),
    "conv2d-depthwise": Call(F.conv2d, (2, 4, 9, 8), (4, 1, 3, 3), groups=4),
    "conv2d-unbatched": Call(F.conv2d, (4, 9, 8), (6, 4, 3, 3), bias=bias(6)),
    "conv3d": Call(F.conv3d, (1, 2, 5, 4, 4), (3, 2, 2, 2, 2), padding=1),
    "conv_transpose1d": Call(F.conv_transpose1d, (2, 4, 5), (4, 3, 3), stride=2, output_padding=1, bias=bias(3)),
    "conv_transpose2d": Call(F.conv_transpose2d, (2, 4, 5, 5), (4, 3, 3, 3), stride=2, padding=1, groups=2),
    "conv_transpose3d": Call(F.conv_transpose3d, (1, 2, 3, 3, 3), (2, 3, 2, 2, 2), dilation=2),
    "grouped": Call(torch._grouped_mm, (8, 16), (3, 16, 8), offs=ENDS),
}
GROUPED = {"grouped"}  # has no float64 kernel
each_call = pytest.mark.parametrize("name", CALLS)


def reference(call: Call, format: Format, gradient: Tensor) -> tuple[Tensor, ...]:
    """The output with its bias, and both gradients, by autograd in float64 (float32 where there is no kernel)."""
    dtype = torch.float32 if call.function is torch._grouped_mm else torch.float64
    x = rounded(call.x, format, "x").to(dtype).requires_grad_()
    weight = rounded(call.weight, format, "weight").to(dtype).requires_grad_()
    y = call.plain(x, weight, dtype)
    zero = call.plain(torch.zeros_like(x), torch.zeros_like(weight), dtype).detach()  # the bias, if there is one
    alpha = call.kwargs.get("alpha", 1)  # comes before the cast
    g = rounded(gradient * alpha, format, "gradient").to(dtype) / alpha
    gx, gw = torch.autograd.grad(y, (x, weight), g)
    return (y.detach() - zero) * FACTOR + zero, gx * FACTOR, gw * FACTOR


def ours(call: Call, format: Format, gradient: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, weight = (operand.to(dtype, copy=True).requires_grad_() for operand in (call.x, call.weight))
    y = call.cast(x, weight, format)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), gradient.to(dtype)))


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for what, one, other in zip(("output", "gradient of x", "gradient of w"), found, wanted, strict=True):
        assert one.shape == other.shape, what
        assert float((one.double() - other.double()).norm()) <= tolerance * float(other.norm()), what


def gradient_of(call: Call) -> Tensor:
    """Of the size that the gradient's scale is for."""
    y = call.plain(call.x, call.weight, torch.float32)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) / SCALES["gradient"]


@each_call
@pytest.mark.parametrize("format", ELEMENTWISE)
def test_three_products(name: str, format: str) -> None:
    call = CALLS[name]
    gradient = gradient_of(call)
    wanted = reference(call, FORMATS[format], gradient)
    assert_close(ours(call, FORMATS[format], gradient), wanted, 1e-5)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in GROUPED])
def test_three_products_of_double_operands(name: str) -> None:
    """Nothing but the cast loses anything."""
    call = CALLS[name]
    gradient = gradient_of(call)
    assert_close(ours(call, FP8, gradient, torch.float64), reference(call, FP8, gradient), 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear-bias", "matmul-left", "einsum", "conv2d"])
def test_results_and_gradients_keep_the_dtype(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    gradient = gradient_of(call).to(dtype)
    found = ours(call, FP8, gradient, dtype)
    assert {tensor.dtype for tensor in found} == {dtype}
    narrow = Call(call.function, (1,), (1,), call.arguments, **call.kwargs)
    narrow.x, narrow.weight = call.x.to(dtype), call.weight.to(dtype)
    assert_close(found, reference(narrow, FP8, gradient), 2.0 * torch.finfo(dtype).eps)


def test_no_overflow_on_the_way_in_float16() -> None:
    """The output, 64, fits; that of the scaled operands, 2^18, does not."""
    x, weight = torch.full((1, 4096), 2.0**-10, dtype=torch.float16), torch.full((2, 4096), 16.0, dtype=torch.float16)
    for format, size in (("fp8", 2.0**12), ("fp16", 2.0**12), ("bf16", 2.0**12)):
        y = cast_product(x, weight, MatrixProducts(), FORMATS[format], scales(1.0, x=size, weight=1.0))
        assert torch.equal(y, F.linear(x, weight)), format


def test_large_gradients_saturate() -> None:
    x, weight = (torch.eye(16).requires_grad_() for _ in range(2))
    for format, largest in (("fp8", 57344.0), ("fp16", 65504.0)):
        y = cast_product(x, weight, MatrixProducts(), FORMATS[format], scales(1.0, x=1.0, weight=1.0, gradient=1.0))
        for g in (1e6, float("inf")):
            gradients = torch.autograd.grad(y, (x, weight), torch.diag(torch.full((16,), g)), retain_graph=True)
            assert all(torch.equal(gradient, torch.eye(16) * largest) for gradient in gradients)


def test_autocast_as_torch_does_it() -> None:
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    for wide in (torch.float32, torch.float64):
        a, w = x.to(wide), weight.to(wide)
        with torch.autocast("cpu", torch.bfloat16):
            plain = F.linear(a, w)
            y = cast_product(a, w, MatrixProducts(), FP8, scales())
        assert y.dtype == plain.dtype
        gradients = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        wanted = F.linear(rounded(x, FP8, "x"), rounded(weight, FP8, "weight")) * FACTOR
        assert torch.allclose(y.double(), wanted, rtol=2**-7, atol=2**-7)


def test_second_derivatives_are_refused() -> None:
    """A gradient penalty would otherwise be a constant to its weights, and nobody would be told."""
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    y = cast_product(x, weight, MatrixProducts(), FP8, scales())
    with pytest.raises(UnitScalingError, match=r"create_graph=True.*overrides"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of all that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("frozen", "bytes_kept"), [("", 64 * 32 + 48 * 32), ("weight", 48 * 32), ("x", 64 * 32)])
def test_what_is_saved_is_half_of_bfloat16(frozen: str, bytes_kept: int) -> None:
    operands = {"x": torch.randn(64, 32), "weight": torch.randn(48, 32)}
    wide = {name: t.bfloat16().requires_grad_(name != frozen) for name, t in operands.items()}
    plain = saved_bytes(lambda: F.linear(wide["x"], wide["weight"]))
    scalars = 7 * 4
    for format, per_element in (("fp8", 1), ("bf16", 2)):
        found = saved_bytes(lambda: cast_product(*wide.values(), MatrixProducts(), FORMATS[format], scales()))  # noqa: B023
        assert found == per_element * bytes_kept + scalars
    assert plain == 2 * bytes_kept
    assert saved_bytes(lambda: cast_product(*operands.values(), MatrixProducts(), FP8, scales())) == 0


# ---------------------------------------------------------------------------------------------------------------------
# CUDA's layouts, by the device that enforces them without a GPU
# ---------------------------------------------------------------------------------------------------------------------

SIZES = [(32, 64, 48), (5, 24, 7), (1, 17, 33), (1, 32, 16), (0, 32, 16), (16, 16, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_layouts(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        weights = torch.empty(outputs, inputs, dtype=dtype), torch.empty(inputs, outputs, dtype=dtype).t()
        for weight in weights:
            for x in (torch.empty(rows, inputs, dtype=dtype), torch.empty(inputs, rows, dtype=dtype).t()):
                x, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
                on_meta = scales().to("meta")
                y = cast_product(x, w, MatrixProducts(), FP8, on_meta)
                gx, gw = torch.autograd.grad(y, (x, w), torch.empty(outputs, rows, dtype=dtype).t())
                shapes = [(rows, outputs), (rows, inputs), (outputs, inputs)]
                assert [(tuple(t.shape), t.dtype) for t in (y, gx, gw)] == [(shape, dtype) for shape in shapes]


def test_only_the_forward_product_accumulates_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    scaled_mm = F.scaled_mm

    def spy(*args: Any, use_fast_accum: bool, **kwargs: Any) -> Tensor:
        seen.append(use_fast_accum)
        return scaled_mm(*args, use_fast_accum=use_fast_accum, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", spy)
    with torch.device("meta"):
        x, weight = torch.empty(32, 64, requires_grad=True), torch.empty(48, 64, requires_grad=True)
        y = cast_product(x, weight, MatrixProducts(), FP8, scales().to("meta"))
        assert seen == [True]
        torch.autograd.grad(y, (x, weight), torch.empty(32, 48))
    assert seen == [True, False, False]


@pytest.mark.parametrize(
    ("inputs", "outputs", "format", "reason"),
    [
        (64, 48, "fp8", ""),
        (60, 60, "fp8", ""),  # padded to 64 x 64, 14 % more
        (64, 10, "fp8", "padding 10 x 64 to multiples of 16 would cost 60% more than it saves"),
        (64, 10, "bf16", ""),
    ],
)
def test_what_is_padded_and_what_is_left_alone(inputs: int, outputs: int, format: str, reason: str) -> None:
    """The plan says the same on every device, as it may be used on another."""
    model, x = nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 64)), torch.randn(32, inputs)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format=format)
    site = next(site for site in plan.sites if site.params[0] == "0.weight")
    assert site.format_reason == reason
    assert site.format == (None if reason else format)


def test_compiled_for_tensor_cores_there_is_nothing_but_casts_and_products() -> None:
    """What the compiler gets of it; "meta" stands for CUDA."""
    graphs: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([name.split(".")[1] for name in names if "fp8_cast" in name or "_mm" in name or "copy" in name])
        return graph.forward

    with torch.device("meta"):
        x, w = (torch.empty(rows, 64, dtype=torch.bfloat16, requires_grad=True) for rows in (40, 48))
        on_meta = scales().to("meta")
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    run = torch.compile(
        lambda x, w: cast_product(x, w, MatrixProducts(), FP8, on_meta), backend=backend, fullgraph=True
    )
    y = run(x, w)
    y.backward(torch.empty_like(y))
    assert graphs == [["fp8_cast", "fp8_cast", "_scaled_mm_v2"], ["fp8_cast", "_scaled_mm_v2", "_scaled_mm_v2"]]
    torch._dynamo.reset()


def test_the_meta_device_does_enforce_layouts() -> None:
    """Else the test above could not fail."""
    narrow = torch.empty(32, 24, dtype=torch.float8_e4m3fn, device="meta")
    one = torch.ones((), device="meta")
    scaling = F.ScalingType.TensorWise
    for left, right in ((narrow, narrow.t()), (narrow[:, :16], torch.empty_like(narrow[:16]))):
        with pytest.raises((RuntimeError, ValueError)):
            F.scaled_mm(left, right, one, scaling, one, scaling, output_dtype=torch.float32)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 24, 7), (1, 17, 33), (16, 32, 48), (0, 24, 7)])
def test_layouts_and_padding_change_no_value(
    rows: int, inner: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU's own scaled_mm stands in for CUDA's."""
    x, w, g = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)

    def products(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        y = cast_product(leaves[0], leaves[1], MatrixProducts(), FP8, scales())
        return (y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype)))

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)):
        upcast = products(dtype)
        with monkeypatch.context() as patch:
            for module in ("multiply", "cast_for_products"):
                patch.setattr(f"lightning_unitscale.ops.{module}.has_tensor_cores", lambda device: True)
            on_tensor_cores = products(dtype)
        for found, wanted in zip(on_tensor_cores, upcast, strict=True):
            assert found.shape == wanted.shape
            assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Experts and convolutions on tensor cores
# ---------------------------------------------------------------------------------------------------------------------


SCALED_GROUPED_MM = torch._scaled_grouped_mm


def on_cpu(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """What `torch._scaled_grouped_mm` says that it makes, after asking the "meta" device whether it takes this."""
    assert options["out_dtype"] == torch.bfloat16
    meta = [t.to("meta") for t in (a, b, scale_a, scale_b, offs)]  # keeps strides
    SCALED_GROUPED_MM(*meta[:4], offs=meta[4], **options)
    ends = [0, *offs.tolist()]
    rows = [a[i:j].float() @ b[group].float() for group, (i, j) in enumerate(pairwise(ends))]
    scales = [scale_a[i:j, None] * scale_b[group] for group, (i, j) in enumerate(pairwise(ends))]
    return torch.cat([one * other for one, other in zip(rows, scales, strict=True)]).bfloat16()


@pytest.mark.parametrize(("format", "kernels"), [("fp8", 1), ("fp8_e4m3", 2)])
@pytest.mark.parametrize("stored", ["in_out", "out_in"])
def test_experts_run_in_groups(format: str, kernels: int, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(40, 32).bfloat16(), (torch.randn(40, 48) / 1024).bfloat16()
    w = (torch.randn(3, 32, 48) / 16).bfloat16()
    w = w if stored == "in_out" else w.mT.contiguous().mT
    products = MATMULS["_grouped_mm"].products(
        FunctionCall(torch._grouped_mm, (x, w), {"offs": torch.tensor([3, 3, 40], dtype=torch.int32)}), x, w
    )

    def made() -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), w.detach().requires_grad_()
        y = cast_product(*leaves, products, FORMATS[format], scales())
        return (y.detach(), *torch.autograd.grad(y, leaves, g))

    upcast, calls = made(), []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(options["use_fast_accum"])
        return on_cpu(*args, **options)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", spy)
    monkeypatch.setattr("lightning_unitscale.ops.multiply_groups._has_kernel", lambda device: True)
    assert_close(made(), upcast, 2.0**-7)
    assert calls == [True, False][:kernels]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(40, 24, 48), (40, 32, 24), (0, 32, 48)])
def test_experts_of_other_sizes_are_upcast(rows: int, inputs: int, outputs: int) -> None:
    values = (
        torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(3, inputs, outputs, dtype=torch.float8_e4m3fn, device="meta"),
    )
    one = torch.ones((), device="meta")
    assert not multiplies_groups(*(Cast(v, one, v.shape) for v in values), torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_convolutions_of_single_pixels_are_matrix_products(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensor cores multiply the format and pixels are rows; CPU's scaled_mm stands in for CUDA's."""
    w, g = torch.randn(24, 32, 1, 1) / 16, torch.randn(2, 24, 5, 7) / 1024
    x = torch.randn(2, 32, 5, 7).to(memory_format=layout)
    bias = torch.randn(24)

    def made() -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), w.clone().requires_grad_()
        call = FunctionCall(F.conv2d, (*leaves, bias), {})

        def casting(x: Tensor, weight: Tensor, products: Any) -> Tensor:
            kinds.append(type(products))
            return cast_product(x, weight, products, FP8, scales())

        y = MATMULS["conv2d"].cast(call, *leaves, casting, 1.0)
        return (y.detach(), *torch.autograd.grad(y, leaves, g))

    kinds: list[type] = []
    upcast = made()
    for module in ("multiply", "cast_for_products", "convolution"):
        monkeypatch.setattr(f"lightning_unitscale.ops.{module}.has_tensor_cores", lambda device: True)
    assert_close(made(), upcast, 1e-5)
    is_matrix = layout == torch.channels_last
    assert kinds == [ConvolutionProducts, MatrixProducts if is_matrix else ConvolutionProducts]


def test_the_plan_says_which_products_stay_upcast() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(16 * 16, 32), nn.Linear(32, 16)
    )
    x = torch.randn(8, 16, 4, 4)
    said = {}
    for format in ("fp8", "bf16"):
        plan = unit_scale(copy.deepcopy(model), lambda m: m(x).square().mean(), "preserve", format=format)
        said[format] = {site.params[0]: site.upcast for site in plan.cast_sites}
        assert ("upcast: torch has no convolution" in plan.summary()) == (format == "fp8")
    assert "no convolution of FP8" in said["fp8"]["0.weight"]
    assert "channels_last" in said["fp8"]["1.weight"]
    assert said["fp8"]["3.weight"] == ""
    assert set(said["bf16"].values()) == {""}
