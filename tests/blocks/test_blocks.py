"""The three blocks by hand: the article's two examples, autograd, the compiler, copies, and beside the callback."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.training import fit
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightning_unitscale import (
    ActivationScaling,
    GradientScaling,
    UnitScaling,
    UnitScalingError,
    WeightScaling,
    scale_activation,
    scale_gradient,
    scale_weight,
    unit_scale,
)

ROOT2 = 2**0.5


# ---------------------------------------------------------------------------------------------------------------------
# The article's two examples
# ---------------------------------------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    """10 → 1, with the three blocks around `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = WeightScaling(nn.Linear(10, 1))
        self.activation = ActivationScaling()
        self.gradient = GradientScaling()

    def forward(self, x: Tensor) -> Tensor:
        return self.gradient(self.activation(self.fc(x)))


def test_simple_model_by_hand() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(10, 1)
    model = SimpleModel()
    model.fc = WeightScaling(copy.deepcopy(plain))
    alpha = float(plain.weight.detach().abs().max()) / 10**0.5
    assert model.fc.scale.item() == pytest.approx(alpha)
    assert model.fc.module.weight.abs().max().item() == pytest.approx(10**0.5)

    x = torch.randn(4, 10)
    f = F.linear(x, plain.weight / alpha, plain.bias)
    beta = float(f.detach().abs().max()) / 4**0.5  # four elements: one of each example
    assert torch.allclose(model(x), f / beta)
    assert model(x).abs().max().item() == pytest.approx(2.0)


def test_linear_regression_by_hand() -> None:
    """θ = [3, 4], loss (w₁ + w₂ - 1)²: α = 4/√2, and the loss of θ/α is not the loss over α, nor over α²."""

    def loss_of(theta: Tensor) -> Tensor:
        return (theta.sum() - 1) ** 2

    theta = torch.tensor([3.0, 4.0], requires_grad=True)
    alpha = 4 / ROOT2
    scaled = scale_weight(theta)
    assert scaled.tolist() == pytest.approx([3 / alpha, ROOT2])
    assert loss_of(theta).item() == 36
    assert loss_of(scaled).item() == pytest.approx((7 * ROOT2 / 4 - 1) ** 2)
    assert loss_of(scaled).item() != pytest.approx(36 / alpha, rel=0.1)
    assert loss_of(scaled).item() != pytest.approx(36 / alpha**2, rel=0.1)

    # The gradient is [12, 12]: γ = 12/√2, and g / γ = [√2, √2]
    loss_of(scale_gradient(theta)).backward()
    assert theta.grad is not None
    assert theta.grad.tolist() == pytest.approx([ROOT2, ROOT2])


def test_an_activation_by_hand() -> None:
    f = torch.tensor([3.0, -4.0])
    assert scale_activation(f).tolist() == pytest.approx([3 * ROOT2 / 4, -ROOT2])
    assert scale_activation(f, 2.0).tolist() == [1.5, -2.0]
    rows = torch.tensor([[3.0, -4.0], [0.3, -0.4]])
    assert torch.allclose(scale_activation(rows, dim=-1), scale_activation(f).expand(2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------

FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": scale_weight,
    "weight, fixed": lambda t: scale_weight(t, 3.0),
    "activation": scale_activation,
    "activation, fixed": lambda t: scale_activation(t, 3.0),
    "activation, by position": lambda t: scale_activation(t, dim=-1),
    "activation, by channel": lambda t: scale_activation(t, dim=(0, 2)),
    "gradient of 1": lambda t: scale_gradient(t, 1.0),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_are_true_where_the_block_is_a_function(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(FORWARDS[name], (x,))


def test_a_detached_scale_is_a_constant_in_the_backward_pass() -> None:
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    scale_activation(x, detach=True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([ROOT2 / 4, ROOT2 / 4])
    x.grad = None
    scale_activation(x).sum().backward()
    assert float(x.grad @ x.detach()) == pytest.approx(0, abs=1e-6)  # the result does not change with the scale of x


@pytest.mark.parametrize("scale", [None, 4.0])
def test_a_gradient_is_divided_and_nothing_else(scale: float | None) -> None:
    x, g = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    (found,) = torch.autograd.grad(y, x, g)
    expected = g / (4.0 if scale else g.abs().max() / 12**0.5)
    assert torch.allclose(found, expected)
    (zero,) = torch.autograd.grad(scale_gradient(x, scale), x, torch.zeros(3, 4))
    assert torch.equal(zero, torch.zeros(3, 4))


def test_what_is_all_zero_is_left_alone() -> None:
    assert torch.equal(scale_weight(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(scale_activation(torch.zeros(2, 3), dim=-1), torch.zeros(2, 3))
    block = WeightScaling(_zeroed(nn.Linear(3, 3)))
    assert block.scale == 1


def _zeroed(module: nn.Linear) -> nn.Linear:
    nn.init.zeros_(module.weight)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# As modules
# ---------------------------------------------------------------------------------------------------------------------


def small_net(keep_function: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        WeightScaling(nn.Linear(10, 8), keep_function=keep_function),
        nn.Tanh(),
        ActivationScaling(dim=-1),
        GradientScaling(),
        nn.Linear(8, 1),
    )


def run(net: Callable[[Tensor], Tensor], parameters: Any) -> tuple[float, list[Tensor]]:
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    loss = net(x).square().mean()
    return loss.item(), list(torch.autograd.grad(loss, list(parameters)))


@pytest.mark.parametrize("keep_function", [False, True])
@pytest.mark.parametrize("how", ["compiled", "deepcopy", "pickle", "state dict"])
def test_the_same_net_in_another_form(how: str, keep_function: bool) -> None:
    net = small_net(keep_function)
    loss, gradients = run(net, net.parameters())
    other: Any = net
    if how == "compiled":
        torch._dynamo.reset()
        other = torch.compile(net, fullgraph=True, backend="aot_eager")
    elif how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        other = small_net(keep_function)
        nn.init.normal_(other[0].module.weight)
        other[0].scale.fill_(7.0)
        other.load_state_dict(net.state_dict())
    found_loss, found = run(other, other.parameters())
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for one, another in zip(found, gradients, strict=True):
        assert torch.allclose(one, another, rtol=1e-5, atol=1e-7)


def test_the_functions_compile_in_one_graph() -> None:
    def all_three(t: Tensor) -> Tensor:
        return scale_gradient(scale_activation(scale_weight(t), dim=0)).square().sum()

    torch._dynamo.reset()
    t = torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    assert compiled(t).item() == pytest.approx(all_three(t).item())
    (found,), (expected,) = torch.autograd.grad(compiled(t), t), torch.autograd.grad(all_three(t), t)
    assert torch.allclose(found, expected)


def test_a_weight_that_keeps_its_function_is_stored_divided() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    block = WeightScaling(copy.deepcopy(plain), keep_function=True)
    x = torch.randn(2, 4)
    assert torch.allclose(block(x), plain(x))
    assert torch.allclose(block.module.weight * block.scale, plain.weight)
    block(x).sum().backward()
    plain(x).sum().backward()
    assert torch.allclose(block.module.weight.grad, block.scale * plain.weight.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the callback
# ---------------------------------------------------------------------------------------------------------------------


class Handmade(pl.LightningModule):
    """All three blocks in one net, and one layer that nothing was done to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.gradient = GradientScaling()
        self.by_hand = WeightScaling(nn.Linear(8, 8, bias=False))
        self.activation = ActivationScaling(dim=-1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.by_hand(self.gradient(torch.tanh(self.first(x))))
        return self.head(self.activation(F.relu(h)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("scheme", ["umup", "amax"])
def test_what_is_scaled_by_hand_is_not_scaled_again_and_the_plan_says_so(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Handmade(), UnitScaling(scheme, storage="unit")
    before = module.by_hand.module.weight.detach().clone()
    data = torch.randn(1, 4, 6)
    fit(tmp_path, callback, module=module, data=torch.utils.data.DataLoader(data, batch_size=None), max_steps=1)
    plan = callback.plan
    assert plan is not None
    name = "by_hand.module.weight"
    assert plan.parameters[name].reason == "scaled by hand: WeightScaling at by_hand"
    assert plan.parameters[name].stored == plan.lr_multipliers[name] == 1
    assert torch.allclose(module.by_hand.module.weight, before, atol=2e-3)  # one step of 1e-3 and its decay
    (relu,) = [site for site in plan.sites if site.op == "relu"]
    assert relu.multiplier == 1
    assert relu.reason == "its output is scaled by hand"
    text = plan.summary()
    assert "activations are scaled by hand" in text
    assert "the gradients of 2 parameters are scaled by hand" in text
    assert plan.divided_gradients == (set() if scheme == "umup" else {"head.weight", "head.bias"})


def test_the_functional_form_is_seen_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(scale_activation(F.relu(F.linear(x, scale_weight(self.w))), 2.0))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 6)
    plan = unit_scale(model, lambda net: net(x).square().mean())
    assert plan.parameters["w"].reason == "scaled by hand: scale_weight at <root>.forward"
    assert any("scale_activation at <root>.forward" in note for note in plan.notes)
    (relu,) = [site for site in plan.sites if site.op == "relu"]
    assert relu.multiplier == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_scale_that_is_no_positive_number_is_refused(scale: Any) -> None:
    for make in (
        ActivationScaling,
        GradientScaling,
        lambda s: WeightScaling(nn.Linear(2, 2), s),
        lambda s: scale_weight(torch.ones(2), s),
        lambda s: scale_activation(torch.ones(2), s),
        lambda s: scale_gradient(torch.ones(2), s),
    ):
        with pytest.raises(UnitScalingError, match=r"scale=.* must be a number above 0"):
            make(scale)


def test_a_tensor_without_elements_has_no_scale() -> None:
    for function in (scale_weight, scale_activation, scale_gradient):
        with pytest.raises(UnitScalingError, match=rf"{function.__name__}: a tensor of shape \[0, 3\] has no elements"):
            function(torch.zeros(0, 3))


def test_a_weight_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnitScalingError, match=r"Linear has no parameter 'wieght'; it has weight, bias"):
        WeightScaling(nn.Linear(2, 2), name="wieght")
    with pytest.raises(UnitScalingError, match="has no values yet"):
        WeightScaling(nn.Linear(2, 2, device="meta"))
    with pytest.raises(UnitScalingError, match=r"torch\.int64 can't be divided"):
        scale_activation(torch.ones(2, dtype=torch.int64))
