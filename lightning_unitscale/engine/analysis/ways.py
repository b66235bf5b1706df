"""In which ways functions make weights of parameters: what is followed while the model runs.

A running step does not know which tensors are constants. So `w + noise`, a weight, and `x + position`, an activation,
are told apart by whose they are: the recorded step has seen which parameters make weights together with other tensors,
and in which ways. A parameter that goes both ways through one function is left alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from lightning_unitscale.engine.analysis.readings import Readings
from lightning_unitscale.engine.record.keys import ParameterKey, needs_no_others, way_of
from lightning_unitscale.engine.record.trace import Call, Trace
from lightning_unitscale.ops import MATMULS


@dataclass
class Ways:
    """How parameters go through functions, see `engine.record.keys.way_of`.

    Attributes:
        alone: ways in which nothing but parameters goes in.
        with_others: by key, ways in which they made a weight together with other tensors.
        ambiguous: parameters of which the same kind of call makes a weight and an activation, with the reason.
    """

    alone: list[str] = field(default_factory=list)
    with_others: dict[str, list[str]] = field(default_factory=dict)
    ambiguous: dict[str, str] = field(default_factory=dict)


def find_ways(trace: Trace, readings: Readings) -> Ways:
    """The ways of all parameters of a recorded step."""
    alone: set[str] = set()
    makes: dict[ParameterKey, dict[str, Call]] = defaultdict(dict)
    ends: dict[ParameterKey, list[Call]] = defaultdict(list)
    for call in trace.calls:
        key = ParameterKey.of(name for value in call.inputs for name in value.parameters)
        if not key or not call.outputs:
            continue
        way = way_of(call.name, call.inputs)
        if not call.output.parameters:
            if not any((call.index, value) in readings.ends for value in call.inputs):
                ends[key].append(call)
        elif needs_no_others(way):
            alone.add(way)
        else:
            makes[key].setdefault(way, call)
    ways = Ways(sorted(alone), {str(key): sorted(makes[key]) for key in sorted(makes)})
    for key, by_way in makes.items():
        for making in by_way.values():
            for ending in ends.get(key, ()):
                if _look_alike(making, ending):
                    why = f"{making.where} makes a weight of it by {making.name}, and {ending.where} an activation"
                    ways.ambiguous.update(dict.fromkeys(key.names, why))
    return ways


def _look_alike(making: Call, ending: Call) -> bool:
    """Whether a running step can't tell two calls with the same parameters apart.

    Sizes tell nothing, as a batch may be of one example. Products are told by where they are made: a weight, inside a
    parametrization.
    """
    return making.name == ending.name and making.name not in MATMULS and _numbers(making) == _numbers(ending)


def _numbers(call: Call) -> tuple[int, int, int]:
    """How many of the tensors that go in are made of parameters, how many not, and how many have indices or bits."""
    made = [bool(value.parameters) for value in call.inputs if value.is_float]
    arrays = [value for value in call.inputs if not value.is_float and value.shape]
    return made.count(True), made.count(False), len(arrays)
