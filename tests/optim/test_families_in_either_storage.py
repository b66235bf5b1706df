"""Each family's rule: whatever is stored, the function's tensors take steps as if the optimizer had them themselves."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from lightning_unitscale import Plan, UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.optim.families import optimizer_family

WIDTH, STEPS = 24, 14
POWER_OF_TWO = 16  # multipliers are powers of two: for SOAP, whose eigenvectors of singular matrices rounding decides
Make = Callable[[Any], torch.optim.Optimizer]


def of(package: str, name: str, **options: Any) -> Make:
    """A class of a package that need not be there."""
    return lambda groups: getattr(pytest.importorskip(package), name)(groups, **options)


def own_rates(groups: Any) -> torch.optim.Optimizer:
    return Adafactor(groups, lr=0.02, relative_step=False, warmup_init=False, weight_decay=0.1, eps=(1e-5, 1e-2))


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1, eps=1e-3),
    "radamw": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1, eps=(1e-3, 1e-2)),
    "adafactor-capped": lambda p: torch.optim.Adafactor(p, lr=0.5, eps=(None, 1e-2), d=2.0),
    "transformers-relative": own_rates,
    "transformers-momentum": lambda p: Adafactor(p, lr=0.02, relative_step=False, warmup_init=False, beta1=0.9),
    "transformers-absolute": lambda p: Adafactor(
        p, lr=0.02, relative_step=False, warmup_init=False, scale_parameter=False, weight_decay=0.1, eps=(1e-5, 1e-3)
    ),
    "lion": of("pytorch_optimizer", "Lion", lr=0.005, weight_decay=0.1),
    "soap": of("pytorch_optimizer", "SOAP", lr=0.02, weight_decay=0.1, precondition_frequency=3, eps=1e-4),
    "schedule-free-adamw": of("schedulefree", "AdamWScheduleFree", lr=0.02, weight_decay=0.1, warmup_steps=4),
    "schedule-free-sgd": of("schedulefree", "SGDScheduleFree", lr=0.02, weight_decay=0.1, warmup_steps=4),
    "schedule-free-radam": of("schedulefree", "RAdamScheduleFree", lr=0.02, weight_decay=0.1, silent_sgd_phase=False),
}
FAMILY = {"radam": "adam_sized", "radamw": "adam_sized", "soap": "adam_sized", "schedule-free-radam": "adam_sized"}
FAMILY |= {"sgd": "sgd", "schedule-free-sgd": "sgd", "transformers-absolute": "adam_sized"}
FAMILY |= dict.fromkeys(("adafactor", "adafactor-capped", "transformers-relative", "transformers-momentum"), "relative")
COUPLED = ("sgd", "radam", "schedule-free-sgd")


def network(width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        *(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)),
    )
    nn.init.zeros_(model[5].weight)
    return model.double()


def loss_of(width: int, model: Callable[[Tensor], Tensor], step: int = 0) -> Tensor:
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - 1).square().mean()


def prepared(storage: str, lr_units: str, scheme: str = "umup", width: int = WIDTH) -> tuple[nn.Module, Plan]:
    model = network(width)
    options = {"activations": False} if scheme == "umup" else {}
    return model, unit_scale(
        model, partial(loss_of, width), scheme=scheme, storage=storage, lr_units=lr_units, verify=False, **options
    )


def ratios(plan: Plan) -> dict[str, float]:
    return {name: parameter.multiplier / parameter.stored for name, parameter in plan.parameters.items()}


def function_of(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    return {name: p.detach() * ratios(plan)[name] for name, p in model.named_parameters()}


def mode(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Schedule-free optimizers have to be told."""
    getattr(optimizer, name, lambda: None)()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS), width: int = WIDTH) -> None:
    for step in steps:
        optimizer.zero_grad()
        if step % 5 == 2:  # a look at the averages between two steps
            mode(optimizer, "eval")
        mode(optimizer, "train")
        loss_of(width, model, step).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.97  # a schedule
    mode(optimizer, "eval")


