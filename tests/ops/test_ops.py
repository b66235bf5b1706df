"""The scaled operations against closed forms, numerical derivatives and the `unit_scaling` package."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.scaled_product import ScaledProduct, scaled_linear
from lightning_unitscale.ops.torch_functions import short_name
from lightning_unitscale.schemes.activation_constants import gaussian_rms

sizes = st.integers(1, 5)
factors = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)
seeds = st.integers(0, 2**31)


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


# ---------------------------------------------------------------------------------------------------------------------
# ScaledProduct
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_the_scaled_product(check: Callable[..., bool], has_bias: bool) -> None:
    bias = draw(3, seed=2) if has_bias else None
    x, weight = draw(4, 5), draw(3, 5, seed=1)
    assert check(lambda *tensors: ScaledProduct.apply(*tensors, 0.3, 1.7), (x, weight, bias))


@settings(deadline=None, max_examples=60)
@given(st.lists(sizes, max_size=3), sizes, sizes, factors, factors, st.booleans(), seeds)
def test_scaled_linear_is_its_closed_form(
    batch: list[int], inputs: int, outputs: int, a: float, b: float, has_bias: bool, seed: int
) -> None:
    x, weight, g = draw(*batch, inputs, seed=seed), draw(outputs, inputs, seed=seed + 1), draw(*batch, outputs, seed=9)
    bias = draw(outputs, seed=seed + 2) if has_bias else None
    y = scaled_linear(x, weight, bias, a, b)
    expected = a * torch.einsum("...i,oi->...o", x, weight) + (b * bias if bias is not None else 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * (abs(a) + abs(b)))
    y.backward(g)
    flat_g, flat_x = g.detach().reshape(-1, outputs), x.detach().reshape(-1, inputs)
    close = {"rtol": 1e-12, "atol": 1e-12 * (abs(a) + abs(b))}
    torch.testing.assert_close(x.grad, a * (g.detach() @ weight.detach()), **close)
    torch.testing.assert_close(weight.grad, a * (flat_g.t() @ flat_x), **close)
    if bias is not None:
        torch.testing.assert_close(bias.grad, b * flat_g.sum(0), **close)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias = draw(4, 5, grad=False), draw(3, 5, seed=1), draw(3, seed=2, grad=False)
    scaled_linear(x, weight, bias, 0.5, 2.0).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_empty_batch() -> None:
    weight = draw(3, 5)
    y = scaled_linear(draw(0, 5), weight, draw(3), 0.5, 2.0)
    y.sum().backward()
    assert y.shape == (0, 3)
    assert torch.equal(weight.grad, torch.zeros(3, 5, dtype=torch.float64))


def test_uninitialised_memory_does_not_leak_into_the_product() -> None:
    """`addmm(beta=0)` must not read what it is told to ignore, which may hold NaN."""
    for _ in range(20):
        junk = torch.full((1,), math.nan, dtype=torch.float64)
        del junk
        assert scaled_linear(draw(4, 5), draw(3, 5), None, 0.5, 1.0).isfinite().all()


def test_autocast_casts_the_operands() -> None:
    x, weight, bias = (t.float().detach().requires_grad_() for t in (draw(4, 5), draw(3, 5, seed=1), draw(3, seed=2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scaled_linear(x, weight, bias, 0.5, 2.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {torch.float32}
    expected = 0.5 * x @ weight.t() + 2.0 * bias
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms(transform: str) -> None:
    x, weight = draw(6, 4, 5, grad=False), draw(3, 5, seed=1, grad=False)

    def scaled(w: Tensor) -> Tensor:
        return scaled_linear(x[0], w, None, 0.3, 1.0).square().sum()

    def plain(w: Tensor) -> Tensor:
        return (0.3 * x[0] @ w.t()).square().sum()

    if transform == "vmap":
        found = torch.vmap(lambda row: scaled_linear(row, weight, None, 0.3, 1.0))(x)
        torch.testing.assert_close(found, 0.3 * x @ weight.t())
    elif transform == "grad":
        torch.testing.assert_close(torch.func.grad(scaled)(weight), torch.func.grad(plain)(weight))
    else:
        ours, theirs = (torch.func.jvp(function, (weight,), (weight + 1,)) for function in (scaled, plain))
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Every matmul-like function: f(a x, b w, c bias) by its own rule
# ---------------------------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([2, 5], dtype=torch.int32)
LSTM = nn.LSTM(4, 3, num_layers=2, dtype=torch.float64)


def lstm_call() -> tuple[tuple[Any, ...], set[str]]:
    state = torch.zeros(2, 2, 3, dtype=torch.float64)
    weights = [w.detach() for w in LSTM._flat_weights]
    args = (draw(5, 2, 4), (state, state), weights, True, 2, 0.0, False, False, False)
    return args, {f"2.{i}" for i in range(len(weights))}


# name: (function, args, kwargs, labels of operands that take a factor)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], set[str]]] = {
    "linear": (F.linear, (draw(2, 4, 5), draw(3, 5), draw(3)), {}, {"weight", "bias"}),
    "linear-by-name": (F.linear, (draw(4, 5),), {"weight": draw(3, 5), "bias": draw(3)}, {"weight", "bias"}),
    "linear-1d": (F.linear, (draw(4, 5), draw(5)), {}, {"weight"}),
    "addmm": (torch.addmm, (draw(3), draw(4, 5), draw(5, 3)), {"alpha": 0.5, "beta": 3}, {"right", "bias"}),
    "baddbmm": (torch.baddbmm, (draw(2, 4, 3), draw(2, 4, 5), draw(2, 5, 3)), {}, {"left", "right", "bias"}),
    "matmul": (torch.matmul, (draw(2, 4, 5), draw(5, 3)), {}, {"right"}),
    "matmul-3d": (torch.matmul, (draw(2, 4, 5), draw(2, 5, 3)), {}, {"right"}),
    "matmul-vector": (torch.matmul, (draw(5), draw(5, 3)), {}, {"right"}),
    "matmul-left-weight": (torch.matmul, (draw(3, 5), draw(2, 5, 4)), {}, {"left"}),
    "rmatmul": (torch.Tensor.__rmatmul__, (draw(5, 3), draw(4, 5)), {}, {"right"}),
    "mm": (torch.mm, (draw(4, 5), draw(5, 3)), {}, {"left", "right"}),
    "bmm": (torch.bmm, (draw(2, 4, 5), draw(2, 5, 3)), {}, {"right"}),
    "mv": (torch.mv, (draw(4, 5), draw(5)), {}, {"left"}),
    "inner": (torch.inner, (draw(4, 5), draw(3, 5)), {}, {"right"}),
    "einsum": (torch.einsum, ("btd,dhe->bhte", draw(2, 3, 4), draw(4, 2, 5)), {}, {"1"}),
    "linalg_multi_dot": (torch.linalg.multi_dot, ([draw(3, 4), draw(4, 5), draw(5, 2)],), {}, {"1"}),
    "einsum-list": (torch.einsum, ("td,de->te", [draw(3, 4), draw(4, 5)]), {}, {"1"}),
    "bilinear": (F.bilinear, (draw(4, 5), draw(4, 2), draw(3, 5, 2), draw(3)), {}, {"weight", "bias"}),
    "conv1d": (F.conv1d, (draw(2, 4, 9), draw(6, 2, 3), draw(6), 2, 1, 1, 2), {}, {"weight", "bias"}),
    "conv2d": (F.conv2d, (draw(2, 4, 6, 6), draw(3, 4, 3, 3)), {"bias": draw(3), "padding": 1}, {"weight", "bias"}),
    "conv3d": (F.conv3d, (draw(1, 2, 4, 4, 4), draw(3, 2, 2, 2, 2)), {}, {"weight"}),
    "conv_transpose2d": (F.conv_transpose2d, (draw(2, 4, 3, 3), draw(4, 3, 2, 2), draw(3), 2), {}, {"weight", "bias"}),
    "lstm": (torch._VF.lstm, lstm_call()[0], {}, lstm_call()[1]),
    "embedding": (F.embedding, (torch.tensor([[0, 2], [2, 1]]), draw(3, 4)), {}, {"weight"}),
    "embedding_bag": (F.embedding_bag, (torch.tensor([[0, 2], [2, 1]]), draw(3, 4)), {"mode": "mean"}, {"weight"}),
}


def multiply(tree: Any, factors: dict[int, float]) -> Any:
    """The arguments with each tensor multiplied by its factor, by identity."""
    if isinstance(tree, Tensor):
        return tree * factors[id(tree)] if id(tree) in factors else tree
    if isinstance(tree, dict):
        return {key: multiply(value, factors) for key, value in tree.items()}
    return type(tree)(multiply(item, factors) for item in tree) if isinstance(tree, (list, tuple)) else tree


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", CALLS)
def test_scaled_call_equals_the_call_on_scaled_operands(name: str) -> None:
    function, args, kwargs, labels = CALLS[name]
    op, call = MATMULS[name.split("-")[0]], FunctionCall(function, args, kwargs)
    operands = op.operands(call)
    assert labels <= operands.keys()
    by_label = dict(zip(sorted(labels), (0.3, 1.7, 0.6, -2.0, 0.9, 1.1, 0.7, 1.4, 1.2), strict=False))
    expected = first(function(*multiply(args, by_id := {id(operands[k]): v for k, v in by_label.items()}),
                              **multiply(kwargs, by_id)))  # fmt: skip
    found = first(op.scaled(call, by_label))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    tensors = [t for t in operands.values() if isinstance(t, Tensor) and t.requires_grad]
    if tensors:
        g = draw(*found.shape, seed=5, grad=False)
        pairs = zip(torch.autograd.grad(found, tensors, g), torch.autograd.grad(expected, tensors, g), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_grouped_product() -> None:
    x, weight = draw(5, 16).float(), draw(2, 16, 8).float()
    op = MATMULS["_grouped_mm"]
    found = op.scaled(FunctionCall(torch._grouped_mm, (x, weight), {"offs": OFFSETS}), {"right": 0.3})
    expected = 0.3 * torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "label", "fan_in"),
    [
        ("linear", "weight", 5),
        ("addmm", "right", 5),
        ("matmul", "right", 5),
        ("einsum", "1", 4),
        ("bilinear", "weight", 10),
        ("conv1d", "weight", 2 * 3),
        ("conv2d", "weight", 4 * 9),
        ("conv3d", "weight", 2 * 8),
        ("conv_transpose2d", "weight", 4),
        ("lstm", "2.0", 4),
        ("lstm", "2.1", 3),
        ("embedding", "weight", 1),
    ],
)
def test_fan_in_keeps_unit_scale(name: str, label: str, fan_in: int) -> None:
    """With operands of RMS 1 the product of a linear map, times fan_in^-½, has RMS 1."""
    function, args, kwargs, _ = CALLS[name]
    op, call = MATMULS[name], FunctionCall(function, args, kwargs)
    operands = op.operands(call)
    assert op.fan_in(call, label) == fan_in
    if name in ("lstm", "embedding", "conv1d", "conv2d"):  # not linear in one weight; padded
        return
    generator = torch.Generator().manual_seed(0)
    replaced = {id(operand): key for key, operand in operands.items() if not op.is_bias(key, operand)}
    total, repeats = 0.0, 300
    for _ in range(repeats):
        new = {
            i: torch.randn(operands[key].shape, generator=generator, dtype=torch.float64) for i, key in replaced.items()
        }
        bare = {key: value for key, value in kwargs.items() if key not in ("alpha", "beta")}
        total += float(function(*substitute(args, new, op, operands), **bare).square().mean())
    assert math.sqrt(total / repeats / fan_in) == pytest.approx(1, rel=0.06)


def substitute(args: Any, new: dict[int, Tensor], op: Any, operands: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments with fresh operands, and zero biases."""
    biases = {id(value) for key, value in operands.items() if op.is_bias(key, value)}
    return tuple(
        new.get(id(item), torch.zeros_like(item) if id(item) in biases else item) if isinstance(item, Tensor) else item
        for item in args
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 1e3), st.none() | st.floats(0.01, 10), st.booleans(), seeds)
def test_scaled_attention_logits(a: float, scale: float | None, causal: bool, seed: int) -> None:
    q, k, v = (draw(2, 4, 6, 8, seed=seed + i, grad=False) for i in range(3))
    kwargs: dict[str, Any] = {"is_causal": causal} | ({} if scale is None else {"scale": scale})
    attention: Any = MATMULS["scaled_dot_product_attention"]
    found = attention.scaled_logits(FunctionCall(F.scaled_dot_product_attention, (q, k, v), kwargs), a, 0)
    logits = q @ k.transpose(-1, -2) * a * (8**-0.5 if scale is None else scale)
    if causal:
        logits = logits + torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    torch.testing.assert_close(found, logits.softmax(-1) @ v, rtol=1e-9, atol=1e-9)
    assert "scale" not in kwargs or kwargs["scale"] == scale


