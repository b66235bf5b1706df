"""Casts in models that are compiled, checkpointed or adapted."""

import threading
from pathlib import Path

import peft
import pytest
import torch
from support import zoo
from support.prepared import compiled_losses, prepared
from support.training import fit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import (
    UnitScaling,
    unit_scale,
)
from lightning_unitscale.engine.checks.calibration import Calibration


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-sdpa", "einsum-attention", "tied-embedding", "conv-transformer", "lora"])
def test_compiled_without_breaks_or_recompilation(name: str) -> None:
    case = zoo.CASES[name]
    model, plan = prepared(case, format="fp8", verify=False)
    compiled_losses(case, model, plan, (1.0, 4.0, 0.25))


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant
        self.first = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.model(x)
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    found = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), how)
        x = torch.randn(64, 32)
        plan = unit_scale(model, lambda m, x=x: m(x).square().mean(), "preserve", format="fp8")
        loss = model(x).square().mean()
        loss.backward()
        scales = {site.name: site.operand_scales for site in plan.cast_sites}
        found.append((loss.item(), scales, [p.grad for p in model.parameters()]))
    assert found[0][:2] == found[1][:2]
    assert len(found[0][1]) == 3
    assert all(torch.equal(one, other) for one, other in zip(found[0][2], found[1][2], strict=True))


@pytest.mark.parametrize("own_thread", [False, True])
def test_gradients_are_seen_where_layers_run_again_in_the_backward_pass(own_thread: bool) -> None:
    """Checkpointed the reentrant way: on CUDA in a thread of autograd's, in which no mode is entered."""
    torch.manual_seed(0)
    model = Checkpointed(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), True)
    x = torch.randn(64, 32)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    measurement = Calibration(model, plan, (1,))
    for site in plan.cast_sites:
        site.measured = {}
    with measurement.observe(1):
        loss = model(x).square().mean()
        if own_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
    measurement.finish()
    assert all(set(site.measured) == {"x", "weight", "gradient"} for site in plan.cast_sites)


@pytest.mark.filterwarnings("ignore:unit scaling")
def test_peft(tmp_path: Path) -> None:
    case = zoo.CASES["llama-sdpa"]
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    module = zoo.CaseModule(case)
    module.model = peft.get_peft_model(module.model, config)
    callback = UnitScaling("preserve", format="fp8", recalibrate=(1000,))
    fit(tmp_path, callback, module=module, data=zoo.loader(case, 6), max_steps=6)
    assert callback.plan is not None
    adapters = {site.params[0]: site for site in callback.plan.cast_sites if "lora_" in site.params[0]}
    assert len(adapters) == 8
    for name, site in adapters.items():  # B starts at 0, and so do the gradients of A's product
        assert set(site.measured) == {"x", "weight", "gradient"}, name
        assert site.operand_scales["gradient"] > 1
        assert site.operand_scales["weight"] > 1
