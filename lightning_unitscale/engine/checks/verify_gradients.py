"""The gate of the gradients: before the first step, on the recorded batch, a backward pass under the plan.

A factor that the forward pass has and a backward pass has not (one put inside a hand-written autograd.Function, or an
operation that takes it wrongly) leaves every loss as it is and makes gradients wrong. So they are compared with what
does not use any backward pass: with the change of the loss as parameters are moved (`engine.checks.slopes`), one more
forward pass; of all at once, or, if the step has hand-written Functions, reentrant checkpoints or hooks on tensors, of
one half and then the other. Without these and without scopes, by which factors stand in the model's code, nothing is to
be checked.

Some gradients are meant to be others than the slope (straight-through estimators, gradient reversal, detached
targets). So where they disagree the untouched model is asked the same, on the same batch with the same random numbers:
what disagrees there too is left to its author, with a note in the plan. It takes the model's weights brought back to
what they were, to rounding, and back again bit for bit. A reversal may weigh little in the untouched model and much
under the plan. So what is left is compared with the gradients of the same function as a plain module, all factors in
its weights, where it can be one: where these are the same, no factor is missing, and the step's own code decides them.

Each of the losses of manual optimization is looked at by itself: a generator's gradients are no slope of the sum.
Nothing is sent to other processes. A step that does so of its own accord is not checked, as the number of forward
passes depends on what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_unitscale.engine.checks.gradients import rehearsed_losses
from lightning_unitscale.engine.checks.gradients_taken import GradientsTaken, number_of, said, take_gradients
from lightning_unitscale.engine.checks.slopes import Reach, Slopes
from lightning_unitscale.engine.plan.fold import folded_copy
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.rehearsal import Rehearsal
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.engine.runtime.install import install, rules_in_force, uninstall, untouched_factors
from lightning_unitscale.errors import WrongGradientsError
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl

_ROUNDS = 2  # sets that disagree in the untouched model too are looked at once more, by halves
_NAMED = 8
_SLIGHTLY = 2.0  # a gradient that is so many times another than the slope may be meant so

Step = Callable[[Rehearsal], Any]


def is_to_be_checked(module: nn.Module, plan: Plan, before: Trace) -> bool:
    """Whether anything can make gradients wrong: a factor in the code, or code that has a backward pass of its own."""
    return rules_in_force(module) is not None or (plan.changes_training and _has_backward(before))


def _has_backward(step: Trace) -> bool:
    """Whether code of the step decides gradients, and not torch's own operations alone."""
    return bool(step.functions) or step.hooked or step.reentrant


def verify_gradients(
    module: nn.Module,
    plan: Plan,
    before: Trace,
    taken: GradientsTaken,
    step: Step,
    trainer: pl.Trainer | None = None,
) -> None:
    """Check the gradients of a plan just put in force; a note in the plan says what could not be checked.

    Args:
        before: the step as the untouched model took it.
        taken: the gradients of the same step under the plan.
        step: the same step.

    Raises:
        WrongGradientsError: gradients are not the slope of the loss, though the untouched model's are.

    Warns:
        of such that are far off and the step's own code decides: it inverts layers or iterates to a fixed point, say.
    """
    if not is_to_be_checked(module, plan, before):
        return
    problem = taken.problem or ("the step talks to other processes" if taken.talks else "")
    wrong, is_own = dict[str, float](), False
    if not problem:
        try:
            gate = _Gate(module, plan, step, trainer)
            wrong = gate.wrong_gradients(taken, sets=2 if _has_backward(before) else 1)
            is_own = bool(wrong) and gate.are_as_folded(taken)
        except Exception as error:  # of the model's own code, where it meets another value
            problem = said(error)
    if problem:
        plan.notes.append(f"gradients were not checked: {problem}")
        return
    if is_own:
        _leave_to_its_author(module, plan, before, wrong)
    elif wrong:
        raise WrongGradientsError(_message(module, plan, before, wrong))


