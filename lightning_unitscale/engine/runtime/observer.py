"""Watch the operands of every matmul that has a parameter, and the gradient of its output, while a model trains.

Of products without a parameter, those are seen that a plan in force casts: they are known by their place in the code,
which the interceptor finds.

An `OperandObserver` is a function mode: it works on any module, scaled or not, changes nothing, and costs nothing while
it is not entered. On a prepared model it sees the model's own calls, before factors and casts
(`engine.runtime.interceptor` enters it again inside its interceptor).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_unitscale.engine.record.keys import (
    ParameterKey,
    TensorInput,
    UseId,
    arguments_used,
    is_constant_result,
    parameters_of_result,
)
from lightning_unitscale.engine.record.spread_tensors import name_of_gathered
from lightning_unitscale.engine.record.tensors_of_calls import tensors_in, tensors_made
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.attention import open_multi_head_attention
from lightning_unitscale.ops.torch_functions import short_name

_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_ENTERED: list[OperandObserver] = []


@dataclass(frozen=True)
class ObservedProduct:
    """One call of a matmul-like function, as the model made it.

    Attributes:
        operands: what is multiplied, by name.
    """

    call: FunctionCall
    operands: dict[str, Tensor]
    result: Tensor


def entered_observers() -> list[OperandObserver]:
    """The observers that are entered, innermost last; in any thread, as checkpointed layers run again in autograd's."""
    return _ENTERED


def observers_inside() -> AbstractContextManager[Any]:
    """Enters the entered observers again, so that they come before a mode entered since."""
    if torch.compiler.is_compiling() or not _ENTERED:
        return nullcontext()
    stack = ExitStack()
    for observer in list(_ENTERED):
        stack.enter_context(observer)
    return stack


def show_to_observers(use: UseId, product: ObservedProduct) -> None:
    """Show the entered observers a product that they can't tell from others."""
    if not torch.compiler.is_compiling():
        for observer in dict.fromkeys(_ENTERED):
            observer.observe(use, product)


class OperandObserver(TorchFunctionMode):
    """Accumulates statistics of operands ("x", "weight", …) and "gradient" by use, while it is entered.

    Args:
        module: the model; parameters are named from it.
        accumulator: makes the accumulator of a use's operand; None for an operand that is of no interest.

    Attributes:
        found: accumulators by use and operand.
    """

    def __init__(self, module: nn.Module, accumulator: Callable[[UseId, str], Accumulator | None]) -> None:
        super().__init__()
        self.accumulator = accumulator
        self.found: dict[UseId, dict[str, Accumulator]] = {}
        self._parameters: Any = WeakTensorKeyDictionary()  # names; none of a constant; an activation is not in it
        for name, parameter in module.named_parameters():
            self._parameters[parameter] = (name,)
        self._module = module
        self._inside = False

    def __enter__(self) -> OperandObserver:
        for buffer in self._module.buffers():  # only now: a rehearsed step has buffers of its own
            self._parameters[buffer] = ()
        _ENTERED.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch has no types here
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # torch has no types here
        _ENTERED.pop()

    def forget_parameters(self) -> None:
        """Let go of the model: torch moves no sharded parameter to which there is a weak reference."""
        self._parameters.clear()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # what an interceptor made of a call that was already seen
            return function(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                return open_multi_head_attention(*args, **kwargs)
        # Layers checkpointed the reentrant way run again inside, where frames enter this again.
        if function in _BACKWARD:
            return function(*args, **kwargs)
        self._inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._inside = False
        name, call = short_name(function), FunctionCall(function, args, kwargs)
        if name in MATMULS:
            self._observe_call(name, call, result)
        self._follow(name, call, result)
        return result

    def _observe_call(self, name: str, call: FunctionCall, result: Any) -> None:
        product = MATMULS[name].cast_operands(call, self._is_weight)
        if product is None or not isinstance(result, Tensor):
            return
        x, weight = product
        use = UseId(ParameterKey.of(self._parameters[weight]), name)
        self.observe(use, ObservedProduct(call, {"x": x, "weight": weight}, result))

    def observe(self, use: UseId, product: ObservedProduct) -> None:
        """Count one product in."""
        for operand, tensor in product.operands.items():
            self._add(use, operand, tensor)
        if product.result.requires_grad and self._wanted(use, "gradient") is not None:
            product.result.register_hook(lambda gradient: self._add(use, "gradient", gradient))

    def _wanted(self, use: UseId, operand: str) -> Accumulator | None:
        known = self.found.setdefault(use, {})
        if operand not in known:
            new = self.accumulator(use, operand)
            if new is None:
                return None
            known[operand] = new
        return known[operand]

    def _add(self, use: UseId, operand: str, tensor: Tensor) -> None:
        accumulator = self._wanted(use, operand)
        if accumulator is not None:
            accumulator.add(tensor)

    def _follow(self, name: str, call: FunctionCall, result: Any) -> None:
        """Remember what the output of a call is made of."""
        used = arguments_used(name, call)
        inputs = [self._input(tensor) for tensor in tensors_in((*used.args, *used.kwargs.values()))]
        names = parameters_of_result(name, used, inputs, _in_parametrization)
        is_activation = not names and not is_constant_result(name, inputs)
        for tensor in tensors_made(name, call.args, result):
            if isinstance(tensor, nn.Parameter):
                continue  # whatever is written to it
            if is_activation:
                self._parameters.pop(tensor, None)  # what an activation is written to is a constant no more
            else:
                self._parameters[tensor] = names

    def _input(self, tensor: Tensor) -> TensorInput:
        names = self._names(tensor)
        return TensorInput.of(tensor, names or (), constant=names == ())

    def _is_weight(self, tensor: Tensor) -> bool:
        return bool(self._names(tensor))

    def _names(self, tensor: Tensor) -> tuple[str, ...] | None:
        names: tuple[str, ...] | None = self._parameters.get(tensor)
        if not names and isinstance(tensor, nn.Parameter) and (gathered := name_of_gathered(self._module, tensor)):
            names = self._parameters[tensor] = (gathered,)
        return names


def _in_parametrization() -> bool:
    """Whether the running torch call is made inside a parametrization: this mode knows no frames by name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _PARAMETRIZED:
            return True
        frame = frame.f_back
    return False


_PARAMETRIZED = ParametrizationList.forward.__code__
