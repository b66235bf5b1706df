"""What must hold for any module, on random ones with hand-written Functions, shared weights, checkpoints, penalties.

A hundred of them; `MORE_MODULES=5000 python -m pytest -s -m slow tests/models/test_random_modules.py` tries that many
others, and says now and then how many have held.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.random_modules import AROUND, BESIDE, LAYERS, PENALTIES, READOUTS, Batch, Net, Part, Program, plain
from torch import Tensor, nn

from lightning_unitscale import Plan, UnitScalingError, remove_unit_scaling, scale_learning_rates, unit_scale
from lightning_unitscale import prepare as preparing

COUNT = int(os.environ.get("MORE_MODULES", "0"))
STORAGES = ("folded", "unit")
_held = itertools.count(1)
_leaves = st.builds(Part, st.sampled_from(sorted(LAYERS)), st.booleans())
_parts = st.recursive(
    _leaves,
    lambda inner: st.builds(
        Part, st.sampled_from(sorted(AROUND)), st.just(False), st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=4,
)
programs = st.builds(
    Program,
    parts=st.lists(_parts, min_size=1, max_size=4).map(tuple),
    entry=st.sampled_from(["table", "linear"]),
    readout=st.sampled_from(sorted(READOUTS)),
    tied=st.booleans(),
    penalties=st.lists(st.sampled_from(sorted(PENALTIES)), max_size=2, unique=True).map(tuple),
    beside=st.lists(st.sampled_from(sorted(BESIDE)), max_size=2, unique=True).map(tuple),
)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What is drawn here may begin far above the untouched model; that it is then left alone is another test's matter.
    monkeypatch.setattr(preparing, "is_far_above", lambda before, after: False)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(program: Program, **options: Any) -> tuple[Net, Plan]:
    model = Net(program)
    return model, unit_scale(model, lambda m: m(Batch()), **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(Batch()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(model: Net, plan: Plan) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.1)
    scale_learning_rates(optimizer, plan)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(Batch(step))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def off_kinks(model: Net) -> Net:
    """A copy with other biases than zero, for which a ReLU after a norm of zeros is at its kink itself."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if not parameter.any():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return moved


def assert_slopes(model: Net, found: dict[str, Tensor]) -> None:
    """Gradients are central differences of the loss; near a kink some widths miss them, not all.

    The smallest, for activations of 1e-8 that a norm makes large again, are so near to rounding that it may explain a
    part of the difference, but not all of it.
    """
    largest = max(float(gradient.norm()) for gradient in found.values())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name not in found:
            continue
        direction = torch.randn_like(parameter)
        direction *= max(float(parameter.norm()), 1e-3) / direction.norm()
        errors = []
        with torch.no_grad():
            slope = float((found[name] * direction).sum())
            for width in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
                values = []
                for sign in (1, -2, 1):
                    parameter += sign * width * direction
                    values.append(model(Batch()).item())
                error = abs(slope - (values[0] - values[1]) / (2 * width))
                if width < 5e-7 and error > 0.05 * abs(slope):
                    continue
                rounding = 1e-15 * (abs(values[0]) + 1) / width
                errors.append((error - rounding) / float(direction.norm() * max(found[name].norm(), 1e-6 * largest)))
                if errors[-1] < 1e-5:
                    break
        assert min(errors) < 1e-5, (name, errors)


def transported(one: Plan, other: Plan, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of what `one` stores, as those of what `other` does."""
    return {name: g * one.parameters[name].stored / other.parameters[name].stored for name, g in found.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10 * largest, msg=name)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs)
@example(  # a bias behind a norm without gain takes no factor that the norm can't
    Program((Part("post-norm residual", inner=(Part("linear"),)), Part("position")), readout="fused", tied=True)
)
@example(  # a Function inside another one gives back its input, which autograd then makes an alias of
    Program((Part("silu"), Part("checkpointed by hand", inner=(Part("alias"), Part("linear")))))
)
@example(  # a sum of weights makes a weight, an activation and a position none: though both are additions
    Program((Part("sum of weights"), Part("position"), Part("gram")), entry="linear", penalties=("L2",))
)
def test_a_few_random_modules_keep_every_property(program: Program) -> None:
    check(program)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=COUNT or 100, derandomize=not COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs)
def test_random_modules_keep_every_property(program: Program) -> None:
    check(program)
    held = next(_held)
    if COUNT and held % 100 == 0:
        print(f"{held} modules hold", flush=True)


def check(program: Program) -> None:
    """Every property of one module."""
    untouched = Net(program)
    try:
        expected = gradients(untouched)
    except (RuntimeError, IndexError):  # a reentrant checkpoint inside another one, a part of a part
        assume(False)
    preserved, _ = prepared(program, scheme="preserve", verify=False)
    found = gradients(preserved)
    assert preserved(Batch(1)).item() == untouched(Batch(1)).item()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    try:
        (folded, plan), (unit, unit_plan) = (prepared(program, storage=storage) for storage in STORAGES)
    except UnitScalingError as error:  # a penalty may hide from the gate that gradients are no slopes by design
        assert "nothing in Net can be scaled" in str(error) or (
            "not the slope" in str(error) and not program.has_slopes
        )
        return
    if program.penalties:
        penalty = unit.penalty().item()
        assert penalty == pytest.approx(folded.penalty().item(), rel=1e-9)
        if not any(p.initial_factor == 0 for p in plan.parameters.values()):
            assert penalty == pytest.approx(untouched.penalty().item(), rel=1e-9)
    grads, unit_grads = gradients(folded), gradients(unit)
    assert_alike(unit_grads, transported(plan, unit_plan, grads))
    if program.has_slopes:
        moved = off_kinks(folded)
        assert_slopes(moved, gradients(moved))  # and so those of the other storage

    removed = copy.deepcopy(unit)
    try:
        remove_unit_scaling(removed)
    except UnitScalingError as error:
        assert "cannot be moved" in str(error)
    else:
        removed.program = unit.program = replace(program, penalties=())  # their sizes change, as it has warned
        assert removed(Batch(1)).item() == pytest.approx(unit(Batch(1)).item(), rel=1e-9)
        unit.program = program
    ours = folded(Batch(1)).item()
    assert losses(folded, plan) == pytest.approx(losses(unit, unit_plan), rel=1e-7)

    twin, twins_plan = prepared(plain(program), verify=False)
    theirs = twin(Batch(1)).item()
    # A weight that its part never uses may be taken for one of a part like another, that is left out of this step.
    siblings = any("rule of their siblings" in note for note in plan.notes + twins_plan.notes)
    if not (is_left_alone(plan) or siblings or program.detaches_in_a_function):
        assert ours == pytest.approx(theirs, rel=1e-9)


def is_left_alone(plan: Plan) -> bool:
    """Whether something got no factor for being inside a Function, with the reason."""
    return "autograd.Function" in " ".join([*plan.notes, *(p.reason for p in plan.parameters.values())])