class _Gate:
    """The comparison, for all losses of a step."""

    def __init__(self, module: nn.Module, plan: Plan, step: Step, trainer: pl.Trainer | None) -> None:
        self.module, self.plan, self.step, self.trainer = module, plan, step, trainer

    def wrong_gradients(self, taken: GradientsTaken, sets: int) -> dict[str, float]:
        """By parameter, how many times too large its gradient is.

        Args:
            sets: how many the parameters are divided into at first.
        """
        ours = self._slopes(taken)
        wrong: dict[str, float] = {}
        unknown: list[str] = []
        level = [(loss, names) for loss, slopes in enumerate(ours) for names in _split(list(slopes.gradients), sets)]
        for _ in range(_ROUNDS):
            found = [(loss, names, ours[loss].measure(names)) for loss, names in level]
            unknown += [name for _, names, measured in found if measured.agrees is None for name in names]
            off = [(loss, names) for loss, names, measured in found if measured.agrees is False]
            honest = self._agreeing_untouched(off)
            for loss, names in reversed(honest):
                wrong = wrong or self._narrowed(ours, loss, names)
            level = [(loss, half) for loss, names in off if (loss, names) not in honest for half in _split(names, 2)]
            if wrong or not level:
                break
        if not wrong:
            self._note(unknown, [name for _, names in level for name in names])
        return wrong

    def are_as_folded(self, taken: GradientsTaken) -> bool:
        """Whether the same function as a plain module, without any explicit factor, has the same gradients."""
        folded = folded_copy(self.plan)
        if not folded.is_plain:
            return False
        if rules_in_force(self.module) is None:
            return True
        scales = {name: (p.stored, folded.parameters[name].stored) for name, p in self.plan.parameters.items()}
        with _weights_multiplied(self.module, self.plan, {n: new / old for n, (old, new) in scales.items()}):
            other = self._taken()
        tolerance = Reach.of(taken.eps).tolerance
        for ours, theirs in zip(taken.by_loss, other.by_loss, strict=True):
            expected = {name: gradient * scales[name][1] for name, gradient in theirs.items()}
            largest = max((float(gradient.norm()) for gradient in expected.values()), default=0.0)
            for name, gradient in expected.items():
                off = float((ours[name] * scales[name][0] - gradient).norm())
                if off > tolerance * max(float(gradient.norm()), 1e-3 * largest):
                    return False
        return True

    def _taken(self) -> GradientsTaken:
        """The gradients of the step as the model is now."""
        taken = take_gradients(self.module, self.step, self.trainer, by_loss=True)
        if taken.problem:
            raise RuntimeError(taken.problem)
        return taken

    def _slopes(self, taken: GradientsTaken) -> list[Slopes]:
        """One for each loss of the step as the model is now."""
        reach = Reach.of(taken.eps)
        return [
            Slopes(self.module, partial(self._loss, index), value, eps, gradients, reach)
            for index, ((value, eps), gradients) in enumerate(zip(taken.losses, taken.by_loss, strict=True))
        ]

    def _loss(self, index: int) -> float:
        with rehearsed_losses(self.module, self.step, self.trainer) as losses:
            return number_of(losses[index])

    def _agreeing_untouched(self, sets: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
        """Those of the sets whose gradients are the slope of the loss in the untouched model."""
        if not sets:
            return []
        with _weights_multiplied(self.module, self.plan, untouched_factors(self.plan)):
            theirs = self._slopes(self._taken())
            return [(loss, names) for loss, names in sets if theirs[loss].measure(names).agrees]

    def _narrowed(self, ours: list[Slopes], loss: int, names: list[str]) -> dict[str, float]:
        """The smallest part that disagrees, of several the one nearest to the loss: what is before it passes it on.

        None if what disagrees does so in the untouched model too, where the rest of the set outweighed it.
        """
        halves = _split(names, 2) if len(names) > 1 else []
        agrees = {tuple(half): ours[loss].measure(half).agrees for half in halves}
        suspects = [(loss, half) for half in halves if not agrees[tuple(half)]]
        for _, half in reversed(self._agreeing_untouched(suspects)):
            if agrees[tuple(half)] is None:
                halves = []
            elif found := self._narrowed(ours, loss, half):
                return found
        if halves:
            return {}
        ratio = ours[loss].measure(names).ratio
        return dict.fromkeys(names, 1 / ratio if ratio else inf)

    def _note(self, unknown: list[str], otherwise: list[str]) -> None:
        for names, why in (
            (unknown, "the loss is 0, jumps, or is too coarse to show its slope"),
            (otherwise, "in the untouched model too they are not the slope of the loss"),
        ):
            if names:
                self.plan.notes.append(f"gradients were not checked of {_some(list(dict.fromkeys(names)))}: {why}")


@contextmanager
def _weights_multiplied(module: nn.Module, plan: Plan, factors: Mapping[str, float]) -> Iterator[None]:
    """The model without the plan's scopes inside, its parameters multiplied: by the untouched model's factors, say."""
    named = dict(module.named_parameters())
    kept = {name: (named[name].data, factor) for name, factor in factors.items() if factor != 1.0}
    before = [(data, data.clone()) for data, _ in kept.values()]
    uninstall(module)
    try:
        for data, factor in kept.values():
            data.mul_(factor)
        yield
    finally:
        for data, saved in before:
            data.copy_(saved)
        install(module, plan)


def _leave_to_its_author(module: nn.Module, plan: Plan, before: Trace, wrong: dict[str, float]) -> None:
    named = _some([f"{name} (× {factor:.3g})" for name, factor in wrong.items()])
    by = ", ".join(sorted(before.functions)) or "a hook"
    found = (
        f"gradients of {named} are not the slope of the loss under the plan, though about that in the untouched model, "
        f"and no factor is missing in them: {by} of this step decides them"
    )
    plan.notes.append(found)
    if any(not 1 / _SLIGHTLY <= factor <= _SLIGHTLY for factor in wrong.values()):
        warn_user(
            f"unit scaling: {type(module).__name__}: {found}. If they are meant to be others (a reversal, a "
            "straight-through estimator), all is well. If that code iterates to a fixed point or inverts layers, it "
            "may need weights of the size that it was given: list these in skip."
        )


def _message(module: nn.Module, plan: Plan, before: Trace, wrong: dict[str, float]) -> str:
    functions = sorted(before.functions)
    sites = [
        site.name
        for site in plan.explicit_sites
        if not wrong.keys().isdisjoint(name for key in site.params for name in key.names)
    ]
    return (
        f"{type(module).__name__}: under the plan gradients are not the slope of the loss, though the untouched "
        f"model's are. Nearest to the loss: {_some([f'{name} (× {factor:.3g})' for name, factor in wrong.items()])}, "
        "which those of earlier layers may follow. A factor of the forward pass is missing or another one in a "
        "backward pass"
        + (f"; explicit factors stand at {_some(sites)}" if sites else "")
        + (f"; hand-written autograd.Functions in this step: {_some(functions)}" if functions else "")
        + ". List in skip the parameters that such a Function uses, or those named first; the model was brought back "
        "to what it was, to rounding."
    )


def _split(names: Sequence[str], parts: int) -> list[list[str]]:
    """In order, as even as can be."""
    bounds = [len(names) * part // parts for part in range(parts + 1)]
    return [list(names[start:end]) for start, end in pairwise(bounds) if start < end]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
