"""Casts in every model: each of a plan's is made, and gradients are those of the cast operands."""

import pytest
import torch
from support import zoo
from support.prepared import gradients, prepared
from torch.nn import functional as F

from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.ops import MATMULS

QUICK = (
    "gpt2-eager",
    "llama-sdpa",
    "einsum-attention",
    "multihead-attention",
    "experts-grouped",
    "weight-norm",
    "lora",
)
EXACT_ENOUGH = 0.9  # of the gradient as a whole; tiny models with batch norm on four samples amplify any rounding
ILL_CONDITIONED = ("resnet", "unet", "albert", "t5-sdpa", "t5-eager")


@pytest.mark.parametrize("options", [{"storage": "folded"}, {"storage": "unit"}, {"scheme": "preserve"}], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in zoo.CASES]
)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_every_model(name: str, options: dict[str, str]) -> None:
    case = zoo.CASES[name]
    plain, _ = prepared(case, **options)
    model, plan = prepared(case, format="fp8", **options)
    for site in plan.sites:
        if site.params and site.op in MATMULS:
            assert (site.format == "fp8") != bool(site.format_reason), site.name
    assert plan.cast_sites
    assert len(casts_in_force(model)) == len({(site.params[0], site.op) for site in plan.cast_sites})
    (loss, exact), (found, narrow) = (gradients(case, module, seed=1) for module in (plain, model))
    assert float(found) == pytest.approx(float(loss), rel=0.03)
    assert exact.keys() == narrow.keys()
    whole = [torch.cat([grads[name].flatten() for name in exact]) for grads in (exact, narrow)]
    if name not in ILL_CONDITIONED:
        assert float(F.cosine_similarity(*whole, dim=0)) > EXACT_ENOUGH
    assert all(gradient.isfinite().all() for gradient in narrow.values())


def test_all_of_a_plan_s_casts_are_made() -> None:
    """Counts the casts, so that a site that the plan has but the forward pass misses would show."""
    case = zoo.CASES["llama-sdpa"]
    model, plan = prepared(case, format="fp8")
    made = set()
    for use, site in casts_in_force(model).items():
        original = site._kept
        site._kept = lambda *a, use=use, original=original, **k: (made.add(use), original(*a, **k))[1]
    gradients(case, model)
    assert made == {(site.params[0], site.op) for site in plan.cast_sites}
