"""Learning-rate multipliers under any scheduler.

A scheme stores a weight at another scale than the model's author did, so its step must be another one too: under Adam
the learning rate of each weight is multiplied by a known constant, and weight decay and eps by matching ones (the
abc-symmetry of u-μP, arXiv 2407.17465). Writing those products into the optimizer's parameter groups does not last:
OneCycleLR and CyclicLR write absolute values, cosine schedules erase the product, splitting groups breaks LambdaLR and
checkpoints. Here the groups stay the user's. They are split into groups of equal multiplier only while the optimizer
computes its update:

    pre-hooks of the user        the user's groups
    closure (Lightning: the      the user's groups
      whole training step)
    the optimizer's update       split groups: lr * scale.lr, weight_decay * scale.weight_decay, eps * scale.eps
    post-hooks of the user       the user's groups

Schedulers, checkpoints, loggers and callbacks thus never meet a multiplier.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import FAMILIES, optimizer_family

if TYPE_CHECKING:
    from lightning_unitscale.engine.plan.plan import Plan

# The keys of a parameter group that have one entry per parameter.
_PER_PARAMETER = ("params", "param_names")
# Where an optimizer keeps its ScaledStep.
_ATTRIBUTE = "_unit_scaled_step"


@dataclass(frozen=True)
class StepScale:
    """Factors on one parameter's optimizer hyperparameters, as a scheme gives them; 1 leaves a hyperparameter alone.

    Attributes:
        lr: factor on the learning rate.
        weight_decay: factor on the weight decay coefficient, which the optimizer still multiplies by the scaled `lr`.
        eps: factor on eps, in units of the gradient.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


_PLAIN = StepScale()


def scale_learning_rates(
    optimizer: Optimizer, plan: Plan, *, module: nn.Module | None = None, family: str | None = None
) -> ScaledStep:
    """Make every `optimizer.step()` use the plan's learning-rate multipliers; the parameter groups stay as they are.

    ```python
    plan = unit_scale(model, step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    ```

    `lr`, `weight_decay` and `eps` in the groups keep the user's values, so any scheduler works, made before or after
    this call, and so do checkpoints, loggers, `add_param_group`, `GradScaler`, closures, and fused, foreach and
    capturable implementations. Calling it again on the same optimizer replaces the multipliers. A copy of the
    optimizer (`copy.deepcopy`, `pickle`) is a plain optimizer on other parameters: call it again for the copy.

    Args:
        optimizer: any `torch.optim.Optimizer`; what Lightning, Fabric or `ZeroRedundancyOptimizer` put around one
            is looked through.
        plan: what `unit_scale` returned, or `callback.plan`. Parameters it doesn't name take plain steps.
        module: where the plan's parameter names are looked up; default: the module the plan was made for.
        family: `"adam"`, `"sgd"` or `"muon"`, for a class `optimizer_family` doesn't know. Weight decay then counts as
            coupled to the gradient unless the group says `decoupled_weight_decay=True`.

    Returns:
        The attachment; its `remove()` gives the plain optimizer back.

    Raises:
        UnitScalingError: the family is unknown; none of the optimizer's parameters is the plan's; multipliers differ
            but the optimizer takes a single step size (LBFGS) or is not stepped by torch's own `step` machinery.
    """
    optimizer = _innermost(optimizer)
    if family is None:
        family = _family_under(plan, optimizer)
    elif family not in FAMILIES:
        raise UnitScalingError(f"family={family!r} is not known; choose one of {', '.join(map(repr, FAMILIES))}.")
    return ScaledStep(optimizer, plan, family, module)


def _innermost(optimizer: Optimizer) -> Optimizer:
    for attribute in ("optimizer", "optim"):  # Lightning, Fabric; torch's ZeroRedundancyOptimizer
        if isinstance(inner := getattr(optimizer, attribute, None), Optimizer):
            return _innermost(inner)
    return optimizer


