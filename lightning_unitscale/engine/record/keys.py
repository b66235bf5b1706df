"""Which parameters a tensor is made of, and how that is called.

A weight often reaches its matmul as something else than the parameter: a view, a cast, an expert's slice, an expression
such as weight norm. The rule by which the parameters' names go along is `is_made_of_parameters`. Three have to agree:

    engine.record.recorder       writes the names into the trace, of which the plan is made
    engine.runtime.observer      measures operands under the names that the plan has
    engine.runtime.known_tensors finds the plan's factors and casts by them, at every step

What they keep names of differs: the recorder of values, one for each state of a tensor; the observer of tensors, as
long as they live; `known_tensors` of what the open frames hand to torch, and for speed only through the functions that
passed a name on in the recorded step. So it does not see which other tensors are constants, and takes them for such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_unitscale.ops import MATMULS, FunctionCall, is_lookup
from lightning_unitscale.ops.torch_functions import LAYER_NORMS, LIKE_SECOND, PICKS, RANDOM, SHAPE_ONLY


class ParameterKey(str):
    """The name of a parameter, or of an expression of several: their names, joined.

    A plain string otherwise, so that `name in site.params` and JSON work. The compiler can trace no such subclass:
    what runs in compiled code has the same keys as strings, by `joined` and `names_in`.
    """

    __slots__ = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> ParameterKey:
        """The key of what is made of these parameters."""
        return cls(cls.joined(names))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order; none for the empty key."""
        return self.names_in(self)

    @staticmethod
    def joined(names: Iterable[str]) -> str:
        """The key of what is made of these parameters, as a string."""
        return "+".join(sorted(set(names)))

    @staticmethod
    def names_in(key: str) -> tuple[str, ...]:
        """The parameters that a key stands for; see `names`."""
        return tuple(key.split("+")) if key else ()

    def renamed(self, rename: Callable[[str], str]) -> ParameterKey:
        """The key with each parameter called by its new name."""
        return ParameterKey.of(map(rename, self.names))


class UseId(NamedTuple):
    """What factors and casts are found by while a model runs.

    Attributes:
        key: of the parameters used, or, for a product without any, its place in the code as text.
        op: short name of the torch function that uses them.
    """

    key: str
    op: str


