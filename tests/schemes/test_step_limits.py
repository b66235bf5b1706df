"""The drop-in rule: what one step does stays of the untouched model's size."""

import pytest
import torch
from support import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import Plan, scale_learning_rates, unit_scale
from lightning_unitscale.engine.checks.first_step import TRIAL, FirstStep, measure_first_step
from lightning_unitscale.engine.checks.gradients_taken import take_gradients
from lightning_unitscale.schemes.step_limits import LARGEST, MOST_RAISED, limit_steps, limited, role_factors


def regression() -> nn.Sequential:
    """A narrow head behind a wide layer, whose readout would otherwise get some hundred times its step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 256), nn.Flatten(), nn.Linear(4096, 128), nn.GELU(), nn.Linear(128, 256))


GENERATOR = torch.Generator().manual_seed(1)
WORDS = torch.randint(64, (32, 16), generator=GENERATOR)
TARGETS = 2 * torch.randn(32, 256, generator=GENERATOR)

# A readout that starts small and steps far.
PAPER = {"readout_exponent": 1.0, "eta_out": 4.0}


def squared_error(model: nn.Module) -> Tensor:
    return F.mse_loss(model(WORDS), TARGETS)


def what_a_step_does(model: nn.Module, rates: dict[str, float]) -> float:
    """Σ lr·|g|, by autograd alone."""
    model.zero_grad()
    squared_error(model).backward()
    return sum(rates[name] * float(p.grad.abs().sum()) for name, p in model.named_parameters() if name in rates)


def test_roles_that_do_most_are_cut_off_at_one_level() -> None:
    assert role_factors({"hidden": 1.0, "readout": 26.0}, 1.0, 8.0) == pytest.approx({"hidden": 1.0, "readout": 7 / 26})
    assert role_factors({"hidden": 30.0, "readout": 10.0}, 1.0, 8.0) == pytest.approx(
        {"hidden": 4 / 30, "readout": 4 / 10}
    )


def test_steps_within_the_limits_are_left_alone() -> None:
    assert role_factors({"hidden": 1.0, "readout": 6.0}, 1.0, 8.0) == {"hidden": 1.0, "readout": 1.0}


def test_steps_that_do_less_are_raised_within_bounds() -> None:
    assert role_factors({"hidden": 0.3, "readout": 0.2}, 1.0, 8.0) == pytest.approx({"hidden": 2.0, "readout": 2.0})
    assert role_factors({"hidden": 0.01}, 1.0, 8.0) == {"hidden": MOST_RAISED}


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_no_rate_is_raised_to_steps_larger_than_the_weight_at_adams_default_rate(storage: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 4))
    x, classes = torch.randn(16, 64), torch.arange(16) % 4
    plan = unit_scale(model, lambda net: F.cross_entropy(net(x), classes), storage=storage, hyperparameters=PAPER)
    for parameter in limited(plan).values():
        parameter.set_constant("step_limit", [])
    before, moves = dict(plan.lr_multipliers), dict.fromkeys(limited(plan), 1.0)
    limit_steps(plan, FirstStep({n: 1e6 * m for n, m in moves.items()}, moves, 0.5), FirstStep(moves, moves, 0.5))
    raised = {name: plan.lr_multipliers[name] / before[name] for name in moves}
    readouts_step = 1e-3 * plan.lr_multipliers["2.weight"] / plan.parameters["2.weight"].stored
    assert raised["0.weight"] == pytest.approx(MOST_RAISED)
    assert 1.0 < raised["2.weight"] < MOST_RAISED
    assert readouts_step <= 1.0 < readouts_step * 2 ** (1 / 16)


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_step_does_no_more_than_the_limit_allows(storage: str) -> None:
    untouched, model = regression(), regression()
    plan = unit_scale(model, squared_error, storage=storage)
    rates = {name: plan.lr_multipliers[name] for name in limited(plan)}
    ratio = what_a_step_does(model, rates) / what_a_step_does(untouched, dict.fromkeys(rates, 1.0))
    assert 0.9 <= ratio <= LARGEST * 2 ** (1 / 16)
    unlimited = {name: rate / plan.parameters[name].step_limit for name, rate in rates.items()}
    assert what_a_step_does(model, unlimited) > 2 * what_a_step_does(model, rates)
    assert plan.parameters["4.weight"].step_limit < plan.parameters["2.weight"].step_limit


def test_the_limit_says_why() -> None:
    plan = unit_scale(regression(), squared_error)
    assert "times what one of the untouched model does: limited to" in plan.explain("4.weight")


@pytest.mark.parametrize("family", ["adamw", "sgd"])
def test_both_storages_train_alike_under_the_limits(family: str) -> None:
    losses: dict[str, list[float]] = {}
    with zoo.default_dtype(torch.float64):
        targets = TARGETS.double()

        def loss_of(model: nn.Module) -> Tensor:
            return F.mse_loss(model(WORDS), targets)

        for storage in ("folded", "unit"):
            model = regression()
            plan = unit_scale(model, loss_of, storage=storage)
            optimizer = (
                torch.optim.AdamW(model.parameters(), 1e-3)
                if family == "adamw"
                else torch.optim.SGD(model.parameters(), 1e-2)
            )
            scale_learning_rates(optimizer, plan)
            losses[storage] = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                losses[storage].append(loss.item())
    assert losses["folded"] == pytest.approx(losses["unit"], rel=1e-6)


@pytest.mark.parametrize("options", [{"lr_units": "umup"}, {"scheme": "preserve"}])
def test_nothing_is_limited_in_other_units_or_where_training_is_unchanged(options: dict[str, str]) -> None:
    plan = unit_scale(regression(), squared_error, **options)
    assert {p.step_limit for p in plan.parameters.values()} == {1.0}


def test_a_plan_keeps_its_limits_when_it_is_stored() -> None:
    plan = unit_scale(regression(), squared_error)
    assert Plan.from_dict(plan.to_dict()).lr_multipliers == plan.lr_multipliers


def test_the_first_step_of_a_linear_model_is_the_closed_form() -> None:
    """loss = ½ mean (x·w)²: gradients are C·w, and of the trial step's fall ½ s·dᵀCd / Σ|g| is lost, d = sign(g)."""
    with zoo.default_dtype(torch.float64):
        torch.manual_seed(0)
        model, x = nn.Linear(6, 1, bias=False), torch.randn(50, 6)
        before = model.weight.detach().clone()
        covariance = x.t() @ x / len(x)
        gradient = covariance @ before[0]
        loss = 0.5 * before[0] @ gradient
        step = lambda _: 0.5 * model(x).square().mean()  # noqa: E731
        measured = measure_first_step(model, take_gradients(model, step, whole=True), step, {"weight": 2.0})
        d = gradient.sign()
        fall = 2.0 * gradient.abs().sum()
        length = TRIAL * loss / fall
        lost = 0.5 * length * 4.0 * (d @ covariance @ d) / fall
    assert measured.moves["weight"] == pytest.approx(float(gradient.abs().sum()), rel=1e-5)
    assert measured.squares["weight"] == pytest.approx(float(gradient.square().sum()), rel=1e-5)
    assert measured.lost == pytest.approx(float(lost), rel=1e-6)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_matrix_that_starts_at_zero_takes_the_user_s_step() -> None:
    model = regression()
    nn.init.zeros_(model[4].weight)
    plan = unit_scale(model, squared_error)
    parameter = plan.parameters["4.weight"]
    assert plan.lr_multipliers["4.weight"] == pytest.approx(parameter.step_limit)
