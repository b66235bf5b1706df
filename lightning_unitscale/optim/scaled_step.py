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
    the optimizer's update       split groups: lr * scale.lr, weight_decay * scale.weight_decay, eps * scale.eps;
                                 gradients as the plan or the family has them seen (`seen_gradients`)
    post-hooks of the user       the user's groups

Schedulers, checkpoints, loggers and callbacks thus never meet a multiplier.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.engine.checks.trained_weights import rescaled
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, PLAIN, StepScale
from lightning_unitscale.engine.record.spread_tensors import plain_name
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import decay_is_decoupled, family_of_group
from lightning_unitscale.optim.late_parameters import LateParameters
from lightning_unitscale.optim.replaced_parameters import warn_of_replaced
from lightning_unitscale.optim.seen_gradients import SeenGradients
from lightning_unitscale.optim.split_groups import GroupLayout, SplitGroup, StepWay
from lightning_unitscale.optim.write_watch import Watched, WriteWatch
from lightning_unitscale.warn_user import warn_user

_ATTRIBUTE = "_unit_scaled_step"  # where an optimizer keeps its ScaledStep
_WATCH = "_write_watch"  # where a plan in force keeps what its optimizers left
_AT_WORK: weakref.WeakSet[ScaledStep] = weakref.WeakSet()


def changes_steps(plan: Plan) -> bool:
    """Whether an optimizer of any family is to take other steps than its groups and gradients say."""
    return bool(plan.divided_gradients) or any(
        scale != PLAIN
        for family in FAMILIES
        for decoupled in (False, True)
        for scale in plan.step_scales(family, decoupled_decay=decoupled).values()
    )


def _watch_of(plan: Plan) -> WriteWatch:
    """One for all optimizers of a plan: what one of them writes is nobody else's write to another."""
    watch: WriteWatch = vars(plan).setdefault(_WATCH, WriteWatch())
    return watch


def parameters_with_scaled_steps() -> set[Tensor]:
    """The parameters of all optimizers that use a plan's multipliers."""
    return {parameter for step in list(_AT_WORK) for parameter in step.parameters()}