def _family_under(plan: Plan, optimizer: Optimizer) -> str:
    try:
        return optimizer_family(optimizer)
    except UnitScalingError:
        # Where no multiplier differs from 1 (scheme="preserve") any optimizer will do: all families are the same.
        for family in FAMILIES:
            for decoupled in (False, True):
                if any(scale != _PLAIN for scale in plan.step_scales(family, decoupled_decay=decoupled).values()):
                    raise
        return FAMILIES[0]


@dataclass(frozen=True)
class _Layout:
    """How the parameters of one group fall into pieces of equal scale: `(scale, positions in the group)` each."""

    params: tuple[Tensor, ...]
    decoupled: bool
    pieces: tuple[tuple[StepScale, tuple[int, ...]], ...]

    def fits(self, params: list[Tensor], decoupled: bool) -> bool:
        # Compared by identity: `==` of two tensors is elementwise.
        same_length = len(params) == len(self.params) and decoupled == self.decoupled
        return same_length and all(map(operator.is_, params, self.params))

    @property
    def plain(self) -> bool:
        return all(scale == _PLAIN for scale, _ in self.pieces)


class _SplitGroup:
    """One of the user's groups and the pieces that stand in for it during a step."""

    def __init__(self, group: dict[str, Any], layout: _Layout) -> None:
        self._group = group
        self._scale = layout.pieces[0][0]
        self.pieces = [_piece(group, scale, positions) for scale, positions in layout.pieces]
        for piece in self.pieces[1:]:
            # What an optimizer counts or caches in a group in place must not be counted once per piece.
            piece.update({key: _own(value) for key, value in piece.items() if key not in _PER_PARAMETER})
        self._given = {key: (value, _version(value)) for key, value in self.pieces[0].items()}

    def take_back(self) -> None:
        """Write what the optimizer changed in the (first) piece, such as a step counter, to the user's group."""
        factors = vars(self._scale)
        for key, value in self.pieces[0].items():
            factor = factors.get(key, 1.0)
            if key in _PER_PARAMETER or factor == 0.0:
                continue
            if factor == 1.0:
                self._group[key] = value
            elif not self._unchanged(key, value):
                _assign(self._group, key, value / factor)

    def _unchanged(self, key: str, value: Any) -> bool:
        given, version = self._given[key]
        if isinstance(value, Tensor):
            # Not by value, which would wait for the device.
            return value is given and value._version == version
        return bool(value == given)


def _piece(group: dict[str, Any], scale: StepScale, positions: tuple[int, ...]) -> dict[str, Any]:
    piece = dict(group)
    for key in _PER_PARAMETER:
        if key in group:
            piece[key] = [group[key][i] for i in positions]
    for key, factor in vars(scale).items():
        if key in group and factor != 1.0:
            if not isinstance(group[key], (int, float, Tensor)):
                raise UnitScalingError(
                    f"The parameter group's {key}={group[key]!r} is to be multiplied by {factor:g}, which needs a "
                    "number or a tensor. This optimizer's update is not of the family it was said to belong to."
                )
            piece[key] = group[key] * factor
    return piece


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        # Captured graphs and compiled steps read this very tensor.
        with torch.no_grad():
            group[key].copy_(value)
    else:
        group[key] = value


