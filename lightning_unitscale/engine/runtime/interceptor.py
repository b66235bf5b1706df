"""The explicit factors and casts of a plan at work, while the model runs.

They are applied by a `TorchFunctionMode` that is entered by the outermost `ScopedForward`, which stands in the place of
`module.forward` (or another method) on the modules concerned, and on no others. Of each torch call it asks

    is it a use of a parameter with a factor?    the parameter is followed through views and casts (`known_tensors`), so
                                                 this holds in any number of calls, wherever they are made
    is it a parameter-free site?                 known by its frame, and by which call (0, 1, …) of its function it is
                                                 there (`open_frame`)

and runs it with the factor where that costs least (`ops`, `free_factor`), or with its operands cast (`casts`).

A scope that is compiled inside an eager interceptor (a block inside a model) opens one of its own, that lives in the
compiled code alone, and looks up what it does not know in the eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.tensors_of_calls import tensors_in
from lightning_unitscale.engine.runtime.casts import WeightCast
from lightning_unitscale.engine.runtime.compilation import only_inside_others, run_graph_inside
from lightning_unitscale.engine.runtime.free_factor import add_with_constant, run_with_factor, scaled_output
from lightning_unitscale.engine.runtime.known_tensors import KnownTensors
from lightning_unitscale.engine.runtime.observer import ObservedProduct, observers_inside, show_to_observers
from lightning_unitscale.engine.runtime.open_frame import OpenFrame
from lightning_unitscale.engine.runtime.rules import MULTI_HEAD, WATCHED, Rules, WatchedFunction
from lightning_unitscale.engine.runtime.scope import FreeSite, Scope
from lightning_unitscale.errors import UncastableError, UnitScalingError
from lightning_unitscale.ops import MATMULS, FunctionCall, Matmul
from lightning_unitscale.ops.attention import open_multi_head_attention


class Interceptor(TorchFunctionMode):
    """Applies the rules while the outermost scope runs.

    Args:
        outside: the eager one in force around compiled code, or the other way round. It takes no part meanwhile.

    Attributes:
        traced: whether it was made in compiled code.
        silent: whether it lets all calls pass as they are.
    """

    def __init__(self, rules: Rules, outside: Interceptor | None = None) -> None:
        super().__init__()
        self.rules, self.outside = rules, outside
        self.traced = torch.compiler.is_compiling()
        self.silent = False
        self.frames: list[OpenFrame] = []
        self.known: KnownTensors = KnownTensors(None if outside is None else outside.known)

    def run_outermost(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the scope with this interceptor in force."""
        if not self.traced and parametrize._cache_enabled:
            parametrize._cache.clear()  # weights made in another run are not known in this one
        if self.outside is None:
            with self, observers_inside():
                return self.run(scope, args, kwargs)
        self.outside.silent = True
        try:
            with self, observers_inside():
                output = self.run(scope, args, kwargs)
        finally:
            self.outside.silent = False
        self.known.hand_over(output)
        return output

    def run(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the scope's method in a frame of its own."""
        known = len(self.known.parameters)
        # Anew at each run: sharding and functional calls put other tensors in the place of a parameter.
        for owner, attribute, made_of in scope.touched:
            if not torch.compiler.is_compiling() and attribute not in owner._parameters:
                _refuse_computed(owner, attribute, made_of.key)
            self.known.add_parameter(getattr(owner, attribute), made_of)
        self.frames.append(OpenFrame(scope))
        try:
            output = scope.call(args, kwargs)
        finally:
            self.frames.pop()
            self.known.forget_parameters(known)
        return output if scope.output_site is None else scaled_output(output, scope.output_site)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            comptime(_silence_around_graph)
        if self.silent:
            return function(*args, **kwargs)
        if function is Tensor.unflatten:  # the compiler can't follow the super() in it
            function = torch.unflatten
        watched = WATCHED.get(function)
        if watched is None or watched.name not in self.rules.names:
            if torch.compiler.is_compiling() and isinstance(function, (OpOverload, OpOverloadPacket)):
                self._refuse_unknown(function, args)
            return function(*args, **kwargs)
        name = watched.name
        if name == MULTI_HEAD:
            if function is not F.multi_head_attention_forward:
                return function(*args, **kwargs)
            with self:
                return open_multi_head_attention(*args, **kwargs)
        call = FunctionCall(function, args, kwargs)
        if name in self.rules.free:
            free = self.frames[-1].free_site(name, args)
            if free is not None:
                return self._run_site(free, watched, call)
        made_of = self.known.what_is_made(name, call, self._in_parametrization, self.rules)
        if made_of is None:
            return self._run(name, call)
        result = call.run()  # a factor belongs to the use of what comes out
        self.known.add_made(result, made_of)
        return result

    # --- uses of parameters ------------------------------------------------------------------------------------

    def _run(self, name: str, call: FunctionCall) -> Any:
        """The call with the factors of its parameters."""
        if name not in self.rules.ops:
            return call.run()
        op = MATMULS.get(name)
        if op is None:
            return self._with_scaled_operands(name, call).run()
        casting = self._casting(op, call)
        call = self._with_block_constants(name, call, None if casting is None else casting[2])
        operands = op.operands(call)
        if casting is not None:
            site, x, weight = casting
            try:
                return op.cast(call, x, weight, site, self._factor(operands.get("bias"), name))
            except UncastableError as error:
                raise UnitScalingError(
                    f"{self.frames[-1].scope.name}: the operands of {name} were cast in the recorded step, and those "
                    f"of this call can't be ({error}). Leave its weight out: overrides={{name: {{'format': None}}}}."
                ) from None
        factors = {}
        for label, operand in operands.items():
            factor = self._factor(operand, name)
            if factor != 1.0:
                factors[label] = factor
        return op.scaled(call, factors) if factors else call.run()

    def _with_scaled_operands(self, name: str, call: FunctionCall) -> FunctionCall:
        """The call with each parameter multiplied by its factor."""

        def scaled(argument: Any) -> Any:
            factor = self._factor(argument, name)
            return argument if factor == 1.0 else argument * factor

        return self._with_block_constants(name, call).with_each(scaled)

    def _with_block_constants(self, name: str, call: FunctionCall, cast_weight: Any = None) -> FunctionCall:
        """In compiled code: with those factors on parameters that differ between blocks. A cast has its weight's."""
        if not torch.compiler.is_compiling():
            return call

        def scaled(argument: Any) -> Any:
            made_of = self.known.made_of(argument) if isinstance(argument, Tensor) else None
            if made_of is None or argument is cast_weight or name not in made_of.constants:
                return argument
            return made_of.constants[name].times(argument)

        return call.with_each(scaled)

    def _factor(self, operand: Any, name: str) -> float:
        made_of = self.known.made_of(operand) if isinstance(operand, Tensor) else None
        if made_of is None or name not in made_of.factors:
            return 1.0
        if self.rules.applied is not None:
            self.rules.applied.add(UseId(made_of.key, name))
        return made_of.factors[name]

    def _casting(self, op: Matmul, call: FunctionCall) -> tuple[WeightCast, Any, Any] | None:
        """The site that this call is, its activation and its weight, if its operands are to be cast."""
        operands = op.cast_operands(call, self.known.is_known) if self.rules.casts else None
        if operands is None:
            return None
        made_of = self.known.made_of(operands[1])
        cast = made_of.casts.get(op.name) if made_of is not None else None
        return (cast, *operands) if cast is not None and cast.scales is not None else None

    def _in_parametrization(self) -> bool:
        """Whether the code that runs makes a weight of another module."""
        return self.frames[-1].scope.in_parametrization

    # --- parameter-free sites ----------------------------------------------------------------------------------

    def _run_site(self, free: FreeSite, function: WatchedFunction, call: FunctionCall) -> Any:
        """The call as the parameter-free site that it is, with its operands cast if they are to be."""
        site, cast = free.site, free.cast
        if site.format is None:
            return self._run_with_factor(free, function, call)
        op = MATMULS[function.name]
        if cast is not None and cast.scales is not None:
            result = cast.rounded_gradient(self._run_with_factor(free, function, cast.rounded(op, call)))
        else:
            result = self._run_with_factor(free, function, call)
        show_to_observers(site.use, ObservedProduct(call, op.multiplicands(call), result))
        return result

    def _run_with_factor(self, free: FreeSite, function: WatchedFunction, call: FunctionCall) -> Any:
        site, (name, in_place) = free.site, function
        if torch.compiler.is_compiling() and free.constant is not None:
            return add_with_constant(site, call, in_place, free.constant)
        if self.rules.applied is not None:
            self.rules.applied.add(site.place)
        if site.role == "attention" and site.factors[""] != 1.0 and name in self.rules.ops:
            call = self._with_scaled_operands(name, call)  # a learned query or value has a factor of its own
        return run_with_factor(site, name, call, in_place, lambda c: self._run(name, c))

    # --- what is refused ---------------------------------------------------------------------------------------

    def _refuse_unknown(self, operator: Any, args: tuple[Any, ...]) -> None:
        """Some libraries call another kernel where they are compiled than where they were recorded.

        Raises:
            UnitScalingError: an operator that was not recorded takes a weight with a factor.
        """
        for tensor in tensors_in(args):
            made_of = self.known.made_of(tensor)
            if made_of is not None and made_of.factors:
                raise UnitScalingError(
                    f"{self.frames[-1].scope.name}: compiled code calls the operator {operator} with {made_of.key}, "
                    "whose factor belongs to the function that eager code called in the recorded step. List the weight "
                    "in skip, or have the library call the same function in both."
                )


def _silence_around_graph(context: ComptimeContext) -> None:
    """What compiled code has traced through an interceptor is not to meet it once more when it runs."""
    run_graph_inside(context, _silence)


@contextmanager
def _silence() -> Iterator[None]:
    """Let all calls pass inside."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    loud = [mode for mode in modes if isinstance(mode, Interceptor) and not mode.silent]
    for mode in loud:
        mode.silent = True
    try:
        yield
    finally:
        for mode in loud:
            mode.silent = False


def _refuse_computed(owner: nn.Module, attribute: str, key: str) -> None:
    """
    Raises:
        UnitScalingError: what was a parameter is made anew at each access now, and so can't be followed to its use.
    """
    if attribute not in owner.__dict__:  # where sharding and functional calls put tensors in place of parameters
        raise UnitScalingError(
            f"{key} has a factor and is no parameter of {type(owner).__name__} any more, but computed (a "
            "parametrization such as weight_norm?): done after the model was prepared, it takes the factor away. Do "
            "it before, or between remove_unit_scaling(model) and preparing the model anew."
        )


only_inside_others(Interceptor)
