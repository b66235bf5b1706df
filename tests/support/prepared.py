"""Zoo models under a plan, and the optimizer that goes with one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import Plan, unit_scale
from lightning_unitscale.engine.runtime.install import casts_in_force
from support import zoo


def build(case: zoo.Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def prepared(case: zoo.Case, **options: Any) -> tuple[nn.Module, Plan]:
    """The case's model, prepared on its batch 0; options as for `unit_scale`."""
    model, batch = build(case), case.batch(0)
    return model, unit_scale(model, lambda module: case.loss(module, batch), **options)


def gradients(case: zoo.Case, model: nn.Module, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on batch `seed`, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = case.loss(model, case.batch(seed))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiled_losses(case: zoo.Case, model: nn.Module, plan: Plan, scales: Sequence[float]) -> list[float]:
    """Compile the model once and run it with its operand scales times each of `scales`: as eager mode runs it."""
    torch._dynamo.reset()
    graphs, losses = 0, []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(lambda batch: case.loss(model, batch), backend=backend, fullgraph=True)
    measured = {site.use: site.operand_scales for site in plan.cast_sites}
    for scale in scales:
        for site in plan.cast_sites:
            site.operand_scales = {operand: value * scale for operand, value in measured[site.use].items()}
            casts_in_force(model)[site.use].update()
        results = []
        for run in (compiled, lambda batch: case.loss(model, batch)):
            model.zero_grad()
            loss = run(case.batch(1))
            loss.backward()
            results.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        for one, other in zip(results[0][1], results[1][1], strict=True):
            assert torch.allclose(one, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()) + 1e-9)
        losses.append(results[0][0])
    assert graphs == 1
    return losses


def adamw(model: nn.Module, plan: Plan, lr: float = 1e-3, weight_decay: float = 0.1, eps: float = 1e-10) -> Any:
    """AdamW in which each parameter is a group of its own, with the plan's factors written into it."""
    scales = plan.step_scales("adam", decoupled_decay=True)
    groups = [
        {
            "params": [parameter],
            "lr": lr * scales[name].lr,
            "weight_decay": weight_decay * scales[name].weight_decay,
            "eps": eps * scales[name].eps,
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return torch.optim.AdamW(groups)


def train(case: zoo.Case, model: nn.Module, optimizers: list[Any], steps: int, batches: int = 4) -> list[float]:
    """The losses of `steps` steps over the batches 0 … batches-1, again and again."""
    losses = []
    for step in range(steps):
        loss = case.loss(model, case.batch(step % batches))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses
