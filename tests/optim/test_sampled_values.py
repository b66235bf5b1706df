"""Writes through `.data`, which no version counter counts, are noticed long after the first steps too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import scale_learning_rates, unit_scale
from lightning_unitscale.optim.sampled_values import SampledValues

Write = Callable[[nn.Module, dict[str, Tensor]], None]


def _clamp(model: nn.Module, _: dict[str, Tensor]) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)


def _project_one(model: nn.Module, _: dict[str, Tensor]) -> None:
    weight = model.get_parameter("2.weight")
    weight.data = nn.functional.normalize(weight.data, dim=1)


def _rewind(model: nn.Module, start: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(start[name])


def _there_and_back(model: nn.Module, start: dict[str, Tensor]) -> None:
    now = {name: p.data.clone() for name, p in model.named_parameters()}
    _rewind(model, start)
    _rewind(model, now)


def warned(write: Write, at: range, steps: int = 60) -> list[str]:
    """What is said of writes after some of the steps."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(12, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, unit_scale(model, lambda m: m(x).square().mean()))
    start = copy.deepcopy(dict(model.named_parameters()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step in at:
                write(model, start)
    return [str(w.message) for w in caught if "written outside" in str(w.message)]


@pytest.mark.parametrize(
    ("write", "at"), [(_clamp, range(20, 60)), (_project_one, range(20, 60)), (_rewind, range(40, 41))]
)
def test_a_write_to_data_after_many_steps_is_warned_of_once(write: Write, at: range) -> None:
    (message,) = warned(write, at)
    assert ".weight" in message and "preserve" in message


def test_an_average_put_in_through_data_and_taken_out_again_is_let_be() -> None:
    assert not warned(_there_and_back, range(20, 60))


def test_values_that_stay_are_the_same_whatever_their_layout_or_number() -> None:
    parameters = [
        torch.full((3, 5), float("nan")),
        torch.randn(4, 6, dtype=torch.bfloat16).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(()),
        torch.zeros(0),
    ]
    samples = SampledValues()
    for round_ in range(6):
        samples.take([(str(index), parameter) for index, parameter in enumerate(parameters)])
        assert samples.changed(parameters) == []
        samples.take([(str(index), parameter) for index, parameter in enumerate(parameters)])
        for parameter in parameters:
            parameter.data.add_(round_ + 1)
        assert set(samples.changed(parameters)) <= {"1", "2", "3", "4"}


def test_a_change_is_found_in_each_of_the_parameters_in_turn() -> None:
    parameters = [torch.randn(300, 7) for _ in range(5)]
    samples, found = SampledValues(), set[str]()
    for _ in range(5):
        samples.take([(str(index), parameter) for index, parameter in enumerate(parameters)])
        for parameter in parameters:
            parameter.data.mul_(1.5)
        found |= set(samples.changed(parameters))
    assert found == {"0", "1", "2", "3", "4"}
