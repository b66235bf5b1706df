"""Derivatives taken inside the step: by inputs they are right in both storages, by weights they are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.ops.scaled_product import ScaledProduct, scaled_linear

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Learner(nn.Module):
    """A small regression net, its data and a loss."""

    def __init__(self, loss: Callable[[Learner], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
        self.x = torch.rand(8, 1) * 4 - 2
        self.y, self.loss_of = self.x.sin(), loss

    @property
    def named(self) -> Weights:
        return dict(self.net.named_parameters())

    def error(self, weights: Weights | None = None) -> Tensor:
        return F.mse_loss(functional_call(self.net, self.named if weights is None else weights, (self.x,)), self.y)

    def forward(self) -> Tensor:
        return self.loss_of(self)


def adapted(m: Learner) -> Tensor:
    gradients = grad(m.error)(m.named)
    return m.error({name: p - 0.1 * gradients[name] for name, p in m.named.items()})


def adapted_to_tasks(m: Learner) -> Tensor:
    def task(x: Tensor, y: Tensor) -> Tensor:
        error = lambda weights: F.mse_loss(functional_call(m.net, weights, (x,)), y)  # noqa: E731
        gradients = grad(error)(m.named)
        return error({name: p - 0.1 * gradients[name] for name, p in m.named.items()})

    return vmap(task)(m.x.view(2, 4, 1), m.y.view(2, 4, 1)).mean()


def adapted_in_steps(m: Learner) -> Tensor:
    weights = m.named
    for _ in range(2):
        gradients = torch.autograd.grad(m.error(weights), list(weights.values()), create_graph=True)
        weights = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
    return m.error(weights)


def weighted_by_sample(m: Learner) -> Tensor:
    weights = {name: p.detach() for name, p in m.named.items()}
    error = lambda w, x, y: F.mse_loss(functional_call(m.net, w, (x,)), y)  # noqa: E731
    gradients = vmap(grad(error), (None, 0, 0))(weights, m.x, m.y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    return ((m.net(m.x) - m.y).square().mean(1) / (1 + norms)).mean()


def with_norm_of_gradients_left_by_backward(m: Learner) -> Tensor:
    error = m.error()
    error.backward(create_graph=True)
    return error + sum(p.grad.square().sum() for p in m.net.parameters())


def with_curvature(m: Learner) -> Tensor:
    names, weights = zip(*m.named.items(), strict=True)
    error = lambda *w: m.error(dict(zip(names, w, strict=True)))  # noqa: E731
    directions = tuple(map(torch.ones_like, weights))
    _, products = torch.autograd.functional.hvp(error, weights, directions, create_graph=True)
    return m.error() + sum(product.square().sum() for product in products)


def with_tangents(m: Learner) -> Tensor:
    error, change = jvp(m.error, (m.named,), ({name: torch.ones_like(p) for name, p in m.named.items()},))
    return error + change.square()


def with_pullback(m: Learner) -> Tensor:
    error, pullback = vjp(m.error, m.named)
    return error + sum(g.square().sum() for g in pullback(torch.ones_like(error))[0].values())


def with_jacobian(m: Learner) -> Tensor:
    rows = jacrev(lambda weights: functional_call(m.net, weights, (m.x,)))(m.named)
    return m.error() + sum(row.square().mean() for row in rows.values())


BY_WEIGHTS = [
    *(adapted, adapted_to_tasks, adapted_in_steps, weighted_by_sample, with_norm_of_gradients_left_by_backward),
    *(with_curvature, with_tangents, with_pullback, with_jacobian),
]


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("loss", BY_WEIGHTS)
@pytest.mark.filterwarnings("ignore:unit scaling leaves")
def test_a_derivative_by_weights_that_the_loss_uses_is_refused_by_the_code_that_takes_it(
    loss: Callable[[Learner], Tensor], storage: str
) -> None:
    model = Learner(loss)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnitScalingError, match=r"test_torch_func\.py:\d+.*scheme='preserve' trains it as it is"):
        unit_scale(model, lambda m: m(), storage=storage)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    unit_scale(model, lambda m: m(), "preserve")
    assert model().item() == Learner(loss)().item()


def test_a_head_that_is_adapted_is_left_alone_and_the_rest_is_scaled() -> None:
    def head_adapted(m: Learner) -> Tensor:
        features, head = m.net[:4](m.x), dict(m.net[4].named_parameters())
        gradients, _ = grad_and_value(lambda h: F.mse_loss(functional_call(m.net[4], h, (features,)), m.y))(head)
        head = {name: p - 0.1 * gradients[name] for name, p in head.items()}
        return F.mse_loss(functional_call(m.net[4], head, (features,)), m.y)

    model = Learner(head_adapted)
    with pytest.warns(UserWarning, match=r"leaves net\.4\.weight, net\.4\.bias of Learner unscaled, as head_adapted"):
        plan = unit_scale(model, lambda m: m())
    assert [p.name for p in plan.parameters.values() if p.reason] == ["net.4.weight", "net.4.bias"]
    assert plan.parameters["net.2.weight"].from_initial != 1


BY_INPUTS = {
    "vmap": lambda m: vmap(m.net)(m.x),
    "grad": lambda m: vmap(grad(lambda x: m.net(x).sum()))(m.x),
    "jacrev": lambda m: vmap(jacrev(m.net))(m.x)[:, 0],
    "jacfwd": lambda m: vmap(jacfwd(m.net))(m.x)[:, 0],
    "hessian": lambda m: vmap(hessian(lambda x: m.net(x).sum()))(m.x)[:, 0],
    "jvp": lambda m: jvp(m.net, (m.x,), (torch.ones_like(m.x),))[1],
    "autograd": lambda m: torch.autograd.grad(m.net(m.x.requires_grad_()).sum(), m.x, create_graph=True)[0],
}


@pytest.mark.parametrize("name", BY_INPUTS)
@pytest.mark.filterwarnings("ignore:unit scaling")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_model_trained_on_its_derivatives_by_inputs_trains_alike_in_both_storages(name: str) -> None:
    found = []
    for storage in ("folded", "unit"):
        model = Learner(lambda m: m.error() + 0.1 * (BY_INPUTS[name](m) - m.x.detach().cos()).square().mean())
        plan = unit_scale(model, lambda m: m(), storage=storage)
        assert plan.changes_training
        assert not any(p.reason for p in plan.parameters.values())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scale_learning_rates(optimizer, plan)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-7)


def test_a_batched_product_reads_no_memory_that_nobody_wrote() -> None:
    """Freed memory full of NaN, which is where the next tensors are made."""
    torch.manual_seed(0)
    xs, weight = torch.randn(3, 5, 3), torch.randn(4, 3)
    for _ in range(20):
        torch.full((), torch.nan)  # freed at once
        found = vmap(lambda x: ScaledProduct.apply(x, weight, None, 2.0, 1.0))(xs)
        torch.testing.assert_close(found, 2 * xs @ weight.T)


def test_scaled_products_have_derivatives_of_every_kind() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in [(5, 3), (4, 3), (4,)])
    call = lambda x, weight, bias: scaled_linear(x, weight, bias, 0.3, 2.0)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))
    plain = lambda x, weight, bias: 0.3 * x @ weight.T + 2.0 * bias  # noqa: E731
    for transform in (jacfwd, hessian):
        for argument in range(3):
            ours = transform(lambda *a: call(*a).sin(), argnums=argument)(x, weight, bias)
            theirs = transform(lambda *a: plain(*a).sin(), argnums=argument)(x, weight, bias)
            torch.testing.assert_close(ours, theirs)
