"""Prepared models in everything people do with a model: copies, checkpointing, compilers, hooks, autocast, caches."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import zoo
from support.by_day import by_day
from support.prepared import adamw, build, gradients, prepared, train
from support.zoo_batches import PAD
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import Plan, UnitScalingError, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.runtime.scoped_forward import ScopedForward

STORAGES = ("folded", "unit")
NAMES = (
    "gpt2-sdpa",
    "llama-eager",
    "tied-embedding",
    "lstm",
    "multihead-attention",
    "weight-norm",
    "parallel-residual",
)
each_storage = pytest.mark.parametrize("storage", STORAGES)
each_name = pytest.mark.parametrize("name", NAMES)


def run(case: zoo.Case, model: nn.Module, seed: int = 1) -> tuple[float, dict[str, Tensor]]:
    loss, found = gradients(case, model, seed)
    return loss.item(), {name: g.clone() for name, g in found.items()}


def assert_same(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], **close: Any
) -> None:
    """Bit for bit unless told otherwise."""
    close = close or {"rtol": 0, "atol": 0}
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), **close)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


@each_storage
@each_name
def test_a_deep_copy_runs_its_own_weights(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    copied = copy.deepcopy(model)
    before = run(case, model)
    assert_same(run(case, copied), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert case.loss(copied, case.batch(1)).item() != before[0]
    assert_same(run(case, model), before)
    for scope in scopes(copied):
        assert scope.module in set(copied.modules())


@each_storage
@pytest.mark.parametrize("name", [name for name in NAMES if name != "weight-norm"])  # torch pickles no parametrization
def test_pickle(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, plan = prepared(case, storage=storage)
    read = pickle.loads(pickle.dumps(model))
    assert_same(run(case, read), run(case, model))
    found = plan_of(read)
    assert found is not None
    assert found.to_dict() == plan.to_dict()


def scopes(model: nn.Module) -> list[ScopedForward]:
    return [s for module in model.modules() for value in vars(module).values() if (s := ScopedForward.behind(value))]


def test_nothing_is_installed_where_all_is_folded() -> None:
    model, plan = prepared(zoo.CASES["llama-sdpa"])
    assert plan.is_plain
    assert not scopes(model)
    assert scopes(prepared(zoo.CASES["llama-sdpa"], storage="unit")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing
# ---------------------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Sequential):
    """Runs each child under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self:
            x = checkpoint(child, x, use_reentrant=False)
        return x


