"""Code that reads or writes stored values beside the plan: penalties, determinants, snapshots, clamps, pruning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale

PENALTIES: dict[str, Callable[[Net], Tensor]] = {
    "L1": lambda m: sum(p.abs().sum() for p in m.net.parameters()),
    "L2": lambda m: sum(p.pow(2).sum() for p in m.net.parameters()),
    "norm of norms": lambda m: torch.stack([p.norm() for p in m.net.parameters()]).norm(),
    "as one vector": lambda m: nn.utils.parameters_to_vector(m.net.parameters()).square().sum(),
    "flattened": lambda m: torch.cat([p.flatten() for p in m.net.parameters()]).norm(),
    "foreach": lambda m: torch.stack(torch._foreach_norm(list(m.net.parameters()))).sum(),
    "to the start": lambda m: sum(
        ((p - q).square() + q * p).sum() for p, q in zip(m.net.parameters(), m.start, strict=True)
    ),
    "mse": lambda m: sum(F.mse_loss(2 * p, q) for p, q in zip(m.net.parameters(), m.start, strict=True)),
    "orthogonal": lambda m: (m.net[2].weight @ m.net[2].weight.T - torch.eye(16)).square().sum(),
    "logdet": lambda m: torch.linalg.slogdet(m.net[2].weight)[1],
    "spectral": lambda m: torch.linalg.matrix_norm(m.net[2].weight, 2),
}


class Net(nn.Module):
    """Three layers with a penalty on their weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.start = [p.detach().clone() for p in self.net.parameters()]

    def penalty(self) -> Tensor:
        return PENALTIES[self.kind](self)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), torch.arange(len(x)) % 4) + 0.01 * self.penalty()


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.filterwarnings("ignore:unit scaling leaves")
def test_a_penalty_on_weights_starts_as_the_untouched_models(kind: str, storage: str) -> None:
    model, x = Net(kind), torch.randn(12, 8)
    before = model.penalty()
    plan = unit_scale(model, lambda m: m(x), storage=storage)
    torch.testing.assert_close(model.penalty(), before, rtol=1e-4, atol=1e-5)
    assert not plan.parameters["net.0.weight"].reason  # scaling goes on


def test_a_weight_whose_determinant_is_taken_is_left_alone_with_the_reason() -> None:
    model, x = Net("logdet"), torch.randn(12, 8)
    with pytest.warns(UserWarning, match="determinant"):
        plan = unit_scale(model, lambda m: m(x), verify=False)
    parameter = plan.parameters["net.2.weight"]
    assert "determinant" in parameter.reason
    assert parameter.multiplier == parameter.stored == parameter.initial_factor == 1


@pytest.mark.parametrize("kind", ["L2", "to the start"])
def test_a_weight_that_penalties_alone_read_stays_as_it_is(kind: str) -> None:
    model, x = Net(kind), torch.randn(12, 8)
    model.net.append(nn.Identity()).register_parameter("spare", nn.Parameter(torch.randn(5, 5)))
    model.start.insert(0, torch.zeros(5, 5))
    before = model.penalty().item()
    plan = unit_scale(model, lambda m: m(x))
    assert plan.parameters["net.spare"].initial_factor == plan.parameters["net.spare"].multiplier == 1.0
    assert model.penalty().item() == pytest.approx(before, rel=1e-4)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_copies_kept_in_dicts_and_lists_are_rescaled_with_the_weights(storage: str) -> None:
    model, x = plain(), torch.randn(12, 8)
    model.shadow = {"average": [p.detach().clone() for p in model.parameters()]}
    plan = unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
    for parameter, kept in zip(model.parameters(), model.shadow["average"], strict=True):
        assert torch.equal(parameter, kept)
    assert any("shadow" in note for note in plan.notes)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_clamp_after_the_step_is_noticed_once(through_data: bool) -> None:
    model, x = plain(), torch.randn(12, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, unit_scale(model, lambda m: m(x).square().mean()))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(4):
            with torch.enable_grad():
                model(x).square().mean().backward()
            optimizer.step()
            for p in model.parameters():
                (p.data if through_data else p).clamp_(-0.01, 0.01)
    said = [str(w.message) for w in caught if "written outside" in str(w.message)]
    assert len(said) == 1
    assert "0.weight" in said[0] and "preserve" in said[0]


def test_an_inner_gradient_step_is_refused_by_the_name_of_its_code() -> None:
    model, x = plain(), torch.randn(12, 8)

    def adapted(m: nn.Module) -> Tensor:
        named = dict(m.named_parameters())
        gradients = torch.autograd.grad(m(x).square().mean(), list(named.values()), create_graph=True)
        new = {n: p - 0.1 * g for (n, p), g in zip(named.items(), gradients, strict=True)}
        return torch.func.functional_call(m, new, (x,)).square().mean()

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UnitScalingError, match="adapted"):
        unit_scale(model, adapted)
    assert all(map(torch.equal, before, model.parameters()))
    unit_scale(model, adapted, scheme="preserve")