def test_attention_keeps_its_other_arguments() -> None:
    q, k, v = draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 8, seed=2)
    mask = draw(6, 6, seed=3, grad=False)
    attention: Any = MATMULS["scaled_dot_product_attention"]
    plain = F.scaled_dot_product_attention
    found = attention.scaled_logits(FunctionCall(plain, (q, k, v, mask, 0.0, False), {"enable_gqa": True}), 0.5, 0)
    torch.testing.assert_close(found, plain(0.5 * q, k, v, mask, enable_gqa=True))


# ---------------------------------------------------------------------------------------------------------------------
# Constants of activations
# ---------------------------------------------------------------------------------------------------------------------


def standard_normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# E[f(z)²] for z ~ N(0, 1). GELU: E[z² Φ(z)²] = 1/3 + 1/(2π√3), by parts twice.
SECOND_MOMENTS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 1 / 2),
    "identity": (lambda z: z, 1.0),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.1), (1 + 0.01) / 2),
    "gelu": (F.gelu, 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))),
    "hardtanh": (
        F.hardtanh,
        2 * (standard_normal_cdf(1) - 0.5 - math.exp(-0.5) / math.sqrt(2 * math.pi)) + 2 * (1 - standard_normal_cdf(1)),
    ),
    "square": (torch.square, 3.0),
    "sine": (torch.sin, (1 - math.exp(-2)) / 2),
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_activation_constants_in_closed_form(name: str) -> None:
    function, moment = SECOND_MOMENTS[name]
    assert gaussian_rms(function) == pytest.approx(math.sqrt(moment), rel=1e-6)


