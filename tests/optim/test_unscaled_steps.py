"""Steps on a prepared model without its plan's multipliers are warned of, and no others are."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.training import batches, build, trainer
from torch import Tensor, nn

from lightning_unitscale import UnitScaling, scale_learning_rates, unit_scale

BATCH = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def loss_of(module: nn.Module) -> Tensor:
    return module(BATCH).square().mean()


def prepared(scheme: str = "umup", storage: str = "folded") -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    unit_scale(module, loss_of, scheme, storage=storage)
    return module


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)  # type: ignore[arg-type]


def step(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """What is said of one step."""
    loss_of(module).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught if "unit scaling" in str(warning.message)]


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("model", [lambda module: module, copy.deepcopy], ids=["itself", "copy"])
def test_the_first_step_without_multipliers_says_so_once(model: Callable[[nn.Module], nn.Module], storage: str) -> None:
    module = model(prepared(storage=storage))
    optimizer = adam(module.parameters())
    (message,) = step(optimizer, module)
    assert "Adam" in message and "0.weight" in message and "scale_learning_rates" in message
    assert not step(optimizer, module)
    assert step(adam(module.parameters()), module), "another optimizer is another mistake"


def test_an_optimizer_with_multipliers_is_let_be() -> None:
    module = prepared()
    optimizer = adam(module.parameters())
    scale_learning_rates(optimizer, module.__dict__["unit_scaling_plan"])
    assert not step(optimizer, module)


def test_an_optimizer_around_one_with_multipliers_is_let_be() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__([p for group in base.param_groups for p in group["params"]], {})
            self.base = base

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            self.base.step()

    module = prepared()
    base = adam(module.parameters())
    scale_learning_rates(base, module.__dict__["unit_scaling_plan"])
    assert not step(Around(base), module)


def test_steps_that_no_multiplier_is_for_are_let_be() -> None:
    module = prepared("preserve")
    assert not step(adam(module.parameters()), module)
    module = prepared()
    assert not step(adam([p for p in module.parameters() if p.dim() == 1]), module), "biases take plain steps"
    other = nn.Linear(4, 2)
    assert not step(adam(other.parameters()), other)
    module.requires_grad_(False)
    both = nn.Sequential(nn.Linear(4, 4), module)
    assert not step(adam(both.parameters()), both), "frozen parameters are not stepped"


def test_a_second_fit_without_the_callback_is_warned_of(tmp_path: Path) -> None:
    module = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer(tmp_path, UnitScaling(), max_steps=2).fit(module, batches())
    assert not [w for w in caught if "without the learning-rate multipliers" in str(w.message)]
    with pytest.warns(UserWarning, match="UnitScaling callback or a unitscale strategy again"):
        trainer(tmp_path, max_steps=2).fit(module, batches())
