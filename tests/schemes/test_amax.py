"""The article's rule: its three divisors by hand, what they do to a step, and what is refused."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import zoo
from support.prepared import build, gradients, prepared, train
from support.training import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import (
    Plan,
    UnitScaling,
    UnitScalingError,
    remove_unit_scaling,
    scale_learning_rates,
    unit_scale,
)
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.optim.seen_gradients import divided
from lightning_unitscale.schemes import SCHEMES
from lightning_unitscale.schemes.scheme import Rates, Scheme, Weight

ROOT2 = 2**0.5
LITERAL = {"keep_function": False}  # as the article means it
Step = Callable[[nn.Module], Tensor]


class LinearRegression(nn.Module):
    """The article's θ = [w₁, w₂] with the loss (w₁ + w₂ - 1)²: a matmul with the one example x = [1, 1], target 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(2, 1, bias=False)
        self.w.weight.data = torch.tensor([[3.0, 4.0]])

    def forward(self, x: Tensor) -> Tensor:
        return (self.w(x) - 1).square().mean()


ONES = torch.ones(1, 2)


def regression(**options: Any) -> tuple[LinearRegression, Plan]:
    model = LinearRegression()
    return model, unit_scale(model, lambda net: net(ONES), "amax", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def test_alpha_of_three_and_four() -> None:
    model, plan = regression(storage="unit")
    assert model.w.weight.tolist() == [pytest.approx([3 * ROOT2 / 4, ROOT2])]
    assert plan.parameters["w.weight"].multiplier == pytest.approx(4 / ROOT2)
    assert model(ONES).item() == pytest.approx(36)  # α is carried along
    assert "α = max|θ| / √d = 4 / √2" in plan.explain("w.weight")


def test_the_function_of_the_scaled_weight_is_another_one() -> None:
    model, plan = regression(hyperparameters=LITERAL)
    assert model.w.weight.tolist() == [pytest.approx([3 * ROOT2 / 4, ROOT2])]
    assert plan.parameters["w.weight"].multiplier == 1
    assert model(ONES).item() == pytest.approx((7 * ROOT2 / 4 - 1) ** 2)


def test_folded_weights_whose_function_is_kept_are_as_they_were() -> None:
    case = zoo.CASES["llama-sdpa"]
    model, plan = prepared(case, scheme="amax")
    plain = build(case)
    assert plan.is_plain
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


KEPT = (
    "llama-sdpa",
    "t5-eager",
    "bert-sdpa",
    "experts-indexed",
    "mixtral-eager",
    "weight-norm",
    "unet",
    "dit",
    "gru",
    "lora",
)


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("name", KEPT)
def test_a_function_that_is_kept_is_the_models_own(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    with zoo.default_dtype(torch.float64):
        plain = build(case)
        model, plan = prepared(case, scheme="amax", storage=storage)
        assert all(not p.reason or p.from_initial == 1 for p in plan.parameters.values())
        expected = case.loss(plain, case.batch(1)).item()
        assert case.loss(model, case.batch(1)).item() == pytest.approx(
            expected, rel=1e-6 if case.casts_to_float32 else 1e-13
        )


def test_trained_weights_are_taken_where_the_function_is_kept() -> None:
    case = zoo.CASES["bert-sdpa"]
    model = build(case)
    train(case, model, [torch.optim.AdamW(model.parameters(), lr=1e-2)], 3)
    with pytest.raises(UnitScalingError, match="holds trained weights"):
        unit_scale(
            copy.deepcopy(model),
            lambda m: case.loss(m, case.batch(0)),
            "amax",
            hyperparameters=LITERAL,
        )
    expected = case.loss(model, case.batch(1)).item()
    unit_scale(model, lambda m: case.loss(m, case.batch(0)), "amax", storage="unit")
    assert case.loss(model, case.batch(1)).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_all_zero_is_left_alone_and_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[2].bias)
    plan = unit_scale(model, lambda net: net(torch.randn(3, 4)).square().mean(), "amax", storage="unit")
    assert plan.parameters["0.bias"].from_initial == plan.parameters["0.bias"].multiplier == 1
    assert any("all zero" in note and "0.bias, 2.bias" in note for note in plan.notes)


class WithAnEmptyWeight(nn.Module):
    """One more matrix, of no rows: d = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.empty, self.head = nn.Linear(4, 4), nn.Parameter(torch.zeros(0, 4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.head(torch.cat([h, F.linear(h, self.empty)], dim=-1))


def test_what_has_no_elements_is_left_alone_and_named() -> None:
    model, x = WithAnEmptyWeight(), torch.randn(3, 4)
    plan = unit_scale(model, lambda net: net(x).square().mean(), "amax", storage="unit")
    assert plan.parameters["empty"].from_initial == plan.parameters["empty"].multiplier == 1
    assert any("no scale to divide by" in note and "empty" in note for note in plan.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def relu_net() -> nn.Sequential:
    """The output of its ReLU is its input, [3, 4] for the recorded example."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.eye(2)
    net[2].weight.data = torch.tensor([[2.0, 0.0]])
    return net


THREE_FOUR = torch.tensor([[3.0, 4.0], [1.0, 0.5]])


def test_beta_of_three_and_four_is_carried_into_the_next_weight() -> None:
    model = relu_net()
    plan = unit_scale(model, lambda net: net(THREE_FOUR).square().mean(), "amax", storage="unit", weights=False)
    (site,) = [site for site in plan.sites if site.role == "activation"]
    assert site.factors[""] == pytest.approx(ROOT2 / 4)
    assert model[1](THREE_FOUR).tolist()[0] == pytest.approx([3 * ROOT2 / 4, ROOT2])
    assert plan.sites[1].factors["2.weight"] == pytest.approx(4 / ROOT2)
    assert torch.allclose(model(THREE_FOUR), relu_net()(THREE_FOUR))


def test_beta_follows_each_position_where_the_function_changes() -> None:
    model = relu_net()
    plan = unit_scale(
        model,
        lambda net: net(THREE_FOUR).square().mean(),
        "amax",
        weights=False,
        hyperparameters=LITERAL,
    )
    (site,) = [site for site in plan.sites if site.divides_along is not None]
    assert not site.folded
    expected = torch.tensor([[2 * 3 * ROOT2 / 4], [2 * ROOT2]])
    assert torch.allclose(model(THREE_FOUR), expected)
    assert torch.allclose(model(THREE_FOUR[:1]), expected[:1])  # whatever else is in the batch
    assert torch.allclose(model(10 * THREE_FOUR), expected)
    with pytest.raises(UnitScalingError, match=r"<root>\.1:relu|1:relu.*found anew in every call"):
        remove_unit_scaling(model)
    assert plan_of(model) is plan
    assert any("divided by max|f| / √n of each call's own output" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-eager", "resnet", "unet", "experts-loop", "sequential"])
def test_gradients_of_following_factors_are_the_slope_of_the_loss(name: str) -> None:
    """The gate has looked at them too; here along the gradient itself."""
    case = zoo.CASES[name]
    with zoo.default_dtype(torch.float64):
        model, plan = prepared(case, scheme="amax", weights=False, hyperparameters=LITERAL)
        assert any(site.divides_along is not None for site in plan.sites)
        _, found = gradients(case, model, seed=1)
        norm = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        losses = []
        h = 1e-4 if case.casts_to_float32 else 1e-6
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for key, parameter in moved.named_parameters():
                    if key in found:
                        parameter += sign * h * found[key] / norm
            losses.append(case.loss(moved, case.batch(1)).item())
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(norm, rel=2e-2 if case.casts_to_float32 else 1e-5)


def test_channels_of_a_convolution_are_its_features() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))
    plan = unit_scale(
        net, lambda m: m(torch.randn(2, 3, 8, 8)).square().mean(), "amax", hyperparameters=LITERAL, verify=False
    )
    assert [site.divides_along for site in plan.sites if site.role == "activation"] == [-3]