class ScaledStep:
    """The multipliers of a plan at work in one optimizer; made by `scale_learning_rates`.

    Attributes:
        family: the family whose multipliers are used, but in groups that name another (`families.family_of_group`).
    """

    def __init__(self, optimizer: Optimizer, plan: Plan, family: str, module: nn.Module | None = None) -> None:
        self.family = family
        self._plan = plan
        self._watch = _watch_of(plan)
        self._module = module
        self._optimizer = weakref.ref(optimizer)
        self._layouts: list[GroupLayout] = []
        self._watched: list[Watched] = []
        self._users: list[dict[str, Any]] | None = None
        self._split_groups: list[SplitGroup] = []
        self._gradients = SeenGradients({})
        self._depth = 0
        self._reached = False
        self._steps = 0
        self._late = LateParameters(plan, self._named_parameters())

        self._lay_out(optimizer)
        if isinstance(former := vars(optimizer).get(_ATTRIBUTE), ScaledStep):
            former.remove()
        self._attach(optimizer)

    def remove(self) -> None:
        """Make the optimizer plain again; doing it twice does nothing more."""
        self._attached = False
        _AT_WORK.discard(self)
        optimizer = self._optimizer()
        if optimizer is None or vars(optimizer).get(_ATTRIBUTE) is not self:
            return
        delattr(optimizer, _ATTRIBUTE)
        # A scheduler made since then wraps our step; what it wraps only passes calls on from now on.
        if vars(optimizer)["step"] is self._method:
            vars(optimizer).pop("step")
            if self._former is not None:
                vars(optimizer)["step"] = self._former

    def parameters(self) -> Iterator[Tensor]:
        """The parameters of the optimizer, as it has them."""
        optimizer = self._optimizer()
        for group in optimizer.param_groups if optimizer is not None else ():
            yield from group["params"]

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
        _AT_WORK.add(self)

    def _run(
        self, optimizer: Optimizer, plain_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Registered for this step only: ours is then the last pre-hook and, moved, the first post-hook, so that the
        # user's hooks run outside the split whenever they were registered.
        entering = optimizer.register_step_pre_hook(self._enter)
        leaving = optimizer.register_step_post_hook(self._leave)
        hooks: OrderedDict[int, Any] = vars(optimizer)["_optimizer_step_post_hooks"]
        hooks.move_to_end(leaving.id, last=False)
        self._reached = False
        self._watch.before_step(self._watched)
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
        self._watch.after_step(self._watched)
        self._steps += 1
        if self._steps == 2:  # by now the first has been in the schedule's hands
            self._ask_for_schedule()
        return result

    def _ask_for_schedule(self) -> None:
        if schedule := self._plan.unfollowed_schedule:
            warn_user(
                f"unit scaling: operand scales are to be measured again at {', '.join(map(str, schedule[:3]))} …, and "
                "nothing does it. Put the forward and backward passes of each step inside `with "
                "recalibrating(plan, step):`, or prepare the model with recalibrate=() if the first scales are "
                "to stay."
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
        self._gradients.show(optimizer)
        return None

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore(optimizer)
            self._late.warn_of_those_that_learn()

    def _with_users_groups(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1 and (self._gradients or not self._uniform):
                what = "changes its gradients" if self._gradients else "gives its parameters different learning rates"
                raise UnitScalingError(
                    f"{type(optimizer).__name__} evaluates its closure more than once per step, and unit scaling "
                    f"{what}. Use an optimizer with one evaluation per step."
                )
            self._restore(optimizer)
            loss = closure()
            # Anew, for the closure may have changed a learning rate or added a group.
            self._split(optimizer)
            self._gradients.show(optimizer)
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
            split = SplitGroup(group, layout)
            self._split_groups.append(split)
            groups += split.pieces
        # In place: a wrapping optimizer (Lookahead, SAM) may share this list.
        self._users, optimizer.param_groups[:] = users, groups

    def _restore(self, optimizer: Optimizer) -> None:
        self._gradients.restore()
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
        groups = optimizer.param_groups
        ways = [self._way(optimizer, group) for group in groups]
        if len(groups) == len(self._layouts) and all(
            layout.fits(group["params"], way) for layout, group, way in zip(self._layouts, groups, ways, strict=True)
        ):
            return
        if self._layouts:  # groups have changed since, perhaps for modules that have
            warn_of_replaced(self._plan.model if self._module is None else self._module, self._plan)
        named, divided = list(self._named_parameters()), self._plan.divided_gradients
        scales = {way: self._scales(named, way) for way in set(ways)}
        self._layouts = [
            GroupLayout.of(group["params"], way, scales[way]) for group, way in zip(groups, ways, strict=True)
        ]
        self._watched = self._to_watch(named)
        self._gradients = SeenGradients(self._seen(named))
        differs = any(scale != PLAIN for known in scales.values() for scale in known.values())
        self._check(optimizer, named, differs or bool(divided))

    def _seen(self, named: list[tuple[str, Tensor]]) -> dict[Tensor, float | None]:
        """What the optimizer's gradients are multiplied by, in the module's order; None: divided by their own scale."""
        pieces = [(layout.params, *piece) for layout in self._layouts for piece in layout.pieces]
        factors = {params[i]: scale.gradient for params, scale, where in pieces for i in where}
        divided = {p for name, p in named if name in self._plan.divided_gradients}
        return {
            p: None if p in divided else factors[p]
            for _, p in named
            if p in factors and (p in divided or factors[p] != 1.0)
        }

    def _to_watch(self, named: list[tuple[str, Tensor]]) -> list[Watched]:
        """The optimizer's parameters whose stored values are not those that the model was built with.

        None of a schedule-free one's, which itself puts averages in and out between steps, not to the bit.
        """
        optimizer = self._optimizer()
        if optimizer is None or any("train_mode" in group for group in optimizer.param_groups):
            return []
        ours = {parameter for layout in self._layouts for parameter in layout.params}
        names = set(rescaled(self._plan))
        if not names:
            return []
        module = self._plan.model if self._module is None else self._module
        owners = {plain_name(name): owner for name, owner in module.named_modules(remove_duplicate=False)}
        return [
            Watched(name, parameter, owners[name.rpartition(".")[0]])
            for name, parameter in named
            if name in names and parameter in ours
        ]

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
        if isinstance(optimizer, torch.optim.LBFGS) and (self._gradients or not self._uniform):
            what = "changes their gradients" if self._gradients else "gives them different learning rates"
            raise UnitScalingError(
                f"LBFGS takes one step size for all parameters, and unit scaling {what}. "
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
        return [(plain_name(name), p) for name, p in self._module.named_parameters(remove_duplicate=False)]

    def _way(self, optimizer: Optimizer, group: dict[str, Any]) -> StepWay:
        family = family_of_group(group) or self.family
        return StepWay(family, decay_is_decoupled(optimizer, group, family))

    def _scales(self, named: Iterable[tuple[str, Tensor]], way: StepWay) -> dict[Tensor, StepScale]:
        by_name = self._plan.step_scales(way.family, decoupled_decay=way.decoupled)
        scales: dict[Tensor, StepScale] = {}
        for name, parameter in named:
            if name in by_name:
                scales.setdefault(parameter, by_name[name])
        return scales
