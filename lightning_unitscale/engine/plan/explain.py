"""Why a parameter or a site has the numbers it has.

For a parameter, with U its value at RMS 1, F what the model's function sees and S what is stored (see `plan`):

    multiplier          F = multiplier · U: the scheme's rule, and factors of neighbours that fold into it
    initial value ×     U = initial value · this
    stored ×            S = stored · U
    forward pass ×      what of a use's multiplier is not stored
    learning rate ×     on the user's, for Adam-like optimizers; weight decay and eps to match

Each is the product of factors, and each factor says what caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.plan.fold import primary_use_of
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.near_names import near_glob


@dataclass(frozen=True)
class Quantity:
    """A number of the plan and the factors it is the product of."""

    name: str
    value: float
    factors: Sequence[Factor]

    def __str__(self) -> str:
        lines = [f"  {self.name:16} {self.value:.6g}"]
        for position, factor in enumerate(self.factors):
            lines.append(f"    {'=' if position == 0 else '×'} {factor}")
        return "\n".join(lines)


def explain(plan: Plan, name: str) -> str:
    """The text of `Plan.explain`."""
    if name in plan.parameters:
        parameter = plan.parameters[name]
        head = f"{name}: {parameter.role}, shape {list(parameter.shape)}, {plan.scheme} in {plan.storage} storage"
        if parameter.reason:
            head += f"\n  left alone: {parameter.reason}"
        gradient = [_gradient_line(parameter)] if parameter.divided_gradient else []
        return "\n".join([head, *map(str, quantities(plan, name)), *gradient])
    if inside := _inside(plan, name):
        return "\n\n".join(explain(plan, part) for part in inside)
    sites = _sites_called(plan, name)
    return "\n\n".join("\n".join([_head(site), *map(str, _of_site(plan, site))]) for site in sites)


def quantities(plan: Plan, name: str) -> list[Quantity]:
    """The numbers of a parameter or of the sites of that name.

    Raises:
        UnitScalingError: there is no such name.
    """
    if name not in plan.parameters:
        return [quantity for site in _sites_called(plan, name) for quantity in _of_site(plan, site)]
    parameter = plan.parameters[name]
    found = [
        Quantity("multiplier", parameter.multiplier, _multiplier_factors(plan, parameter)),
        Quantity("initial value ×", parameter.initial_factor, parameter.causes.get("initial_factor", [])),
        Quantity("stored ×", parameter.stored, _stored_factors(plan, parameter)),
    ]
    for site in plan.sites:
        for key, factor in site.factors.items():
            if factor != 1.0 and name in ParameterKey(key).names:
                found.append(
                    Quantity("forward pass ×", factor, [Factor(factor, f"left of its multiplier at {site.name}")])
                )
    return [*found, *_step_quantities(plan, parameter)]


def folded_into(plan: Plan, key: str, op: str) -> list[Factor]:
    """The factors of parameter-free sites whose constants the weight `key` takes at its calls of `op`."""
    return [
        Factor(factor.value, f"{factor.cause}; of the {site.role} {site.name}, folded", factor.source)
        for site in plan.sites
        if (key, op) in site.fold_into and not site.beside
        for factor in site.causes.get("", [])
    ]


def _multiplier_factors(plan: Plan, parameter: ParameterPlan) -> list[Factor]:
    use = primary_use_of(plan, parameter.name)
    if parameter.fixed:
        return [Factor(parameter.multiplier, "its initial RMS: it is used in an expression, whose scale is kept")]
    if use is None:
        return []
    key, op = use
    site = next(site for site in plan.sites if site.op == op and key in site.multipliers)
    return [*site.causes.get(key, []), *folded_into(plan, key, op)]


def _stored_factors(plan: Plan, parameter: ParameterPlan) -> list[Factor]:
    if parameter.stored == 1.0:
        return []
    cause = "its multiplier, in folded storage" if plan.storage == "folded" else "its own multiplier"
    if parameter.stored_whole:
        cause += ", as a hand-written autograd.Function uses it"
    return [Factor(parameter.stored, "the scale that it has" if parameter.fixed else cause)]


def _step_quantities(plan: Plan, parameter: ParameterPlan) -> list[Quantity]:
    """What an Adam-like optimizer with decoupled weight decay is told."""
    scale = plan.step_scales("adam", decoupled_decay=True)[parameter.name]
    return [
        Quantity("learning rate ×", scale.lr, _rate_factors(plan, parameter)),
        Quantity("weight decay ×", scale.weight_decay, _decay_factors(parameter, scale)),
        Quantity("eps ×", scale.eps, _eps_factors(parameter, scale)),
    ]


def _decay_factors(parameter: ParameterPlan, scale: StepScale) -> list[Factor]:
    own = parameter.causes.get("decay", []) if parameter.decay != 1.0 else []
    limits = parameter.causes.get("eta_limit", [])
    kept = scale.weight_decay / parameter.decay / parameter.eta_limit
    return [*own, *limits, *_unless_one(kept, "lr · weight decay is kept")]


def _eps_factors(parameter: ParameterPlan, scale: StepScale) -> list[Factor]:
    if parameter.unit_eps is None:
        return _unless_one(scale.eps, "multiplier / stored: the gradient is larger by as much")
    return [
        *parameter.causes["unit_eps"],
        *_unless_one(scale.eps / parameter.unit_eps, "1 / stored: the gradient of U, said of what is stored"),
    ]


def _gradient_line(parameter: ParameterPlan) -> str:
    d = prod(parameter.shape)
    return f"  gradient ÷       max|gradient| / √{d}: of each step, as the optimizer sees it; .grad stays the true one"


def _rate_factors(plan: Plan, parameter: ParameterPlan) -> list[Factor]:
    if parameter.lr_override is not None:
        return [Factor(parameter.lr_override, "set by overrides")]
    if not plan.changes_training:
        return []
    name = "relative_lr" if plan.lr_units == "standard" else "unit_lr"
    stored = abs(parameter.stored) if plan.lr_units == "standard" else parameter.stored
    limits = [*parameter.causes.get("step_limit", []), *parameter.causes.get("eta_limit", [])]  # "standard" alone
    return [
        *parameter.causes.get(name, []),
        *limits,
        *_unless_one(stored, "stored: a step of U, said of what is stored"),
    ]


def _unless_one(value: float, cause: str) -> list[Factor]:
    return [] if value == 1.0 else [Factor(value, cause)]


def _of_site(plan: Plan, site: Site) -> list[Quantity]:
    if not site.params:
        return [Quantity("multiplier", site.multiplier, site.causes.get("", []))]
    return [Quantity(key, value, site.causes.get(key, [])) for key, value in site.multipliers.items()]


def _head(site: Site) -> str:
    kept = "folded into weights" if site.folded else "explicit in the forward pass"
    head = f"{site.name}: {site.role}, {kept}"
    if site.fold_into and site.folded:
        head += f" ({', '.join(key for key, _ in site.fold_into)})"
    return head + (f"\n  {site.reason}" if site.reason else "")


def _inside(plan: Plan, module: str) -> list[str]:
    """The parameters of a module and of those in it, and their sites, in the plan's order."""
    sites = dict.fromkeys(
        site.name for site in plan.sites if site.module == module or site.module.startswith(f"{module}.")
    )
    return [*(name for name in plan.parameters if name.startswith(f"{module}.")), *sites]


def _sites_called(plan: Plan, name: str) -> list[Site]:
    aliased = [p.name for p in plan.parameters.values() if name in p.aliases]
    if aliased:
        raise UnitScalingError(f"{name!r} is another name of {aliased[0]!r}; ask for that.")
    sites = [site for site in plan.sites if site.name == name]
    if not sites:
        known = [*plan.parameters, *(site.name for site in plan.sites)]
        raise UnitScalingError(f"the plan has no parameter, module or site {name!r}. {near_glob(name, known)}")
    return sites