@pytest.mark.parametrize("function", [F.silu, F.elu, F.mish, F.hardswish, torch.tanh, F.softplus, F.selu, F.softsign])
def test_activation_constants_by_sampling(function: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert gaussian_rms(function) == pytest.approx(float(function(z).square().mean().sqrt()), rel=5e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the `unit_scaling` package
# ---------------------------------------------------------------------------------------------------------------------


def test_linear_of_the_peer_package() -> None:
    peer = pytest.importorskip("unit_scaling.functional")
    x, weight = draw(64, 32), draw(16, 32, seed=1)
    found = scaled_linear(x, weight, None, 32**-0.5, 1.0)
    torch.testing.assert_close(found, peer.linear(x, weight, None, constraint=None))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_residual_rule_of_the_peer_package(depth: int) -> None:
    """Branches × 1/√L on a plain stream, all in all divided by √2, are the peer's running weighted means."""
    peer = pytest.importorskip("unit_scaling.functional")
    core = pytest.importorskip("unit_scaling.core.functional")
    x = draw(8, 16, grad=False)
    branches = [draw(16, 16, seed=10 + i, grad=False) / 4 for i in range(2 * depth)]
    tau = core.transformer_residual_scaling_rule(residual_mult=1.0, residual_attn_ratio=1.0)

    ours = theirs = x
    for index, branch in enumerate(branches):
        ours = ours + torch.tanh(F.normalize(ours, dim=-1) @ branch) * depth**-0.5
        residual, skip = peer.residual_split(theirs, tau(index, 2 * depth))
        theirs = peer.residual_add(torch.tanh(F.normalize(residual, dim=-1) @ branch), skip, tau(index, 2 * depth))
    scale = ours.norm() / theirs.norm()
    torch.testing.assert_close(theirs * scale, ours, rtol=1e-9, atol=1e-12)
    assert float(scale) == pytest.approx(math.sqrt(3), rel=1e-9)


@pytest.mark.parametrize("first", ["dsmm", "spmm", "mm"])
def test_equal_functions_have_one_name(first: str) -> None:
    """Builtin functions of one C function are equal, so whichever is named first names all in a cache."""
    short_name.cache_clear()
    short_name(getattr(torch, first))
    assert short_name(torch.mm) == "mm"
