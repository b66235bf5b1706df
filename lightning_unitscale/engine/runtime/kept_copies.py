"""Copies of weights that were made before the model was prepared: averages, originals to rewind to, snapshots.

An average begun in `on_fit_start` would mix unscaled with scaled weights. So what hangs on the module, on the Trainer's
callbacks and optimizers, and has the values of a weight about to be rescaled, is rescaled with it. A tensor that a
penalty compares with the weight stays: there the weight is handed over in the units of the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.analysis.readings import find_readings
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.held_tensors import held_tensors, is_copy
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.namespaces import callbacks_of

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Kept(NamedTuple):
    """A copy of a weight's values: where it is kept, and of which parameter."""

    place: str
    tensor: Tensor
    name: str


def kept_copies(module: nn.Module, plan: Plan, trace: Trace, trainer: pl.Trainer | None) -> list[Kept]:
    """The tensors to be rescaled with parameters of the module.

    Raises:
        UnitScalingError: one is a parameter of a module that would need factors too, and is out of reach.
    """
    changed = {
        name: parameter for name, parameter in module.named_parameters() if plan.parameters[name].from_initial != 1.0
    }
    candidates = {name: p for name, p in changed.items() if not trace.facts[name].is_constant}
    compared = find_readings(Structure(trace)).compared if trace.copies else set()
    memory = {p.data_ptr() for p in module.parameters()}
    memory |= {tensor.data_ptr() for value, tensor in trace.copies if value in compared}
    found = []
    for place, tensor in _tensors_beside(module, trainer) if candidates else ():
        names = [name for name, parameter in candidates.items() if is_copy(tensor, parameter)]
        if not names or tensor.data_ptr() in memory:
            continue
        memory.add(tensor.data_ptr())
        name = next((name for name in names if name in place), names[0])
        if isinstance(tensor, nn.Parameter) and not plan.is_plain:
            raise UnitScalingError(
                f"{place} has the values of {name} and is a parameter of a module that {type(module).__name__} does "
                "not register, so the factors of this plan can't be put on it. Make that module a submodule, copy it "
                'after the first training step, or use storage="folded". Nothing was changed.'
            )
        found.append(Kept(place, tensor, name))
    return found


def rescale_kept(plan: Plan, kept: list[Kept]) -> None:
    """Rescale them as the plan does their parameters, and say so in its notes."""
    with torch.no_grad():
        for place, tensor, name in kept:
            tensor.detach().mul_(plan.parameters[name].from_initial)
            plan.notes.append(f"{place} is a copy of {name} and was rescaled with it")


def _tensors_beside(module: nn.Module, trainer: pl.Trainer | None) -> Iterator[tuple[str, Tensor]]:
    inside = {id(parameter) for parameter in module.parameters()}
    for root in roots_beside(module, trainer, inside):
        yield from held_tensors(root, type(root).__name__, inside)


def roots_beside(module: nn.Module, trainer: pl.Trainer | None, inside: set[int]) -> Iterator[object]:
    """What may keep copies: the module, and the callbacks and optimizers of its Trainer.

    Args:
        inside: what is not to be looked into is added.
    """
    yield module
    if trainer is None:
        return
    inside.add(id(trainer))
    for held in (*callbacks_of(trainer), *trainer.optimizers):
        if isinstance(average := getattr(held, "_average_model", None), nn.Module):
            inside.add(id(average))  # is given the plan as a whole
        yield held
