"""What the tests of casts share: a model of two layers, the cast function by hand, a plain loop."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import (
    recalibrating,
    scale_learning_rates,
    unit_scale,
)
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.formats import cast
from support.training import build
from support.zoo_batches import next_token_batch


def is_eager() -> bool:
    """Whether compiled functions run uncompiled, as they would under a compile stance that was left behind."""
    compiled = torch.compile(lambda x: torch.compiler.is_compiling(), backend="eager")
    torch._dynamo.reset()
    return not compiled(torch.ones(1))


def two_layers(**options: Any) -> tuple[nn.Sequential, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    x = torch.randn(64, 32)
    return model, unit_scale(model, lambda m: m(x).square().mean(), "preserve", **{"format": "fp8", **options})


def by_hand(model: nn.Sequential, x: Tensor, plan: Plan) -> Tensor:
    for position in (0, 2):
        site = next(site for site in plan.cast_sites if site.params[0] == f"{position}.weight")
        layer, (sx, sw) = model[position], (site.operand_scales[operand] for operand in ("x", "weight"))
        x_hat = cast(x, torch.float8_e4m3fn, sx).float() / sx
        w_hat = cast(layer.weight, torch.float8_e4m3fn, sw).float() / sw
        x = F.linear(x_hat, w_hat, layer.bias)
        x = F.relu(x) if position == 0 else x
    return x


OPTIONS: dict[str, Any] = {"format": "fp8"}


def assert_same_state_but_marker(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def plain_loop(steps: int, batches_a_step: int = 1, *, schedule: bool = True, **options: Any) -> tuple[Any, Plan]:
    """As `fit` does it, without Lightning."""
    model = build(batch_norm=False)
    plan = unit_scale(model, lambda m: m.loss(next_token_batch(0)), **OPTIONS, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scale_learning_rates(optimizer, plan)
    losses = []
    for step in range(steps):
        with recalibrating(plan, step) if schedule else nullcontext():
            for _ in range(batches_a_step):
                loss = model.loss(next_token_batch(step)) / batches_a_step
                loss.backward()
        losses.append(float(loss) * batches_a_step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, plan
