"""Compiled code applies what eager code does, whatever part of a model is compiled; equal blocks are compiled once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.by_day import by_night
from support.functions import LinearRelu
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import weight_norm as older_weight_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.runtime.install import rules_in_force
from lightning_unitscale.engine.runtime.scoped_forward import ScopedForward

WIDTH, VOCABULARY, LENGTH, EXPERTS, BLOCKS = 16, 12, 8, 4, 3


class Attention(nn.Module):
    """Queries and keys of one matrix: the factor of their logits stays at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.packed, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.packed(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Products(nn.Module):
    """Weights that are viewed, sliced and multiplied by operators and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + torch.einsum("bsi,io->bso", F.silu(self.norm(x) @ self.up.t()), self.down)


class WeightNormed(nn.Module):
    """A weight that `torch._weight_norm` makes of two parameters, which torch does not list as overridable."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            weight_norm(nn.Linear(WIDTH, 32)),
            weight_norm(nn.Linear(32, WIDTH)),
        )

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class HookNormed(nn.Module):
    """Weights that the older weight norm makes in a hook, before the frame that uses them opens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            older_weight_norm(nn.Linear(WIDTH, 32)),
            older_weight_norm(nn.Linear(32, WIDTH)),
        )

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Expression(nn.Module):
    """A weight that the block computes, by a function of `Tensor` that is written in Python too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)
        self.down, self.gain = nn.Parameter(torch.randn(WIDTH, 32)), nn.Parameter(torch.rand(WIDTH, 1) + 0.5)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        weight = self.gain * self.down / self.down.norm(dim=1, keepdim=True)
        return x + F.linear(F.gelu(self.up(self.norm(x))), weight)


class OwnFunction(nn.Module):
    """A hand-written Function, inside which no factor is put."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + self.down(LinearRelu.apply(self.norm(x), self.up.weight, self.up.bias))


class Checkpointed(nn.Module):
    """Runs its inside again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = PostNorm()

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inside, x, shared, use_reentrant=False)
        return y


class Experts(nn.Module):
    """3-D weights in `torch._grouped_mm`, which it does not list either (and compiles in bfloat16 alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        rows = self.norm(x).reshape(-1, WIDTH).bfloat16()
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (rows.shape[0] // EXPERTS)
        hidden = F.relu(torch._grouped_mm(rows, self.up.bfloat16(), offs=ends))
        return x + torch._grouped_mm(hidden, self.down.bfloat16(), offs=ends).view_as(x)


class Recurrent(nn.Module):
    """A layer that the compiler never traces: the graph breaks inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell, self.out = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True), Products()

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return self.out(x + self.cell(self.norm(x))[0], shared)


class PostNorm(nn.Module):
    """Residual additions whose factor is another one in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Given(nn.Module):
    """Uses a weight that the model around it has and reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return x + F.linear(F.relu(self.up(self.norm(x))), shared)


class Broken(nn.Module):
    """The graph breaks between two calls that are told apart by counting."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(WIDTH), Products()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        y = F.gelu(self.up(self.norm(x)))
        torch._dynamo.graph_break()
        return self.inside(x + self.down(F.gelu(y)), shared)


class Model(nn.Module):
    """The root has factors of its own: a readout tied to the embedding."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS))

    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.embedding(ids), self.shared.t()
        for block in self.blocks:
            x = block(x, shared)
        return F.linear(self.norm(x) + F.linear(x, shared), self.embedding.weight)


def loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) * 5 % VOCABULARY
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())


def model_of(block: type[nn.Module], **options: Any) -> Model:
    torch.manual_seed(0)
    model = Model(block)
    unit_scale(model, loss_of, storage="unit", verify=False, **options)
    assert rules_in_force(model) is not None
    return model


def whole(model: Model, **options: Any) -> Any:
    return torch.compile(model, **options)


def in_place(model: Model, **options: Any) -> Any:
    model.compile(**options)
    return model


def blocks_in_place(model: Model, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(**options)
    return model


def blocks_wrapped(model: Model, **options: Any) -> Any:
    for index, block in enumerate(list(model.blocks)):
        model.blocks[index] = torch.compile(block, **options)
    return model


def one_inside(model: Model, **options: Any) -> Any:
    next(part for name, part in model.blocks[1].named_modules() if name.endswith("norm")).compile(**options)
    list(model.blocks[2].children())[-1].compile(**options)
    return model


def as_function(model: Model, **options: Any) -> Any:
    return torch.compile(lambda ids: model(ids), **options)


WAYS = [whole, in_place, blocks_in_place, blocks_wrapped, one_inside, as_function]
KINDS = [
    *(Attention, Products, WeightNormed, HookNormed, Expression, OwnFunction, Experts, Recurrent, PostNorm, Given),
    *(Broken, Checkpointed),
]
BY_DAY = [  # the quicker ones
    *(Attention, WeightNormed, OwnFunction, Experts, PostNorm, Given),
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (Products, HookNormed, Expression, Recurrent, Broken, Checkpointed)
    ),
]


