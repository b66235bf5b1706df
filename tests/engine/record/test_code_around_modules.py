"""Hooks that replace what a module gives, and modules that TorchScript runs: one function in both storages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_unitscale import unit_scale


def _hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[3].register_forward_hook(lambda module, inputs, output: F.gelu(output))
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    return model


def _inner() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))


def _scripted() -> nn.Sequential:
    return nn.Sequential(torch.jit.script(_inner()), nn.ReLU(), nn.Linear(16, 4))


def _traced() -> nn.Sequential:
    return nn.Sequential(torch.jit.trace(_inner(), torch.randn(2, 8)), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:unit scaling leaves")
@pytest.mark.parametrize("build", [_hooked, _scripted, _traced])
def test_the_storages_are_one_function(build: Callable[[], nn.Module]) -> None:
    x, outputs = torch.randn(12, 8), []
    for storage in ("folded", "unit"):
        torch.manual_seed(0)
        model = build()
        plan = unit_scale(model, lambda m: F.cross_entropy(m(x), torch.arange(12) % 4), storage=storage)
        outputs.append(model(x).detach())
    torch.testing.assert_close(*outputs)
    last = max(name for name in plan.parameters if name.endswith("weight"))
    assert plan.parameters[last].multiplier != 1.0


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_weight_that_is_cached_between_two_runs_has_its_factor_in_both(storage: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    x = torch.randn(12, 8)

    def step(m: nn.Module) -> Tensor:
        with parametrize.cached():
            return F.cross_entropy(m(x), torch.arange(12) % 4) + m(-x).square().mean()

    plan = unit_scale(model, step, storage=storage)
    assert plan.explicit_sites
    expected = F.cross_entropy(model(x), torch.arange(12) % 4) + model(-x).square().mean()
    torch.testing.assert_close(step(model), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_torchscript_runs_is_left_alone_with_the_reason() -> None:
    torch.manual_seed(0)
    model = _scripted()
    before = [p.detach().clone() for p in model[0].parameters()]
    with pytest.warns(UserWarning, match=r"leaves 0\.0\.weight"):
        plan = unit_scale(model, lambda m: F.cross_entropy(m(torch.randn(12, 8)), torch.arange(12) % 4))
    assert plan.parameters["0.0.weight"].reason
    assert all(map(torch.equal, before, model[0].parameters()))