class ScaledStep:
    """The multipliers of a plan at work in one optimizer; made by `scale_learning_rates`.

    Attributes:
        family: the family whose multipliers are used.
    """

    def __init__(self, optimizer: Optimizer, plan: Plan, family: str, module: nn.Module | None = None) -> None:
        self.family = family
        self._plan = plan
        self._module = module
        self._optimizer = weakref.ref(optimizer)
        self._layouts: list[_Layout] = []
        self._users: list[dict[str, Any]] | None = None
        self._split_groups: list[_SplitGroup] = []
        self._depth = 0
        self._reached = False
        self._steps = 0

        self._lay_out(optimizer)
        if isinstance(former := vars(optimizer).get(_ATTRIBUTE), ScaledStep):
            former.remove()
        self._attach(optimizer)

    def remove(self) -> None:
        """Make the optimizer plain again; doing it twice does nothing more."""
        self._attached = False
        optimizer = self._optimizer()
        if optimizer is None or vars(optimizer).get(_ATTRIBUTE) is not self:
            return
        delattr(optimizer, _ATTRIBUTE)
        # A scheduler made since then wraps our step; what it wraps only passes calls on from now on.
        if vars(optimizer)["step"] is self._method:
            vars(optimizer).pop("step")
            if self._former is not None:
                vars(optimizer)["step"] = self._former

    def __repr__(self) -> str:
        counts: dict[StepScale, int] = {}
        for layout in self._layouts:
            for scale, positions in layout.pieces:
                counts[scale] = counts.get(scale, 0) + len(positions)
        lines = [f"  {scale}: {count} parameters" for scale, count in counts.items()]
        return "\n".join([f"ScaledStep(family={self.family!r}", *lines, ")"])

    def _attach(self, optimizer: Optimizer) -> None:
        # Taken unbound where it can be: the optimizer must not hold itself alive.
        former: Callable[..., Any] | None = vars(optimizer).get("step")
        unbound = type(optimizer).step

        @functools.wraps(former or unbound)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            optimizer = self._optimizer()
            plain_step = former or functools.partial(unbound, optimizer)
            if optimizer is None or not self._attached:
                return plain_step(*args, **kwargs)
            return self._run(optimizer, plain_step, args, kwargs)

        self._former = former
        self._attached = True
        # A bound method, for schedulers made later rebind its `__func__`.
        self._method = types.MethodType(step, weakref.proxy(optimizer))
        vars(optimizer)["step"] = self._method
        vars(optimizer)[_ATTRIBUTE] = self

    def _run(
        self, optimizer: Optimizer, plain_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Registered for this step only: ours is then the last pre-hook and, moved, the first post-hook, so that the
        # user's hooks run outside the split whenever they were registered.
        entering = optimizer.register_step_pre_hook(self._enter)
        leaving = optimizer.register_step_post_hook(self._leave)
        optimizer._optimizer_step_post_hooks.move_to_end(leaving.id, last=False)  # type: ignore[attr-defined]
        self._reached = False
        try:
            result = plain_step(*args, **kwargs)
        finally:
            entering.remove()
            leaving.remove()
            self._depth = 0
            self._restore(optimizer)
        if not self._reached:
            raise UnitScalingError(
                f"The step of this {type(optimizer).__name__} was replaced by {plain_step!r}, which never called the "
                "optimizer's own step, so that its learning-rate multipliers were not used. Attach them with "
                "scale_learning_rates before the step is replaced."
            )
        self._steps += 1
        if self._steps == 2:  # by now the first has been in the schedule's hands
            self._ask_for_schedule()
        return result

    def _ask_for_schedule(self) -> None:
        if schedule := self._plan.unfollowed_schedule:
            warnings.warn(
                f"unit scaling: operand scales are to be measured again at {', '.join(map(str, schedule[:3]))} …, and "
                "nothing does it. Put the forward and backward passes of each step inside `with "
                "recalibrating(plan, step):`, or prepare the model with recalibrate=() if the first scales are "
                "to stay.",
                stacklevel=4,
            )

    def _enter(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A subclass whose step calls its parent's passes here twice.
        self._depth += 1
        self._reached = True
        if self._depth > 1:
            return None
        self._split(optimizer)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_users_groups(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_users_groups(optimizer, args[1]), *args[2:]), kwargs
        return None

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore(optimizer)

    def _with_users_groups(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1 and not self._uniform:
                raise UnitScalingError(
                    f"{type(optimizer).__name__} evaluates its closure more than once per step, and unit scaling gives "
                    "its parameters different learning rates. Use an optimizer with one evaluation per step."
                )
            self._restore(optimizer)
            loss = closure()
            # Anew, for the closure may have changed a learning rate or added a group.
            self._split(optimizer)
            return loss

        return evaluate

    def _split(self, optimizer: Optimizer) -> None:
        self._lay_out(optimizer)
        if all(layout.plain for layout in self._layouts):
            return
        users = list(optimizer.param_groups)
        self._split_groups, groups = [], []
        for group, layout in zip(users, self._layouts, strict=True):
            if layout.plain:
                groups.append(group)
                continue
            split = _SplitGroup(group, layout)
            self._split_groups.append(split)
            groups += split.pieces
        # In place: a wrapping optimizer (Lookahead, SAM) may share this list.
        self._users, optimizer.param_groups[:] = users, groups

    def _restore(self, optimizer: Optimizer) -> None:
        if self._users is None:
            return
        optimizer.param_groups[:], self._users = self._users, None
        for split in self._split_groups:
            split.take_back()
        self._split_groups = []

    @property
    def _uniform(self) -> bool:
        return len({scale for layout in self._layouts for scale, _ in layout.pieces}) <= 1

    def _lay_out(self, optimizer: Optimizer) -> None:
        """Bring `_layouts` up to date with the optimizer's groups, which in all but a few steps they are."""
        groups = [(group["params"], self._decay_is_decoupled(optimizer, group)) for group in optimizer.param_groups]
        if len(groups) == len(self._layouts) and all(
            layout.fits(params, decoupled) for layout, (params, decoupled) in zip(self._layouts, groups, strict=True)
        ):
            return
        named = list(self._named_parameters())
        scales = {decoupled: self._scales(named, decoupled) for decoupled in {decoupled for _, decoupled in groups}}
        self._layouts = [_layout(params, decoupled, scales[decoupled]) for params, decoupled in groups]
        self._check(optimizer, named, any(scale != _PLAIN for known in scales.values() for scale in known.values()))

    def _check(self, optimizer: Optimizer, named: list[tuple[str, Tensor]], scaled: bool) -> None:
        if not scaled:
            return
        name = type(optimizer).__name__
        ours = {parameter for _, parameter in named}
        if not any(parameter in ours for layout in self._layouts for parameter in layout.params):
            raise UnitScalingError(
                f"None of the parameters of the {name} is a parameter of the plan's module, so none of its learning "
                "rates would be scaled. Make the optimizer from that module's own parameters(), after any copying or "
                "sharding, or pass the module it was made from as module=."
            )
        if isinstance(optimizer, torch.optim.LBFGS) and not self._uniform:
            raise UnitScalingError(
                "LBFGS takes one step size for all parameters, and unit scaling gives them different learning rates. "
                'Use another optimizer, or scheme="preserve".'
            )
        if not getattr(type(optimizer).step, "hooked", False) or "param_groups" not in vars(optimizer):
            raise UnitScalingError(
                f"{name} does without torch.optim.Optimizer's own step hooks or param_groups, through which "
                "learning-rate multipliers are applied. Attach them to the optimizer it wraps instead."
            )

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        if self._module is None:
            return self._plan.named_parameters().items()
        return self._module.named_parameters(remove_duplicate=False)

    def _scales(self, named: Iterable[tuple[str, Tensor]], decoupled: bool) -> dict[Tensor, StepScale]:
        by_name = self._plan.step_scales(self.family, decoupled_decay=decoupled)
        scales: dict[Tensor, StepScale] = {}
        for name, parameter in named:
            if name in by_name:
                scales.setdefault(parameter, by_name[name])
        return scales

    def _decay_is_decoupled(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        if "decoupled_weight_decay" in group:
            return bool(group["decoupled_weight_decay"])
        if hasattr(optimizer, "adam_w_mode"):  # apex and DeepSpeed
            return bool(optimizer.adam_w_mode)
        names = [cls.__name__ for cls in type(optimizer).__mro__]
        return self.family == "muon" or any("AdamW" in name or name == "Lion" for name in names)


def _layout(params: list[Tensor], decoupled: bool, scales: dict[Tensor, StepScale]) -> _Layout:
    positions: dict[StepScale, list[int]] = {}
    for i, parameter in enumerate(params):
        positions.setdefault(scales.get(parameter, _PLAIN), []).append(i)
    return _Layout(tuple(params), decoupled, tuple((scale, tuple(where)) for scale, where in positions.items()))
