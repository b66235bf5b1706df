"""Record one step of a model as a graph of torch calls.

A `TorchFunctionMode` sees every torch call that ordinary Python makes, without graph capture and along any
control flow. The frame of a call (which method of which module made it) is read off the Python stack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_unitscale.engine.record.autograd_functions import (
    RUN_ASIDE,
    reentrant_checkpoints_opened,
    watching_functions,
)
from lightning_unitscale.engine.record.held_tensors import is_copy
from lightning_unitscale.engine.record.keys import (
    arguments_used,
    is_constant_result,
    is_noise,
    is_parametrization,
    parameters_of_result,
)
from lightning_unitscale.engine.record.past_instance import is_past_instance
from lightning_unitscale.engine.record.places import Frame
from lightning_unitscale.engine.record.spread_tensors import MOVES, gathering_modules, whole
from lightning_unitscale.engine.record.tensor_facts import is_alias, largest, number, parameter_facts, rms
from lightning_unitscale.engine.record.tensors_of_calls import has_ordinal, tensors_in, tensors_made, written_to
from lightning_unitscale.engine.record.trace import Call, GradientTaken, ModuleSpan, Trace, Value
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.attention import open_multi_head_attention
from lightning_unitscale.ops.torch_functions import ACTIVATIONS, PASSTHROUGH, is_in_place, short_name

MODULE_CALL = frozenset({nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__})


@contextmanager
def recording(module: nn.Module) -> Iterator[Recorder]:
    """Record every torch call made inside; `recorder.trace` is complete after `recorder.finish(output)`."""
    recorder = Recorder(module)
    handles = [
        handle
        for name, child in module.named_modules()
        if not any(True for _ in child.parameters()) and not any(True for _ in child.children())
        if not isinstance(child, torch.jit.ScriptModule)  # which take no hooks
        for handle in recorder.watch(name, child)
    ]
    handles += [child.register_forward_pre_hook(recorder.meet_gathered) for child in gathering_modules(module)]
    try:
        with reentrant_checkpoints_opened(recorder.meet_reentrant), watching_functions(recorder.run_function), recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


class Recorder(TorchFunctionMode):
    """Writes down each torch call made while it is entered.

    Args:
        module: the root of the model; parameters and frames are named from it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace(facts=parameter_facts(module))
        self._module_names = {id(child): name for name, child in module.named_modules()}
        self._parameter_names = {
            alias: name for name, facts in self.trace.facts.items() for alias in (name, *facts.aliases)
        }
        self._values: Any = WeakTensorKeyDictionary()
        self._value_count = 0
        self._ordinals: dict[tuple[int, str], int] = {}
        self._frames: dict[int, FrameType] = {}  # kept alive, so that their ids stay unique
        self._functions_running = 0
        self._torch_calls_running = 0
        self._by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            self._add(parameter, None, parameters=(name,))
            if not self.trace.facts[name].is_constant:
                self._by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for buffer in module.buffers():
            self._note_copy(self._add(buffer, None, constant=True), buffer)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self:
                return open_multi_head_attention(*args, **kwargs)
        name = short_name(function)
        if self._functions_running and name == "detach.default":
            name = "alias"  # autograd itself makes it of an input that a Function inside another one gives back
        self._torch_calls_running += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._torch_calls_running -= 1
        self.trace.hooked |= name == "register_hook"
        if function is torch.autograd.grad:
            self._write_gradients(args, kwargs, result, sys._getframe(1))
        for tensor in written_to(name, FunctionCall(function, args, kwargs)):
            self._note_written(tensor, sys._getframe(1))
        outputs = tensors_made(name, args, result)
        unchanged = name in PASSTHROUGH and not is_in_place(function) and args and result is args[0]
        if outputs and name != "grad" and not unchanged:
            self._write(name, function, args, kwargs, outputs, sys._getframe(1))
        return result

    def meet_reentrant(self) -> None:
        """A layer is checkpointed the reentrant way."""
        self.trace.reentrant = True

    def run_function(self, function: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a `torch.autograd.Function`: gradients pass through all of it, though inside autograd is off.

        What it made by torch calls is known already. What it was given and gives back is an alias of that; what comes
        out of a kernel of its own is one call that no rule is known for. One inside a torch call, as registered
        kernels have for their backward pass, is a part of that call.
        """
        if self._torch_calls_running:
            return apply(*args)
        if function.__name__ in MOVES and function.__module__.startswith("torch.distributed"):
            return self._moved(function, apply, args)
        self.trace.functions.add(function.__name__)
        self._functions_running += 1
        try:
            result = apply(*args)
        finally:
            self._functions_running -= 1
        given = list(tensors_in(args))
        for output in tensors_in(result):
            if output in self._values:
                if not self._functions_running:  # inside another one autograd is off still
                    self._values[output].requires_grad = output.requires_grad
                continue
            source = next((tensor for tensor in given if is_alias(output, tensor)), None)
            frame = sys._getframe(2)  # that called `apply`
            if source is not None and not (source in self._values and self._values[source].parameters):
                self._write("alias", function, (source,), {}, [output], frame)
            else:
                self._write(f"{function.__name__}.apply", function, args, {}, [output], frame)
        return result

    def _moved(self, function: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a Function that spreads a tensor over processes, or brings it together: the same numbers elsewhere."""
        with torch._C.DisableTorchFunction():
            result = apply(*args)
        self._write("alias", function, args[:1], {}, list(tensors_in(result)), sys._getframe(3))
        return result

    def finish(self, output: Any, backwards: list[Tensor]) -> Trace:
        """Mark the losses (what the step returned, or its "loss", and what backward was called on) of one step.

        Another may follow, and is a part of the same trace.
        """
        tensors = loss_tensors(output, backwards)
        self.trace.losses += [self._values[tensor] for tensor in tensors if tensor in self._values]
        self.trace.loss_numbers += [
            nan if tensor.is_meta else float(whole(tensor.detach().double().sum())) for tensor in tensors
        ]
        self.trace.ends.append(len(self.trace.calls))
        self._frames.clear()
        self._ordinals.clear()
        return self.trace

    def watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Note when `module` (without parameters or children) runs, as one span of calls."""
        started: list[int] = []

        def before(_: nn.Module, args: Any) -> None:
            started.append(len(self.trace.calls))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            inputs = [self._values[tensor] for tensor in tensors_in(args) if tensor in self._values]
            result = self._values.get(output) if isinstance(output, Tensor) else None
            if result is not None and result.largest is None:
                result.largest = largest(output)
            span = range(started.pop(), len(self.trace.calls))
            self.trace.spans.append(ModuleSpan(name, inputs, result, span))

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after, prepend=True)  # what other hooks make of its output is not its own

    def meet_gathered(self, module: nn.Module, _: Any) -> None:
        """Know the tensors that stand in the place of parameters while a sharded module runs."""
        prefix = self._module_names[id(module)]
        for name, child in module.named_modules(prefix=prefix):
            for attribute, tensor in child._parameters.items():
                known = self._parameter_names.get(f"{name}.{attribute}" if name else attribute)
                if tensor is None or known is None:
                    continue
                if (
                    tensor not in self._values or not self._values[tensor].parameters
                ):  # as the calls that made it have it
                    self._add(tensor, None, parameters=(known,))

    def _write(self, *what: Any) -> None:
        self._torch_calls_running += 1  # reading a tensor that is spread over processes moves it
        try:
            self._write_call(*what)
        finally:
            self._torch_calls_running -= 1

    def _write_call(
        self,
        name: str,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        caller: FrameType,
    ) -> None:
        frame, ordinal, in_function = self._where(caller, name, has_ordinal(args))
        if any(isinstance(output, nn.Parameter) and output in self._values for output in outputs):
            return  # a parameter that the step writes to (an average of others, say) stays itself
        used = arguments_used(name, FunctionCall(function, args, kwargs))
        for tensor in tensors_in((*used.args, *used.kwargs.values())):
            self._note_transformed(name, tensor, caller)
        inputs: list[Value] = []
        call = Call(
            index=len(self.trace.calls),
            name=name,
            function=function,
            frame=frame,
            ordinal=ordinal,
            args=tuple(self._read(argument, inputs) for argument in used.args),
            kwargs={key: self._read(argument, inputs) for key, argument in used.kwargs.items()},
            inputs=inputs,
            in_function=in_function,
            under_function=self._functions_running > 0,
            where=code_place(caller) if any(value.parameters for value in inputs) else "",
        )
        self.trace.calls.append(call)
        for value in dict.fromkeys(inputs):
            value.consumers.append(call)
        constant, noise = is_constant_result(name, inputs), is_noise(name, inputs)
        parameters = parameters_of_result(
            name, call, inputs, lambda: frame is not None and is_parametrization(frame.module)
        )
        expression = name not in PASSTHROUGH or any(value.expression for value in inputs)
        in_place = used.args and isinstance(args[0], Tensor) and outputs[0] is args[0]
        for tensor in outputs:
            call.outputs.append(self._add(tensor, call, parameters, expression, constant))
            call.outputs[-1].noise = noise and not parameters
        if in_place and args[0]._base is not None and args[0]._base in self._values:
            self._add(args[0]._base, call, parameters, expression, constant)
        if name in MATMULS and not parameters:
            self._measure(call, used, outputs[0])
        elif name in ACTIVATIONS and not parameters:
            call.output.largest = largest(outputs[0])
        if frame is not None:
            touched = self.trace.touched.setdefault(frame, [])
            for value in inputs:
                if value.parameters and value.key not in touched:
                    touched.append(value.key)

    def _write_gradients(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor | None], caller: FrameType
    ) -> None:
        by = args[1] if len(args) > 1 else kwargs["inputs"]
        by = [by] if isinstance(by, Tensor) else list(by)
        known = [self._values[tensor].parameters if tensor in self._values else () for tensor in by]
        found = [
            (names, self._add(result, None)) for names, result in zip(known, results, strict=True) if result is not None
        ]
        made_of = self._ancestors([*tensors_in(args), *tensors_in(kwargs)])
        for taken in self.trace.gradients:
            if made_of.intersection(taken.results):  # a gradient of a gradient
                taken.results += [value for _, value in found]
        names = tuple(name for names, _ in found for name in names)
        if names:
            values = [value for names, value in found if names]
            self.trace.gradients.append(GradientTaken(names, values, code_place(caller)))

    def _ancestors(self, tensors: Sequence[Tensor]) -> set[Value]:
        """The values that tensors are made of, themselves among them."""
        found: set[Value] = set()
        pending = [self._values[tensor] for tensor in tensors if tensor in self._values]
        while pending:
            value = pending.pop()
            if value not in found:
                found.add(value)
                pending += value.producer.inputs if value.producer is not None else ()
        return found

    def _note_written(self, tensor: Tensor, caller: FrameType) -> None:
        for name in self._values[tensor].parameters if tensor in self._values else ():
            if self.trace.facts[name].trainable:
                self.trace.written.setdefault(name, code_place(caller))

    def _note_transformed(self, op: str, tensor: Tensor, caller: FrameType) -> None:
        """Note the parameters that a transform of torch.func has made a tensor of its own of."""
        if op != "_make_dual" and tensor in self._values:
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor) and tensor not in self._values:
            tensor = torch._C._functorch.get_unwrapped(tensor)
        for name in self._values[tensor].parameters if tensor in self._values else ():
            self.trace.in_transforms.setdefault(name, code_place(caller))

    def _measure(self, call: Call, tensors: FunctionCall, output: Tensor) -> None:
        op = MATMULS[call.name]
        values = op.operands(call)
        for label, tensor in op.operands(tensors).items():
            if isinstance(tensor, Tensor) and values[label].rms is None:
                values[label].rms = rms(tensor)
        call.output.rms = rms(output)

    def _read(self, argument: Any, inputs: list[Value]) -> Any:
        if isinstance(argument, Tensor):
            value = self._values.get(argument)
            if value is None:
                value = self._add(argument, None)
                self._note_copy(value, argument)
            inputs.append(value)
            return value
        if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
            return tuple(self._read(item, inputs) for item in argument)
        return argument

    def _add(
        self,
        tensor: Tensor,
        producer: Call | None,
        parameters: tuple[str, ...] = (),
        expression: bool = False,
        constant: bool = False,
    ) -> Value:
        self._value_count += 1
        self.trace.transformed |= torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        value = Value(
            index=self._value_count,
            shape=tuple(tensor.shape),
            is_float=tensor.is_floating_point() or tensor.is_complex(),
            requires_grad=tensor.requires_grad or self._carries_gradient(tensor, producer),
            producer=producer,
            parameters=parameters,
            expression=expression and bool(parameters),
            constant=constant,
            is_complex=tensor.is_complex(),
            number=number(tensor) if constant else None,
        )
        self._values[tensor] = value
        return value

    def _note_copy(self, value: Value, tensor: Tensor) -> None:
        if any(is_copy(tensor, parameter) for parameter in self._by_shape.get(tuple(tensor.shape), ())):
            self.trace.copies.append((value, tensor))

    def _carries_gradient(self, tensor: Tensor, producer: Call | None) -> bool:
        """Whether a tensor made inside an autograd.Function is computed from some that require gradients."""
        if not self._functions_running or producer is None or not tensor.is_floating_point():
            return False
        return any(value.requires_grad for value in producer.inputs)

    def _where(self, caller: FrameType, name: str, counts: bool) -> tuple[Frame | None, int, bool]:
        """The frame of a torch call, its ordinal there, and whether a hand-written autograd.Function made it.

        Or a checkpointed function that is no method: run again, it is in no frame, and a factor there would be lost.
        There is no frame for calls made by a hook. A Function that runs modules of the model, as checkpointing does,
        runs them again for the backward pass: their calls are the modules' own.
        """
        python_frame: FrameType | None = caller
        in_function = False
        while python_frame is not None:
            code = python_frame.f_code
            if code in MODULE_CALL:
                return None, 0, in_function
            in_function = in_function or code in RUN_ASIDE
            if code.co_argcount:
                owner = python_frame.f_locals.get(code.co_varnames[0])
                module = self._module_names.get(id(owner)) if isinstance(owner, nn.Module) else None
                is_frame = module is not None and _is_method(owner, code.co_name)
                if module is not None and is_frame and not is_past_instance(python_frame, owner):
                    self._frames[id(python_frame)] = python_frame
                    key = (id(python_frame), name)
                    ordinal = self._ordinals.get(key, 0)
                    self._ordinals[key] = ordinal + counts
                    return Frame(module, code.co_name), ordinal, in_function
            python_frame = python_frame.f_back
        return None, 0, in_function


def code_place(caller: FrameType) -> str:
    """The first function outside torch, and outside our stand-ins for its methods, that led to a call; for messages."""
    frame: FrameType | None = caller
    while frame is not None and _is_between(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    if frame is None:
        return "torch"
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"


def _is_between(module: str) -> bool:
    return module.partition(".")[0] == "torch" or module.startswith("lightning_unitscale.engine.record.")


def _is_method(owner: Any, name: str) -> bool:
    """Whether a scope can stand in for a method: python looks `__call__` and the like up on the class alone.

    What those do (attention processors) belongs to the module that calls them.
    """
    return not name.startswith("__") and callable(getattr(type(owner), name, None))


def loss_tensors(output: Any, backwards: list[Tensor]) -> list[Tensor]:
    """What a step's backward passes start from: what backward was called on, and what the step returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return [tensor for tensor in (*backwards, loss) if isinstance(tensor, Tensor)]