def on_the_function(name: str, model: nn.Module, plan: Plan, width: int) -> dict[str, Tensor]:
    """The oracle: the optimizer at work on the function's tensors, nothing scaled, each with the rates of a plan."""
    tensors = {key: value.clone().requires_grad_() for key, value in function_of(model, plan).items()}
    optimizer = OPTIMIZERS[name]([{"params": [tensor]} for tensor in tensors.values()])
    scales = plan.step_scales(FAMILY.get(name, "adam"), decoupled_decay=name not in COUPLED)
    for group, key in zip(optimizer.param_groups, tensors, strict=True):
        r, scale, parameter = ratios(plan)[key], scales[key], plan.parameters[key]
        relative = FAMILY.get(name) == "relative"
        own = scale.lr * (1 if relative else r**2 if FAMILY.get(name) == "sgd" else r)
        group["lr"] *= own
        if name not in COUPLED:
            group["weight_decay"] /= own / parameter.eta_limit if own else 1.0
        if relative:
            scaled = parameter.relative_lr if plan.lr_units == "standard" else 1.0
            group["eps"] = (group["eps"][0], group["eps"][1] * scaled * parameter.multiplier)
    train(partial(torch.func.functional_call, network(width), tensors), optimizer, width=width)  # type: ignore[arg-type]
    return {key: tensor.detach() for key, tensor in tensors.items()}


@pytest.mark.parametrize("lr_units", ["standard", "umup"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_function(name: str, lr_units: str) -> None:
    results, width = [], POWER_OF_TWO if name == "soap" else WIDTH
    for storage in ("folded", "unit"):
        model, plan = prepared(storage, lr_units, width=width)
        optimizer = OPTIMIZERS[name](model.parameters())
        assert optimizer_family(optimizer) == ("relative" if name.startswith("tr") else FAMILY.get(name, "adam"))
        scale_learning_rates(optimizer, plan)
        expected = on_the_function(name, model, plan, width)
        initial = function_of(model, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, width=width)
        results.append(function_of(model, plan))
        for key, value in results[-1].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
            assert not torch.equal(value, initial[key])
    assert any(ratio != 1.0 for ratio in ratios(plan).values())
    for folded, unit in zip(*(result.values() for result in results), strict=True):
        torch.testing.assert_close(folded, unit, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preserve_changes_nothing(name: str) -> None:
    model, plan = prepared("folded", "standard", "preserve")
    expected = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    scale_learning_rates(optimizer, plan)
    train(model, optimizer)
    train(expected, OPTIMIZERS[name](expected.parameters()))
    for value, plain in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_state_dict(name: str) -> None:
    straight, plan = prepared("unit", "standard")
    optimizer = OPTIMIZERS[name](straight.parameters())
    scale_learning_rates(optimizer, plan)
    train(straight, optimizer, range(7))
    model, plan = prepared("unit", "standard")
    model.load_state_dict(straight.state_dict())
    resumed = OPTIMIZERS[name](model.parameters())
    scale_learning_rates(resumed, plan)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network_, its in ((straight, optimizer), (model, resumed)):
        train(network_, its, range(7, STEPS))
    for value, expected in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("lr_units", ["standard", "umup"])
def test_adafactor_keeps_the_relative_step_that_each_weight_had(lr_units: str) -> None:
    _, plan = prepared("unit", lr_units)
    scales = plan.step_scales("relative", decoupled_decay=True)
    hidden = [name for name, p in plan.parameters.items() if p.role == "hidden" and p.initial_rms]
    expected = {"standard": 1.0, "umup": WIDTH**-0.5}[lr_units]
    assert [scales[name].lr for name in hidden] == pytest.approx([expected] * len(hidden), rel=0.03)


def test_rates_of_its_own_are_refused() -> None:
    model, plan = prepared("folded", "umup")
    optimizer = Adafactor(model.parameters())
    scale_learning_rates(optimizer, plan)
    loss_of(WIDTH, model).backward()
    with pytest.raises(UnitScalingError, match=r"lr=None.*relative_step=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "package", "reason"),
    [
        ("Prodigy", "pytorch_optimizer", "one step size from the gradients of all parameters"),
        ("Shampoo", "pytorch_optimizer", "depends on the matrix's shape"),
    ],
)
def test_what_has_no_rule_is_refused_with_the_reason(name: str, package: str, reason: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(UnitScalingError, match=reason):
        optimizer_family(getattr(importlib.import_module(package), name)(network().parameters()))