def results(run: Any, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss = loss_of(run)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {n.replace("_orig_mod.", ""): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_equal(kind: type[nn.Module], way: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> None:
    eager_model, compiled = model_of(kind), model_of(kind)
    eager = results(eager_model, eager_model)
    run = way(compiled, backend=backend, **options)
    for _ in range(2):  # traced, then from the cache
        found = results(run, compiled)
        assert found.keys() == eager.keys()
        for name, value in eager.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("kind", BY_DAY)
def test_blocks_compiled_inside_an_eager_model_are_worth_what_they_were(kind: type[nn.Module]) -> None:
    check_equal(kind, blocks_in_place)


@pytest.mark.parametrize("kind", [Given, PostNorm, Broken])
def test_a_backend_that_runs_what_was_traced_as_it_is_applies_no_factor_twice(kind: type[nn.Module]) -> None:
    check_equal(kind, blocks_in_place, "eager")


@pytest.mark.slow
def test_inductor_and_dynamic_shapes_give_the_values_of_eager_code() -> None:
    check_equal(PostNorm, blocks_in_place, "inductor", dynamic=True)


def test_a_model_that_was_compiled_before_it_was_prepared_has_its_factors() -> None:
    eager = model_of(Given)
    expected = results(eager, eager)
    torch.manual_seed(0)
    model = Model(Given)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    loss_of(model)  # what was compiled then is not what runs later
    unit_scale(model, loss_of, storage="unit", verify=False)
    found = results(model, model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compile_gives_the_values_of_eager_code(way: Callable[..., Any]) -> None:
    check_equal(Given, way)


@pytest.mark.slow
@pytest.mark.parametrize("backend", by_night(["eager", "aot_eager"], ["aot_eager"]))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_factor_in_every_way_to_compile(
    kind: type[nn.Module], way: Callable[..., Any], backend: str
) -> None:
    check_equal(kind, way, backend)


@pytest.mark.parametrize("kind", [Attention, Experts])
def test_a_model_is_one_graph(kind: type[nn.Module]) -> None:
    model = model_of(kind)
    eager, counter = loss_of(model), CompileCounterWithBackend("aot_eager")
    torch.testing.assert_close(loss_of(whole(model, backend=counter, fullgraph=True)), eager, rtol=1e-5, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in (Attention, Products, Given, PostNorm, Expression)), (Attention, {"format": "fp8"})],
)
def test_equal_blocks_are_compiled_once(kind: type[nn.Module], options: dict[str, Any]) -> None:
    model = model_of(kind, **options)
    counter = CompileCounterWithBackend("aot_eager")
    eager = loss_of(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss = loss_of(blocks_in_place(model, backend=counter, fullgraph=True))
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    assert counter.frame_count == 1


def test_more_post_norm_blocks_than_torch_compiles_variants_of_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each residual addition has a factor of its own: τ of u-μP falls with every block."""
    monkeypatch.setitem(globals(), "BLOCKS", 10)
    model = model_of(PostNorm)
    plan = plan_of(model)
    assert plan is not None
    factors = {f for site in plan.explicit_sites for key, f in site.factors.items() if key.endswith("down.weight")}
    assert len(factors) == 10
    counter = CompileCounterWithBackend("aot_eager")
    eager = loss_of(model)
    loss = loss_of(blocks_in_place(model, backend=counter))
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    assert counter.frame_count == 1


@torch.library.custom_op("unitscale_test::product", mutates_args=())
def own_product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@own_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class OtherKernel(Products):
    """Calls a kernel in compiled code that it did not call when it was recorded."""

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x + torch.ops.unitscale_test.product(self.norm(x), self.up)
        return x + F.linear(self.norm(x), self.up)


def test_a_kernel_that_compiled_code_alone_calls_is_not_run_without_the_factor() -> None:
    check_equal(OtherKernel, blocks_in_place)  # the block stays eager
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"unitscale_test.product with blocks\.0\.up"):
        loss_of(blocks_in_place(model_of(OtherKernel), backend="aot_eager", fullgraph=True))


def test_the_method_in_place_of_forward_has_its_signature() -> None:
    model = model_of(Attention, hyperparameters={"attn_exponent": 1.0})
    assert ScopedForward.behind(vars(model.blocks[0])["forward"]) is not None
    assert list(inspect.signature(model.blocks[0].forward).parameters) == ["x", "shared"]
