"""A matmul-like op is one row of a known class, or one class and its row: planned, scaled in either storage, exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import Plan, unit_scale
from lightning_unitscale.ops import MATMULS, FunctionCall, Matmul
from lightning_unitscale.ops.linear import AddMm

WIDTH = 16


@torch.library.custom_op("toy::cyclic", mutates_args=())
def cyclic(x: Tensor, weight: Tensor) -> Tensor:
    """Each row of x: (n, d), convolved around the circle with the weight: (d,)."""
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(weight), x.shape[-1])


def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    gx, gw = (torch.fft.irfft(torch.fft.rfft(g) * torch.fft.rfft(t).conj(), WIDTH) for t in (weight, x))
    return gx, gw.sum(0)


cyclic.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# ---------------------------------------------------------------------------------------------------------------------
# All that is new: a row for one of torch's own functions, a class and its row for a kernel
# ---------------------------------------------------------------------------------------------------------------------

ADDMV = AddMm("addmv", bias="input", left="mat", right="vec")


class Cyclic(Matmul):
    def fan_in(self, call: FunctionCall, label: str) -> int:
        return int(self.operands(call)["weight"].shape[-1])


CYCLIC = Cyclic("toy.cyclic.default", torch.ops.toy.cyclic.default, x="x", weight="weight")

# ---------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, new: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.new = new
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH) * 0.2), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.new(self, self.first(x)))


FUNCTIONS: list[tuple[Matmul, Callable[[Net, Tensor], Tensor]]] = [
    (ADDMV, lambda net, x: x * torch.addmv(net.bias, x, net.weight, beta=2, alpha=3).unsqueeze(-1)),
    (CYCLIC, lambda net, x: cyclic(x, net.weight) + net.bias[:1]),
]
each_op = pytest.mark.parametrize(("op", "function"), FUNCTIONS, ids=("row", "class"))


def prepared(function: Callable[[Net, Tensor], Tensor], **options: Any) -> tuple[nn.Module, Plan, Tensor]:
    """A model in double precision, its plan, and its input."""
    torch.manual_seed(0)
    model, x = Net(function).double(), torch.randn(8, WIDTH, dtype=torch.float64)
    return model, unit_scale(model, lambda m: m(x).square().mean(), **options), x


@each_op
def test_what_is_not_known_is_left_alone_and_said(op: Matmul, function: Any) -> None:
    _, plan, _ = prepared(function)
    assert ("weight", "used in a way no rule is known for") in plan.skipped


@each_op
def test_one_line_makes_it_known(op: Matmul, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATMULS, op.name, op)
    _, plan, _ = prepared(function, format="fp8")
    (site,) = (site for site in plan.sites if "weight" in site.params)
    assert (plan.roles["weight"], site.op, site.reason) == ("hidden", op.name, "")
    assert site.multipliers["weight"] == WIDTH**-0.5
    assert site.format_reason in ("one operand is a vector", "toy.cyclic.default has no product with cast operands")


@each_op
def test_it_is_exact_in_either_storage(op: Matmul, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded, the model is plain code; in unit storage it is the same function, with gradients a/stored as large."""
    monkeypatch.setitem(MATMULS, op.name, op)
    found = {}
    for storage in ("folded", "unit"):
        model, plan, x = prepared(function, storage=storage)
        y = model(x)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(y.square().mean(), parameters), strict=True))
        of_function = {n: g * plan.parameters[n].stored / plan.parameters[n].multiplier for n, g in gradients.items()}
        found[storage] = {"output": y, **of_function}
        rms = float(model.get_parameter("weight").detach().square().mean().sqrt())
        assert rms == pytest.approx(WIDTH**-0.5 if storage == "folded" else 1)
        assert plan.is_plain == (storage == "folded")
        assert torch.equal(copy.deepcopy(model)(x), y)
    for name, expected in found["folded"].items():
        torch.testing.assert_close(found["unit"][name], expected, rtol=1e-12, atol=1e-12)
