"""From a prepared model to a plain one with the same function, however its factors have to be moved.

The engine's fold pass moves what has a weight of its own. What it leaves explicit is moved here:

    attention logits, q and k from one weight    into q's part of that weight and bias
    readout tied to the embedding                into what makes the readout's input: the last norm's gain and bias;
                                                 where that is used elsewhere too, the readout gets a weight of its own
    parametrized weight (weight norm)            through the parametrization's own inverse

These change how the model would train on, so they are for export alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.fold import folded_copy
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.engine.runtime.install import restore_parameters
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.export.replay import NotScalableError, scaled_parameters
from lightning_unitscale.in_force import forget, put_in_force
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.record_step import record

Forward = Callable[[nn.Module], Tensor]


def to_plain(model: nn.Module, forward: Forward) -> nn.Module:
    """A copy of the model whose stored weights and plain forward code are the function; the model is not changed.

    Args:
        model: prepared by unit scaling, or plain already.
        forward: `forward(model)` runs it on example inputs, and returns what must stay the same (the logits).

    Returns:
        The copy, in eval mode. A readout that got a weight of its own is no longer tied.

    Raises:
        UnitScalingError: a factor cannot be moved, naming its site; or the copy's outputs are not the model's, casts to
            narrow formats aside.
    """
    plain = copy.deepcopy(model).eval()
    plan = plan_of(plain)
    if plan is None:
        return plain
    expected = _without_casts(plain, plan, forward)
    folded = folded_copy(plan)
    restore_parameters(plain, plan, folded)
    forget(plain)
    if not folded.is_plain:
        _Mover(plain, folded, forward).move()
    with torch.no_grad():
        check_same(forward(plain), expected, type(model).__name__)
    return plain


def _without_casts(model: nn.Module, plan: Plan, forward: Forward) -> Tensor:
    """What the model gives in the dtype of its weights: casts to narrow formats are of the training, not the model."""
    exact = Plan.from_dict(plan.to_dict())
    for site in exact.sites:
        site.format = None
    forget(model)
    put_in_force(model, exact)
    with torch.no_grad():
        return forward(model)


def exact_outputs(model: nn.Module, forward: Forward) -> Tensor:
    """What a model gives, casts to narrow formats aside; it is not changed."""
    plan = plan_of(model)
    if plan is not None and plan.cast_sites:
        copied = copy.deepcopy(model).eval()
        return _without_casts(copied, plan, forward)
    with torch.no_grad():
        return forward(model)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / largest)


def check_same(found: Tensor, expected: Tensor, name: str) -> None:
    """
    Raises:
        UnitScalingError: they differ by more than 1e-5 in float32 (in other types, by as many roundings).
    """
    difference = relative_difference(found, expected)
    allowed = 84 * torch.finfo(expected.dtype).eps  # 1e-5 in float32
    if not difference <= allowed:
        raise UnitScalingError(
            f"{name}: the exported model's outputs differ from the model's by {difference:.1e} of the largest, more "
            f"than {allowed:.0e}. Nothing was written. Please report the model's config."
        )


class _Mover:
    """Moves the explicit factors of a plan into the parameters of a model that is plain but for them."""

    def __init__(self, model: nn.Module, plan: Plan, forward: Forward) -> None:
        self.model, self.plan = model, plan
        self.parameters = dict(model.named_parameters())
        self.structure = Structure(record(model, lambda _: forward(model).float().square().mean()))
        self.changes: dict[str, list[Tensor]] = defaultdict(list)

    def move(self) -> None:
        problems = []
        for site in self.plan.explicit_sites:
            try:
                self._move(site)
            except NotScalableError as error:
                problems.append(f"{site.name} ({site.role}: {error})")
        if problems:
            raise UnitScalingError(
                f"{len(problems)} factors cannot be moved into weights: {'; '.join(problems[:3])}"
                f"{' …' if len(problems) > 3 else ''}. Plain weights need a model without them: prepare it with "
                "activations=False (none on sums, attention and activation functions), or with these modules in skip. "
                "A program may keep them: torch.export.export(model, arguments)."
            )
        with torch.no_grad():
            for name, values in self.changes.items():
                self.parameters[name].copy_(values[0])

    def _move(self, site: Site) -> None:
        if site.role == "attention":
            for call in self._calls_of(site):
                attention = next(a for a in self.structure.attentions if a.call is call)
                self._scale(attention.query, call, site.factors[""])
        elif site.ordinal is None:
            for key, factor in site.factors.items():
                if factor != 1.0:
                    self._move_weight(site, key, factor)
        else:
            raise NotScalableError(site.reason or "no weight of its own takes it")

    def _calls_of(self, site: Site) -> list[Call]:
        calls = [attention.call for attention in self.structure.attentions]
        found = [call for call in calls if site.place in (call.place, call.place.at_every_call)]
        if not found:
            raise NotScalableError("the example inputs do not reach it")
        return found

    def _scale(self, value: Value, end: Call, factor: float) -> None:
        """Multiply a value; layers that share weights ask for the same change several times."""
        for name, changed in scaled_parameters(self.structure, value, end, factor, self.parameters).items():
            if any(not torch.equal(changed, other) for other in self.changes[name]):
                raise NotScalableError(f"{name} would need two different factors")
            self.changes[name].append(changed)

    # --- factors of weights -----------------------------------------------------------------------------------------

    def _move_weight(self, site: Site, key: str, factor: float) -> None:
        owner = ParameterKey(key).names[0].partition(".parametrizations.")
        if owner[1]:
            self._scale_parametrized(owner[0], owner[2].split(".")[0], factor)
            return
        calls = [
            call
            for call in self.structure.calls
            if call.name == site.op and any(v.key == key for v in call.inputs) and not call.output.parameters
        ]
        if not calls:
            raise NotScalableError("the example inputs do not reach it")
        for call in calls:
            try:
                self._scale(self._other_factor(call, key), call, factor)
            except NotScalableError:
                self._untie(call, key, factor)

    def _other_factor(self, call: Call, key: str) -> Value:
        """What the weight is multiplied with; for a gain, itself, as its expression (1 + w) is its own."""
        if call not in self.structure.sites:
            return next(v for v in call.inputs if v.key == key)
        operands = MATMULS[call.name].operands(call).values()
        moving = [v for v in operands if isinstance(v, Value) and v.is_float and not v.parameters]
        if len(moving) != 1:
            raise NotScalableError("its matmul has no single input")
        return moving[0]

    def _scale_parametrized(self, module: str, tensor: str, factor: float) -> None:
        owner = self.model.get_submodule(module)
        if not parametrize.is_parametrized(owner, tensor):
            raise NotScalableError("it enters through an expression without an inverse")
        try:
            with torch.no_grad():
                setattr(owner, tensor, getattr(owner, tensor) * factor)
        except (NotImplementedError, RuntimeError) as error:
            raise NotScalableError(f"its parametrization has no inverse ({error})") from error

    def _untie(self, call: Call, key: str, factor: float) -> None:
        """Give the module that makes the call a parameter of its own."""
        if key not in self.plan.parameters:
            raise NotScalableError("what it multiplies is used elsewhere too, and its weight is made of several")
        where = call.frame.module if call.frame is not None else ""
        names = [key, *self.plan.parameters[key].aliases]
        name = next((n for n in names if where and n.rpartition(".")[0] == where), None)
        if name is None or len(names) == 1:
            raise NotScalableError(
                f"{key} has another use with another factor, and its module has no weight of its own"
            )
        owner, _, attribute = name.rpartition(".")
        own = nn.Parameter(self.parameters[key].detach() * factor)
        setattr(self.model.get_submodule(owner), attribute, own)
