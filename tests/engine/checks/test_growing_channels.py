"""What static scales do when a channel of the activations grows while a model trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import Plan, recalibrating, unit_scale

CHANNELS = 64
AGAIN = 5  # the step at which scales are measured again


def trained(growth: float, steps: int = AGAIN) -> tuple[Plan, nn.Module, Tensor]:
    """A layer whose input's first channel is larger by `growth` from step 2 on, after so many steps."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(CHANNELS, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(256, CHANNELS)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8", recalibrate=[AGAIN])
    x[:, 0] *= growth
    for step in range(2, steps + 1):
        with recalibrating(plan, step):
            model(x).square().mean().backward()
    return plan, model, x


def first_site(plan: Plan) -> dict[str, float]:
    (site,) = (site for site in plan.sites if site.params[0] == "0.weight" and site.op == "linear")
    return site.measured["x"]


def test_growth_of_2_to_the_6_fits_the_scale_that_was_measured_before() -> None:
    """At RMS 1, e4m3 has room for 448; the scale is brought down to the new RMS all the same."""
    before, _, _ = trained(1.0)
    after, model, x = trained(2.0**6)
    assert first_site(after)["saturated"] == 0  # of the casts with the scale from before
    assert first_site(after)["error"] < 0.03
    scales = [plan.cast_sites[0].operand_scales["x"] for plan in (before, after)]
    assert scales[0] == 1
    assert scales[1] == pytest.approx(1 / 8)  # RMS √((63 + 2^12) / 64) ≈ 8
    exact = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    assert float((model[0](x) - exact).norm().detach() / exact.norm()) < 0.04


def test_growth_beyond_the_range_is_caught_at_the_next_measurement() -> None:
    """A cast that bad is measured once more on the step after; had that not helped, it would be left out by name."""
    caught, _, _ = trained(2.0**12)
    assert first_site(caught)["saturated"] > 0.005
    assert first_site(caught)["error"] > 0.5
    after, model, x = trained(2.0**12, steps=AGAIN + 1)
    assert after.measured_at[-2:] == [AGAIN, AGAIN + 1]
    assert first_site(after)["saturated"] == 0
    scale = after.cast_sites[0].operand_scales["x"]
    assert scale * float(x.abs().max()) <= 448
    exact = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    assert float((model[0](x) - exact).norm().detach() / exact.norm()) < 0.05