class Input(Protocol):
    """A tensor that goes into a call."""

    @property
    def parameters(self) -> tuple[Any, ...]:
        """Those it is made of, if of nothing else but constants: their names, or what else its holder has for them."""

    @property
    def constant(self) -> bool:
        """Whether no parameter and no input of the step went into it."""

    @property
    def noise(self) -> bool:
        """Whether random numbers went into it, and nothing else but constants."""

    @property
    def is_float(self) -> bool:
        """Whether its elements are of floating point, complex ones too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class TensorInput(NamedTuple):
    """What is known of a tensor that goes into a call; see `Input`."""

    parameters: tuple[Any, ...]
    constant: bool
    is_float: bool
    shape: tuple[int, ...]
    noise: bool = False

    @classmethod
    def of(cls, tensor: Tensor, parameters: tuple[Any, ...], constant: bool) -> TensorInput:
        """The tensor, with what its holder knows of it."""
        return cls(parameters, constant, tensor.is_floating_point() or tensor.is_complex(), tensor.shape)


def arguments_used(op: str, call: FunctionCall) -> FunctionCall:
    """The call with those arguments alone whose elements go into what it makes, not just their shape or dtype."""
    if op in SHAPE_ONLY:
        return FunctionCall(call.function, (), {})
    return FunctionCall(call.function, call.args[:1], {}) if op in LIKE_SECOND else call


def is_constant_result(op: str, inputs: Sequence[Input]) -> bool:
    """Whether what a call makes of these inputs is the same at every step."""
    return op not in RANDOM and all(value.constant for value in inputs)


def parameters_of_result(
    op: str, call: FunctionCall, inputs: Sequence[Input], in_parametrization: Callable[[], bool]
) -> tuple[str, ...]:
    """The names of the parameters that the output of a call is made of, in order; none for anything else."""
    if not is_made_of_parameters(op, call, inputs, in_parametrization):
        return ()
    return tuple(sorted({name for value in inputs for name in value.parameters}))


def is_made_of_parameters(
    op: str, call: FunctionCall, inputs: Sequence[Input], in_parametrization: Callable[[], bool]
) -> bool:
    """Whether the output of a call is made of those parameters that its inputs are made of, and of nothing else.

    It is, if all inputs are made of parameters or constant, or noise that is drawn for them (noisy layers, masks on
    weights). A slice at a place that the data choose is one too: an expert's part of a 3-D weight. It ends where
    weights make an activation.

    Args:
        op: short name of the function.
        call: as `arguments_used` gives it.
        inputs: the tensors in them, in order.
        in_parametrization: whether the code of a parametrization makes the call.
    """
    if op == "grad" or not any(value.parameters for value in inputs):
        return False
    made_of = inputs[:1] if op == "getitem" and all(map(_is_index, inputs[1:])) else inputs
    weights = [value.shape for value in made_of if value.parameters]
    drawn_for_them = op not in PICKS  # drawn places are data: the times of a diffusion model's batch
    if not all(
        value.constant or value.parameters or (value.noise and drawn_for_them and _fits(value.shape, weights))
        for value in made_of
    ):
        return False
    return not _makes_activation(op, call, inputs, in_parametrization)


def way_of(op: str, inputs: Sequence[Input]) -> str:
    """How parameters go through a function: `add:2+0+0`, a sum of weights, is another way than `add:1+1+0`, noise.

    A tensor with more elements than each of the weights, an activation or a constant, counts apart: `add:1+0+1`. Arrays
    of indices or bits are a fourth number where there are any: `getitem:1+0+0+1`, a slice by places or a lookup.

    Args:
        inputs: the tensors that go in, those made of parameters among them.
    """
    weights = [prod(value.shape) for value in inputs if value.parameters]
    others = [prod(value.shape) for value in inputs if value.is_float and not value.parameters]
    larger = len([size for size in others if size > max(weights)]) if weights else 0
    indices = len([value for value in inputs if not value.is_float and len(value.shape)])
    return f"{op}:{len(weights)}+{len(others) - larger}+{larger}" + (f"+{indices}" if indices else "")


def needs_no_others(way: str) -> bool:
    """Whether nothing but parameters goes in, so that the way makes a weight whichever they are."""
    return way.partition("+")[2] == "0+0"


def _fits(noise: tuple[int, ...], weights: Sequence[tuple[int, ...]]) -> bool:
    """Whether noise has the shape of one of the weights, or is spread over it."""
    return any(
        len(noise) <= len(weight) and all(a in (1, b) for a, b in zip(reversed(noise), reversed(weight), strict=False))
        for weight in weights
    )


def is_noise(op: str, inputs: Sequence[Input]) -> bool:
    """Whether a call draws random numbers, or makes something of such and of constants alone."""
    if op in RANDOM:
        return all(value.constant or value.noise or value.parameters for value in inputs)
    return any(value.noise for value in inputs) and all(value.constant or value.noise for value in inputs)


def _is_index(value: Input) -> bool:
    return not value.is_float and not len(value.shape)


def _makes_activation(
    op: str, call: FunctionCall, inputs: Sequence[Input], in_parametrization: Callable[[], bool]
) -> bool:
    """Whether a call on constants and parameters gives an activation rather than another weight.

    A lookup does, and a layer on learned queries, and a product with a constant batch; a product inside a
    parametrization does not.
    """
    if is_lookup(op) or op in LAYER_NORMS:
        return True
    if op not in MATMULS or in_parametrization():
        return False
    if "weight" in MATMULS[op].operands(call):
        return True
    return any((value.constant or value.noise) and value.is_float and len(value.shape) > 1 for value in inputs)


def is_parametrization(module: str) -> bool:
    """Whether a module, by its name, makes a weight of another module, as `torch.nn.utils.parametrize` has it."""
    return "parametrizations" in module.split(".")
