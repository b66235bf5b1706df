"""Whose code a torch call is: factors stand in frames that a scope can be put on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale


class Attention(nn.Module):
    """Attention as diffusers has it: the projections are here, the computation in a processor."""

    def __init__(self, processor: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.processor(self, x)


def attend(attention: Attention, x: Tensor) -> Tensor:
    q, k, v = (layer(x)[:, None] for layer in (attention.to_q, attention.to_k, attention.to_v))
    return attention.to_out(F.gelu(F.scaled_dot_product_attention(q, k, v)[:, 0]))


class PlainProcessor:
    """No module."""

    def __call__(self, attention: Attention, x: Tensor) -> Tensor:
        return attend(attention, x)


class ModuleProcessor(nn.Module):
    """A module that is called past `nn.Module.__call__`."""

    def __call__(self, attention: Attention, x: Tensor) -> Tensor:
        return attend(attention, x)


PROCESSORS = {"function": attend, "object": PlainProcessor(), "module": ModuleProcessor()}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_processor_computes_belongs_to_the_module_that_calls_it(name: str) -> None:
    torch.manual_seed(1)
    x, found = torch.randn(2, 4, 8, dtype=torch.float64), []
    for storage in ("folded", "unit"):
        model = nn.Sequential(Attention(PROCESSORS[name]), nn.Linear(8, 2, dtype=torch.float64))
        plan = unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
        assert {site.module for site in plan.sites if site.ordinal is not None} == {"0"}
        found.append(model(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