@each_storage
@pytest.mark.parametrize("name", ["sdpa-attention", "einsum-attention", "multihead-attention", "layer-scale"])
def test_activation_checkpointing(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected = run(case, model)
    checkpointed = copy.deepcopy(model)
    checkpointed.blocks.__class__ = Checkpointed
    assert_same(run(case, checkpointed), expected)


@each_storage
@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-eager", "bert-sdpa"])
def test_activation_checkpointing_of_transformers(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected = run(case, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    # The two uses of a tied weight are added in another order.
    assert_same(run(case, model), expected, rtol=1e-5, atol=1e-8)


@each_storage
def test_prepared_under_activation_checkpointing(storage: str) -> None:
    case = zoo.CASES["sdpa-attention"]
    model, batch = build(case), case.batch(0)
    model.blocks.__class__ = Checkpointed
    unit_scale(model, lambda module: case.loss(module, batch), storage=storage)
    assert_same(run(case, model), run(case, prepared(case, storage=storage)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# The compiler
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@each_storage
@pytest.mark.parametrize(
    "name",
    by_day(
        ["sdpa-attention", "einsum-attention", "tied-embedding", "multihead-attention", "unet"],
        ["einsum-attention", "tied-embedding"],
    ),
)
def test_compiles_whole_and_once(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected = [run(case, model, seed) for seed in (1, 2)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    inputs = [case.batch(seed)["image" if name == "unet" else "input_ids"] for seed in (1, 2)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, tensor in enumerate(inputs):
            torch.testing.assert_close(compiled(tensor), model(tensor), rtol=1e-5, atol=1e-6)
            found = run(case, compiled, seed + 1)
            plain = (found[0], {key.removeprefix("_orig_mod."): value for key, value in found[1].items()})
            assert_same(plain, expected[seed], rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["sdpa-attention", "operator-attention", "parallel-residual"])
def test_compiled_inside_eager_outside(name: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage="unit")
    expected = run(case, model)
    compiled = copy.deepcopy(model)
    compiled.blocks[0].compile(fullgraph=True, backend="aot_eager")
    compiled.blocks[1].mlp = torch.compile(compiled.blocks[1].mlp, fullgraph=True, backend="aot_eager")
    found = run(case, compiled)
    assert_same((found[0], {key.replace("_orig_mod.", ""): value for key, value in found[1].items()}), expected,
                rtol=1e-4, atol=1e-6)  # fmt: skip


@pytest.mark.usefixtures("_fresh_compiler")
def test_training_compiled_is_training_eager() -> None:
    case = zoo.CASES["sdpa-attention"]
    losses = []
    for compile_it in (False, True):
        model, plan = prepared(case, storage="unit")
        runner = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        losses.append(train(case, runner, [adamw(model, plan)], steps=5))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's hooks and modes
# ---------------------------------------------------------------------------------------------------------------------


def meddle(module: nn.Module, inputs: Any, output: Any = None) -> None:
    """Calls every function that has sites, on tensors of the same shapes."""
    for tensor in (inputs, output):
        tensor = tensor[0] if isinstance(tensor, tuple) and tensor else tensor
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
            _ = tensor + tensor, F.silu(tensor), F.gelu(tensor), F.relu(tensor), tensor @ tensor.transpose(-2, -1)
            _ = F.scaled_dot_product_attention(tensor, tensor, tensor)
            assert torch.equal(torch.add(tensor, tensor), tensor.mul(2))


@each_storage
@pytest.mark.parametrize("name", [*NAMES, "gpt2-eager", "operator-attention", "resnet", "unet"])
def test_hooks_that_call_torch_functions_change_nothing(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected = run(case, model)
    for module in model.modules():
        module.register_forward_pre_hook(meddle)
        module.register_forward_hook(meddle)
    assert_same(run(case, model), expected)


@each_storage
def test_preparing_a_model_with_hooks(storage: str) -> None:
    case = zoo.CASES["operator-attention"]
    model, batch = build(case), case.batch(0)
    for module in model.modules():
        module.register_forward_hook(meddle)
    plan = unit_scale(model, lambda m: case.loss(m, batch), storage=storage)
    other, expected = prepared(case, storage=storage)
    assert plan.parameters == expected.parameters
    assert_same(run(case, model), run(case, other))


class Noisy(torch.overrides.TorchFunctionMode):
    """A mode of somebody else's that makes calls of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.ones(2) + torch.ones(2)
        F.gelu(torch.ones(2, 2) @ torch.ones(2, 2))
        return func(*args, **(kwargs or {}))


@each_storage
@pytest.mark.parametrize("name", ["operator-attention", "gpt2-eager"])
def test_another_function_mode_around(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected = run(case, model)
    with Noisy():
        assert_same(run(case, model), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, inference
# ---------------------------------------------------------------------------------------------------------------------


@each_storage
@each_name
def test_autocast(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    expected, grads = run(case, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(case, model, 1)
    assert loss.item() == pytest.approx(expected, rel=0.03)
    largest = max(float(g.norm()) for g in grads.values())
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        if float(grads[key].norm()) > 0.01 * largest:
            assert float(F.cosine_similarity(gradient.flatten(), grads[key].flatten(), dim=0)) > 0.97, key


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_storage
@each_name
def test_without_gradients(name: str, storage: str, mode: Callable[[], Any]) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    model.eval()
    expected = case.loss(model, case.batch(1)).item()
    with mode():
        assert case.loss(model, case.batch(1)).item() == pytest.approx(expected, rel=1e-6)
    with torch.inference_mode():
        unprepared = build(case)
        unprepared.eval()
        case.loss(unprepared, case.batch(1))
    model.train()
    assert run(case, model)[0] == pytest.approx(expected, rel=1e-6)


@each_storage
@pytest.mark.parametrize("attention", zoo.ATTENTION)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_with_a_cache_is_a_full_forward_pass(family: str, attention: str, storage: str) -> None:
    case = zoo.CASES[f"{family}-{attention}"]
    model, plan = prepared(case, storage=storage)
    train(case, model, [adamw(model, plan)], steps=2)
    model.eval()
    ids = case.batch(1)["input_ids"]
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        cache, steps = None, []
        for first, last in [(0, 5), *((position, position + 1) for position in range(5, ids.shape[1]))]:
            out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-5)


@each_storage
def test_generate(storage: str) -> None:
    model, _ = prepared(zoo.CASES["llama-sdpa"], storage=storage)
    ids = zoo.CASES["llama-sdpa"].batch(1)["input_ids"][:1, :4]
    found = [
        model.eval().generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=PAD)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


@each_storage
@pytest.mark.parametrize("name", ["llama-eager", "sdpa-attention", "einsum-attention"])
def test_other_lengths_and_batches(name: str, storage: str) -> None:
    """Row by row and prefix by prefix a causal model says what it says about the whole batch."""
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    model.eval()
    ids = case.batch(1)["input_ids"]

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        out = model(tokens)
        return out if isinstance(out, Tensor) else out.logits

    whole = logits(ids)
    torch.testing.assert_close(logits(ids[1:2, :7]), whole[1:2, :7], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Several prepared models
# ---------------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """Holds another prepared model where no module is registered, and calls it from its own forward pass."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]
        self.hidden = nn.Linear(48, 48)
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(x))) + self.other[0](x)


@pytest.mark.parametrize("other_storage", STORAGES)
@each_storage
def test_two_prepared_models_that_call_each_other(storage: str, other_storage: str) -> None:
    case = zoo.CASES["sequential"]
    inner, _ = prepared(case, storage=other_storage)
    batch = case.batch(1)
    alone = inner(batch["x"]).detach()
    torch.manual_seed(1)
    outer = Teacher(inner)
    unit_scale(outer, lambda m: F.cross_entropy(m(batch["x"]), batch["label"]), storage=storage)
    torch.testing.assert_close(inner(batch["x"]), alone, rtol=0, atol=0)
    together = outer(batch["x"])
    outer.other = [lambda x: torch.zeros(len(x), 5)]
    torch.testing.assert_close(together, outer(batch["x"]) + alone, rtol=1e-6, atol=1e-6)


@each_storage
def test_two_models_in_turn(storage: str) -> None:
    cases = [zoo.CASES[name] for name in ("sdpa-attention", "operator-attention")]
    models = [prepared(case, storage=storage)[0] for case in cases]
    apart = [run(case, model) for case, model in zip(cases, models, strict=True)]
    losses = [case.loss(model, case.batch(1)) for case, model in zip(cases, models, strict=True)]
    for model in models:
        model.zero_grad()
    sum(losses).backward()
    for model, (_, expected) in zip(models, apart, strict=True):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


# ---------------------------------------------------------------------------------------------------------------------
# Another path than the recorded one
# ---------------------------------------------------------------------------------------------------------------------


class Wayward(nn.Module):
    """Attention on packed weights, so that its logits keep a factor, along a path that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 4)
        self.repeats, self.width = 1, 16

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x)).chunk(3, dim=-1)
        for _ in range(self.repeats):
            q = F.scaled_dot_product_attention(q[..., : self.width], k[..., : self.width], v)
        return self.out(q)


def wayward(storage: str) -> tuple[Wayward, Plan, Tensor]:
    torch.manual_seed(0)
    model, x = Wayward(), torch.randn(2, 5, 8)
    options: dict[str, Any] = {"storage": storage, "hyperparameters": {"attn_exponent": 1.0}}
    return model, unit_scale(model, lambda m: m(x).square().mean(), **options), x


@each_storage
def test_more_calls_than_recorded(storage: str) -> None:
    model, plan, x = wayward(storage)
    assert [site.role for site in plan.explicit_sites if site.ordinal is not None] == ["attention"]
    model.repeats = 2
    if (
        plan.explicit_sites[-1].ordinal != -1
    ):  # a function that is one site throughout may be called any number of times
        with pytest.raises(
            UnitScalingError, match=r"Wayward\.forward: scaled_dot_product_attention was called 1 times"
        ):
            model(x)
    model.repeats = 1
    model(x)


@each_storage
def test_other_shapes_than_recorded(storage: str) -> None:
    model, _, x = wayward(storage)
    model.width = 8
    with pytest.raises(UnitScalingError, match=r"<root>:scaled_dot_product_attention.* last dimension of 16, .* 8"):
        model(x)
    model.width = 16
    model(x)


def test_an_exception_in_the_model_leaves_it_usable() -> None:
    model, _, x = wayward("unit")
    expected = model(x)
    with pytest.raises(RuntimeError):
        model(x[..., :3])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of other kinds
# ---------------------------------------------------------------------------------------------------------------------


@each_storage
@pytest.mark.parametrize("name", ["sequential", "tied-embedding"])
def test_functional_gradient(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage)
    batch, expected = case.batch(1), run(case, model)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        def call(inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (inputs,))

        return case.loss(call, batch)  # type: ignore[arg-type]

    found = torch.func.grad(loss)(parameters)
    assert_same((expected[0], found), expected, rtol=1e-5, atol=1e-7)


@each_storage
@pytest.mark.parametrize("name", ["sequential", "weight-norm", "einsum-attention", "parallel-residual"])
def test_gradient_penalty(name: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of |gradient|² equals that of the same model with its products written as plain operations."""
    case = zoo.CASES[name]

    def penalty(model: nn.Module) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        loss = case.loss(model, case.batch(1))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {key: g for key, g in zip(parameters, second, strict=True) if g is not None}

    def naive(x: Tensor, weight: Tensor, bias: Tensor | None, a: float, b: float) -> Tensor:
        y = a * (x @ weight.t())
        return y if bias is None else y + b * bias

    with zoo.default_dtype(torch.float64), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model, _ = prepared(case, storage=storage)
        found = penalty(model)
        monkeypatch.setattr("lightning_unitscale.ops.linear.scaled_linear", naive)
        expected = penalty(copy.deepcopy(model))
    largest = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-11 * largest)


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("format", [None, "fp8"])
@pytest.mark.parametrize("name", ["torch-encoder-prenorm", "torch-encoder-postnorm"])
def test_kernels_of_whole_layers_are_not_taken_in_evaluation(name: str, format: str | None, storage: str) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, storage=storage, format=format)
    model.eval()
    with_grad = case.loss(model, case.batch(1)).detach()
    with torch.no_grad():
        without = case.loss(model, case.batch(1))
    # Where nothing stays in the forward pass torch takes its own kernels of whole layers, which round otherwise.
    torch.testing.assert_close(with_grad, without, rtol=1e-6, atol=0)
