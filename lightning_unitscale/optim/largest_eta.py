"""Rates beyond the largest η that a scheme has use for, where a learning rate has its ordinary meaning.

With lr_units="standard" a hidden weight keeps the relative step that it had in the untouched model. In the scheme's
own units that is

    η = lr · step_limit · relative_lr / unit_lr        under Adam; of another family what its `eta` says

and in u-μP a step of η = 1 changes what a layer makes of an input that it is aligned with by RMS 1: by as much as there
is. Untouched models bear rates that are far beyond that. Drawn small (std 0.02 in a narrow layer), their weights first
grow by such steps, until the steps are small beside them; scaled ones need not grow, and are thrown about instead. So

    if mean η > largest_eta       rates of weights × largest_eta / mean η

with the geometric mean over the model's hidden weights, at the largest rate of its schedule that its groups tell. Gains
and biases keep the user's. The whole schedule is multiplied, its warm-up and its decay too, and so is weight decay
beside the gradient (lr · weight_decay), as if the user's rate were that much lower. Higher rates thus all train weights
alike, at the largest useful one; `hyperparameters={"eta_most": …}` moves it, and with lr_units="umup" there is none.

An optimizer that has taken steps goes on with what the plan says: its rate may have been reduced since they began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log2
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES
from lightning_unitscale.engine.plan.factors import Factor, geometric_mean
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, Family
from lightning_unitscale.engine.record.spread_tensors import plain_name
from lightning_unitscale.optim.families import family_of_group

SOURCE = "see optim/largest_eta.py"


def peak_rate(group: Mapping[str, Any]) -> float:
    """The largest learning rate of a parameter group's schedule, as far as torch's schedulers write it down."""
    return max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))


def limit_eta(optimizer: Optimizer, plan: Plan, module: nn.Module, family: str) -> None:
    """Bring the rates of an optimizer that has taken no step yet to the plan's largest η, in the plan.

    Args:
        plan: in force on `module`.
        family: of the groups that name none; each family is limited apart.
    """
    if plan.largest_eta is None or optimizer.state:
        return
    for name in dict.fromkeys(family_of_group(group) or family for group in optimizer.param_groups):
        if rates := list(_rates(plan, module, optimizer, family, name)):
            _limit(plan, rates, FAMILIES[name], plan.largest_eta)


def _limit(plan: Plan, rates: list[tuple[ParameterPlan, float]], family: Family, largest: float) -> None:
    peak, own = max(lr for _, lr in rates), {parameter.name: lr for parameter, lr in rates}
    # of all, those too that another process or optimizer steps: ZeroRedundancyOptimizer has a share of them in each
    etas = [
        own.get(parameter.name, peak) * (family.eta(parameter) or 0.0)
        for parameter in plan.parameters.values()
        if parameter.role == "hidden"
        and parameter.initial_rms
        and _is_ours(parameter)
        and own.get(parameter.name, peak)
    ]
    eta = geometric_mean(etas) if etas else 0.0
    factors = []
    if eta > largest:
        # to a sixteenth of an octave, as all rates, so that the rounding of either storage makes no other plan
        value = float(2 ** (round(16 * log2(largest / eta)) / 16))
        of = f"{len(etas)} hidden weights at a rate of {peak:g}"
        factors = [Factor(value, f"mean η = {eta:.3g} of {of}, limited to {largest:g}", SOURCE)]
    for parameter, _ in rates:
        parameter.set_constant("eta_limit", factors)


def _rates(
    plan: Plan, module: nn.Module, optimizer: Optimizer, otherwise: str, family: str
) -> Iterator[tuple[ParameterPlan, float]]:
    """The scaled weights in a family's groups, each with its largest rate, but those whose multiplier is set."""
    names: dict[Tensor, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if plain_name(name) in plan.parameters:
            names.setdefault(parameter, plain_name(name))
    for group in optimizer.param_groups:
        if (family_of_group(group) or otherwise) != family:
            continue
        for known in (plan.parameters[names[p]] for p in group["params"] if p in names):
            if known.role in WEIGHT_ROLES and _is_ours(known) and FAMILIES[family].eta(known) is not None:
                yield known, peak_rate(group)


def _is_ours(parameter: ParameterPlan) -> bool:
    return not parameter.reason and parameter.lr_override is None