@pytest.mark.parametrize("options", [{"storage": "unit"}, {"hyperparameters": LITERAL, "verify": False}])
@pytest.mark.parametrize("name", ["sequential", pytest.param("llama-sdpa", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(name: str, options: dict[str, Any]) -> None:
    case = zoo.CASES[name]
    model, _ = prepared(case, scheme="amax", **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda batch: case.loss(model, batch), fullgraph=True, backend="aot_eager")
    loss = compiled(case.batch(1))
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    expected, by_name = gradients(case, model, seed=1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(found, by_name.values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("bent", [1.0, 1e-3, 1e6])
def test_the_step_uses_the_gradient_over_gamma_at_any_size(bent: float, storage: str) -> None:
    """Loss (w·x - 1)² at w = [3, 4], x = [3, 4]: g ∝ [3, 4], g / γ = [3, 4]·√2/4. U = w / α moves by η times that."""
    x = torch.tensor([[3.0, 4.0]])
    model = LinearRegression()
    plan = unit_scale(model, lambda net: net(x), "amax", storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scale_learning_rates(optimizer, plan)
    (bent * model(x)).backward()
    gradient = model.w.weight.grad
    assert gradient is not None
    before, value = model.w.weight.detach().clone(), gradient.clone()
    optimizer.step()
    alpha = 4 / ROOT2
    moved = (before - model.w.weight.detach()) / plan.parameters["w.weight"].stored
    assert moved.tolist() == [pytest.approx([0.01 * 3 / alpha, 0.01 * 4 / alpha], rel=1e-4)]
    assert model.w.weight.grad is gradient
    assert torch.equal(gradient, value)


def sgd_net(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Plan]:
    case = zoo.CASES["sequential"]
    model, plan = prepared(case, scheme="amax", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    scale_learning_rates(optimizer, plan)
    return model, optimizer, plan


def loss_of(model: nn.Module, seed: int) -> Tensor:
    case = zoo.CASES["sequential"]
    return case.loss(model, case.batch(seed))


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_storages_agree_under_sgd_with_momentum_and_decay() -> None:
    losses = {}
    for storage in ("folded", "unit"):
        with zoo.default_dtype(torch.float64):
            model, optimizer, _ = sgd_net(storage=storage)
            losses[storage] = train(zoo.CASES["sequential"], model, [optimizer], 20)
    assert losses["folded"] == pytest.approx(losses["unit"], rel=1e-9)
    assert losses["unit"][-1] < losses["unit"][0]


def test_a_plain_loop_divides_by_hand_to_the_same_weights() -> None:
    """SGD on U = θ/α with the gradients divided by a loop of the test's own."""
    with zoo.default_dtype(torch.float64):
        model, optimizer, _ = sgd_net(storage="unit")
        twin = copy.deepcopy(model)
        plain = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        for seed in range(4):
            for net, steps in ((model, optimizer), (twin, plain)):
                net.zero_grad()
                loss_of(net, seed).backward()
                if net is twin:
                    for parameter in twin.parameters():
                        parameter.grad /= parameter.grad.abs().max() / parameter.numel() ** 0.5
                steps.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_accumulation_closures_and_clipping_see_true_gradients() -> None:
    model, optimizer, _ = sgd_net()
    other, closing, _ = sgd_net()
    for seed in (0, 2):
        model.zero_grad()
        for micro in (seed, seed + 1):
            loss_of(model, micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

        def closure(seed: int = seed) -> Tensor:
            assert all(p.grad is None or p.grad.abs().max() < 10 for p in other.parameters())
            other.zero_grad()
            loss = loss_of(other, seed) + loss_of(other, seed + 1)
            loss.backward()
            plain = torch.autograd.grad(loss_of(other, seed) + loss_of(other, seed + 1), list(other.parameters()))
            assert all(torch.allclose(p.grad, g) for p, g in zip(other.parameters(), plain, strict=True))
            return loss

        closing.step(closure)
    assert_same_parameters(model, other)  # clipping by norm makes no difference


def test_true_gradients_come_back_when_the_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = sgd_net()
    loss_of(model, 0).backward()
    before = [p.grad for p in model.parameters()]

    def fails(*_: Any, **__: Any) -> None:
        assert not any(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
        raise ArithmeticError

    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", fails)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


def test_a_grad_scaler_makes_no_difference() -> None:
    model, optimizer, _ = sgd_net()
    other, plain, _ = sgd_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        model.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        loss_of(other, seed).backward()
        plain.step()
    assert_same_parameters(model, other)


def test_what_a_fused_optimizer_is_to_unscale_is_scaled() -> None:
    g = torch.tensor([3.0, -4.0])
    assert divided(g).tolist() == pytest.approx([3 * ROOT2 / 4, -ROOT2])
    assert divided(1024 * g, torch.tensor(1024.0)).tolist() == pytest.approx([1024 * 3 * ROOT2 / 4, -1024 * ROOT2])
    assert divided(torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_sparse_gradient_has_the_scale_of_the_whole_table() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    (table(torch.tensor([1, 1, 3])) * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])).sum().backward()
    sparse = table.weight.grad
    assert sparse is not None
    dense = sparse.to_dense()
    assert torch.allclose(divided(sparse).to_dense(), dense / (dense.abs().max() / 10**0.5))


def test_the_first_step_of_adam_is_the_untouched_models() -> None:
    case = zoo.CASES["llama-sdpa"]
    with zoo.default_dtype(torch.float64):
        plain = build(case)
        model, plan = prepared(case, scheme="amax")
        ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-30) for m in (model, plain))
        scale_learning_rates(ours, plan)
        train(case, model, [ours], 1)
        train(case, plain, [theirs], 1)
        assert all(scale.lr == 1 for scale in plan.step_scales("adam", decoupled_decay=True).values())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_each_optimizer_of_a_gan_divides_its_own(tmp_path: Path) -> None:
    """Manual optimization; what stands in .grad afterwards is true."""
    case = zoo.LIGHTNING_CASES["gan"]
    torch.manual_seed(0)
    module, callback = zoo.lightning_module(case), UnitScaling("amax", storage="unit")
    fit(tmp_path, callback, module=module, data=zoo.loader(case, 4), max_steps=4)
    assert callback.plan is not None
    assert callback.plan.divided_gradients
    assert all(p.isfinite().all() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Switches, and what is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["weights", "activations", "gradients"])
def test_each_of_the_three_is_switched_off_alone(off: str) -> None:
    _, plan = prepared(zoo.CASES["sequential"], scheme="amax", storage="unit", **{off: False})
    is_on = {
        "weights": any(p.initial_factor != 1 for p in plan.parameters.values()),
        "activations": any(site.role == "activation" for site in plan.sites),
        "gradients": bool(plan.divided_gradients),
    }
    assert is_on == {name: name != off for name in is_on}


def test_the_plan_names_the_exception_to_true_gradients() -> None:
    _, plan = regression()
    assert any("sees the gradients of 1 parameters divided" in note for note in plan.notes)
    assert "gradient ÷       max|gradient| / √2" in plan.explain("w.weight")
    _, plain = regression(gradients=False)
    assert not plain.notes


def test_steps_without_the_division_are_warned_of() -> None:
    model, _ = regression()
    model(ONES).backward()
    with pytest.warns(UserWarning, match=r"steps 1 parameters of LinearRegression \(w.weight\) without"):
        torch.optim.Adam(model.parameters()).step()


def test_a_hyperparameter_of_another_scheme_is_refused() -> None:
    with pytest.raises(UnitScalingError, match=r"'umup' has no hyperparameter 'keep_function' \(those of 'amax'"):
        UnitScaling("umup", hyperparameters={"keep_function": True})
    with pytest.raises(UnitScalingError, match=r"keep_function='yes' of scheme='amax' must be True or False"):
        UnitScaling("amax", hyperparameters={"keep_function": "yes"})
    with pytest.raises(UnitScalingError, match=r"overrides\['head'\]: keep_function is for the whole model"):
        UnitScaling("amax", overrides={"head": LITERAL})


class OneStorage(Scheme):
    """Has nothing but unit storage."""

    name = "one-storage"
    storages = ("unit",)

    def weight(self, weight: Weight) -> list[Any]:
        return []

    def rates(self, weight: Weight) -> Rates:
        return Rates()


def test_a_storage_that_a_scheme_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "one-storage", OneStorage)
    UnitScaling("one-storage", storage="unit")
    with pytest.raises(UnitScalingError, match=r"scheme='one-storage' has no storage='folded'; choose 'unit'"):
        UnitScaling("one-storage")


def test_lbfgs_is_refused() -> None:
    model, plan = regression()
    with pytest.raises(UnitScalingError, match="LBFGS"):
        scale_learning_rates(torch.optim.LBFGS(model.parameters()), plan)
    with pytest.raises(UnitScalingError, match="changes their gradients"):
        scale_learning_rates(torch.optim.LBFGS(model.parameters()), plan, family="sgd")


class Cheating(pl.LightningModule):
    """Normalises a weight by its own size: the engine finds an expression, whose scale it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(x, self.w / self.w.norm())))


def test_a_weight_made_by_an_expression_keeps_the_scale_that_it_has() -> None:
    torch.manual_seed(0)
    model, x = Cheating(), torch.randn(4, 6)
    before, expected = model.w.detach().clone(), model(x).detach()
    plan = unit_scale(model, lambda net: net(x).square().mean(), "amax", storage="unit")
    assert torch.equal(model.w, before)
    assert plan.parameters["head.weight"].from_initial != 1
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-7)
