"""The explicit factors and casts of a plan at work, while the model runs.

They are applied by a `TorchFunctionMode` that is entered by `ScopedForward`, a small object in place of
`module.forward` (or another method) on the modules concerned, and on no others. What belongs to a parameter is found
by the parameter itself, followed through views and casts, so it holds in any number of calls; a parameter-free factor
by its frame and by which call (0, 1, …) of its function it is there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import (
    ParameterKey,
    TensorInput,
    UseId,
    arguments_used,
    parameters_of_result,
)
from lightning_unitscale.engine.record.places import EVERY_CALL, Place
from lightning_unitscale.engine.record.recorder import MODULE_CALL, has_ordinal, tensors_in
from lightning_unitscale.engine.runtime.casts import AttentionCast, CastSite, WeightCast
from lightning_unitscale.engine.runtime.observer import ObservedProduct, observers_inside, show_to_observers
from lightning_unitscale.errors import UncastableError, UnitScalingError
from lightning_unitscale.ops import MATMULS, FunctionCall, Matmul, functions_named
from lightning_unitscale.ops.attention import open_multi_head_attention
from lightning_unitscale.ops.max_scale import max_scale
from lightning_unitscale.ops.torch_functions import OUTPUT_IS_FREE, is_in_place

_MULTI_HEAD = "multi_head_attention_forward"


class Rules:
    """The explicit factors of one plan, shared by all its scopes.

    Attributes:
        factors: by (parameter key, function name).
        readings: those of them at which code reads a weight; what it makes of it is no weight any more.
        casts: the uses whose operands are cast, by the same.
        followed: names of the functions through which parameters are followed.
        free: names of the functions with parameter-free sites.
        applied: what was applied, while somebody asks; None otherwise.
    """

    def __init__(
        self,
        factors: dict[UseId, float],
        readings: set[UseId],
        casts: dict[UseId, CastSite],
        followed: list[str],
        free: list[str],
    ) -> None:
        self.applied: AppliedFactors | None = None
        self.factors, self.casts, self.followed, self.free = factors, casts, frozenset(followed), frozenset(free)
        self.readings = frozenset(readings)
        self.ops = frozenset(op for _, op in (*factors, *casts))
        self._find_functions()

    def _find_functions(self) -> None:
        names = self.followed | self.free | self.ops | {_MULTI_HEAD}
        known = {name: functions_named(name) for name in names}
        unknown = sorted(name for name, functions in known.items() if not functions)
        if unknown:
            raise UnitScalingError(f"no torch function is called {', '.join(unknown)}: torch is another version?")
        self.watched: dict[Any, str] = {function: name for name, functions in known.items() for function in functions}
        self.in_place = frozenset(function for function in self.watched if is_in_place(function))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("watched", "in_place")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_functions()


class AppliedFactors(set[UseId | Place]):
    """The uses, and the places of parameter-free sites, whose factor was applied.

    Copies of the rules share it: a rehearsal runs on copies of all that modules hold.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedFactors:
        return self


class ScopedForward:
    """Stands in for `module.<method>`: opens a frame, in which the factors of the plan are applied.

    Survives `copy.deepcopy` (the copy runs the copy's weights) and `pickle`: it holds the module, and looks the method
    up at each call.

    Attributes:
        in_parametrization: whether the module makes a weight of another module.
        replaced: somebody else's function that stood in for the method already.
        touched: the parameters that the method's own code hands to torch functions: owner, attribute, key.
        sites: the parameter-free sites in it, by function and which call of it.
        most_calls: of the functions with such sites, how often one run of the recorded step called them.
        output_site: whose factor what the method returns has.
    """

    def __init__(self, module: nn.Module, method: str, rules: Rules, in_parametrization: bool) -> None:
        self.module, self.method, self.rules, self.in_parametrization = module, method, rules, in_parametrization
        self.replaced = module.__dict__.get(method)
        self.touched: list[tuple[nn.Module, str, str]] = []
        self.sites: dict[tuple[str, int], Site] = {}
        self.most_calls: dict[str, int] = {}
        self.output_site: Site | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return (
            self.replaced
            if self.replaced is not None
            else MethodType(getattr(type(self.module), self.method), self.module)
        )

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return f"{type(self.module).__name__}.{self.method}"

    @property
    def __name__(self) -> str:
        return self.method

    @property
    def __code__(self) -> Any:
        """As of any forward: `torch.export` names its inputs by the file and line."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method in a frame, inside the interceptor of the plan."""
        # One mode for the outermost scope and all inside it: a second one would apply every factor twice, and a weight
        # made in one frame (tied, or computed by a parent) is known in the frames that use it.
        interceptor = _current(self.rules)
        if interceptor is not None:
            return interceptor.run(self, args, kwargs)
        interceptor = Interceptor(self.rules)
        _running().append(interceptor)
        try:
            with interceptor, observers_inside():
                return interceptor.run(self, args, kwargs)
        finally:
            _running().pop()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what the scope stands in for."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


class _OpenFrame:
    """One running scope: how often each counted function has been called in it.

    Counts are of one run of one frame. Over the whole step they would depend on everything that came before: a layer
    skipped, a loop over the experts that got a token, a logger.
    """

    def __init__(self, scope: ScopedForward) -> None:
        self.scope = scope
        self.counts: dict[str, int] = {}


class Interceptor(TorchFunctionMode):
    """Applies the rules while the outermost scope runs."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.frames: list[_OpenFrame] = []
        # Tensors with the key of what they are made of. They are kept alive, so that no other tensor gets their id.
        self.parameters: list[tuple[Tensor, str]] = []  # those of the open frames
        self.derived: list[tuple[Tensor, str]] = []  # what was made of them, until the outermost scope ends
        self.keys: dict[int, str] = {}  # both by id, for eager mode; see `_key`

    def run(self, scope: ScopedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the scope's method in a frame of its own."""
        outside = len(self.parameters)
        # Anew at each run: sharding and functional calls put other tensors in the place of a parameter.
        for owner, attribute, key in scope.touched:
            if not torch.compiler.is_compiling() and attribute not in owner._parameters:
                _refuse_computed(owner, attribute, key)
            self._track(self.parameters, getattr(owner, attribute), key)
        self.frames.append(_OpenFrame(scope))
        try:
            output = scope.call(args, kwargs)
        finally:
            self.frames.pop()
            del self.parameters[outside:]
        return output if scope.output_site is None else _scaled_output(output, scope.output_site)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.unflatten:  # the compiler can't follow the super() in it
            function = torch.unflatten
        name = self.rules.watched.get(function)
        if name is None:
            return function(*args, **kwargs)
        if name == _MULTI_HEAD:
            if function is not F.multi_head_attention_forward:
                return function(*args, **kwargs)
            with self:
                return open_multi_head_attention(*args, **kwargs)
        call = FunctionCall(function, args, kwargs)
        if name in self.rules.free:
            site = self._site(name, args)
            if site is not None:
                return self._run_site(site, name, call)
        result = self._run(name, call)
        if name in self.rules.followed:
            self._follow(name, call, result)
        return result

    def _run(self, name: str, call: FunctionCall) -> Any:
        """The call with the factors of its parameters, unless it makes another weight of them."""
        if name not in self.rules.ops or (name in MATMULS and self._makes_weight(name, call)):
            return call.run()
        op = MATMULS.get(name)
        if op is None:
            return call.with_each(lambda argument: self._scaled(argument, name)).run()
        operands = op.operands(call)
        if self.rules.casts and (casting := self._casting(op, call)):
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

    def _makes_weight(self, name: str, call: FunctionCall) -> bool:
        """Whether nothing but parameters goes in, as in `a @ a.T`: a factor belongs to the use of what comes out."""
        known = []
        for tensor in tensors_in((*call.args, *call.kwargs.values())):
            key = self._key(tensor)
            if key is not None and UseId(key, name) not in self.rules.readings:
                known.append(TensorInput.of(tensor, ParameterKey.names_in(key), constant=False))
            elif tensor.is_floating_point() or tensor.is_complex():
                return False
        return bool(parameters_of_result(name, call, known, lambda: self.frames[-1].scope.in_parametrization))

    def _casting(self, op: Matmul, call: FunctionCall) -> tuple[WeightCast, Any, Any] | None:
        """The site that this call is, its activation and its weight, if its operands are to be cast."""
        operands = op.cast_operands(call, lambda operand: self._key(operand) is not None)
        if operands is None:
            return None
        key = self._key(operands[1])
        site = self.rules.casts.get(UseId(key, op.name)) if key is not None else None
        return (site, *operands) if isinstance(site, WeightCast) and site.scales is not None else None

    def _run_site(self, site: Site, name: str, call: FunctionCall) -> Any:
        """The call as the parameter-free site that it is, with its operands cast if they are to be."""
        if site.format is None:
            return self._run_with_factor(site, name, call)
        op, cast = MATMULS[name], self.rules.casts.get(site.use)
        if isinstance(cast, AttentionCast) and cast.scales is not None:
            result = cast.rounded_gradient(self._run_with_factor(site, name, cast.rounded(op, call)))
        else:
            result = self._run_with_factor(site, name, call)
        show_to_observers(site.use, ObservedProduct(call, op.multiplicands(call), result))
        return result

    def _run_with_factor(self, site: Site, name: str, call: FunctionCall) -> Any:
        if self.rules.applied is not None:
            self.rules.applied.add(site.place)
        # The factor goes where it costs least: into a constant of the function, into an operand, in place into a tensor
        # that nothing else reads. A call in place stays one: its caller goes on with the first operand.
        a, in_place = site.factors[""], call.function in self.rules.in_place
        if a == 1.0:
            return self._run(name, call)
        if site.divides_along is not None:
            return self._run_divided(name, call, site.divides_along, in_place or _asked_in_place(call))
        if site.role == "attention":
            if name in self.rules.ops:  # a learned query or value has a factor of its own
                call = call.with_each(lambda argument: self._scaled(argument, name))
            return MATMULS[name].scaled_logits(call, a, site.operand)
        if site.role == "residual":
            left, right = call.args[:2]
            if site.operand == 1:
                return left.add_(right, alpha=a) if in_place else torch.add(left, right, alpha=a)
            return left.mul_(a).add_(right) if in_place else torch.add(right, left, alpha=a)
        if in_place or (site.role == "activation" and _asked_in_place(call)):
            return self._run_in_place(name, call, a)
        result = self._run(name, call)
        return result.mul_(a) if name in OUTPUT_IS_FREE else result * a

    def _run_divided(self, name: str, call: FunctionCall, dim: int, in_place: bool) -> Any:
        """The call, its output divided by the scale that it has itself."""
        if not in_place:
            result = self._run(name, call)
            return result / max_scale(result, dim)
        target, *others = call.args
        result = self._run(name, FunctionCall(call.function, (target.clone(), *others), call.kwargs))
        return target.copy_(result / max_scale(result, dim))

    def _run_in_place(self, name: str, call: FunctionCall, a: float) -> Any:
        """The factor comes onto a copy: autograd may have saved the output of the call, which must not change."""
        target, *others = call.args
        result = self._run(name, FunctionCall(call.function, (target.clone(), *others), call.kwargs))
        return target.copy_(result * a)

    def _scaled(self, argument: Any, name: str) -> Any:
        factor = self._factor(argument, name)
        return argument if factor == 1.0 else argument * factor

    def _factor(self, operand: Any, name: str) -> float:
        if not isinstance(operand, Tensor):
            return 1.0
        key = self._key(operand)
        if key is None or UseId(key, name) not in self.rules.factors:
            return 1.0
        if self.rules.applied is not None:
            self.rules.applied.add(UseId(key, name))
        return self.rules.factors[UseId(key, name)]

    def _key(self, tensor: Tensor) -> str | None:
        if not torch.compiler.is_compiling():
            return self.keys.get(id(tensor))
        # A tensor that is traced has no id, but `is` is traced. The search costs nothing once the code is compiled.
        for known, key in self.parameters:
            if known is tensor:
                return key
        for known, key in self.derived:
            if known is tensor:
                return key
        return None

    def _track(self, known: list[tuple[Tensor, str]], tensor: Tensor, key: str) -> None:
        known.append((tensor, key))
        if not torch.compiler.is_compiling():
            self.keys[id(tensor)] = key

    def _follow(self, name: str, call: FunctionCall, result: Any) -> None:
        """Remember what the output of a call is made of, if of parameters."""
        call = arguments_used(name, call)
        inputs = [(tensor, self._key(tensor)) for tensor in tensors_in((*call.args, *call.kwargs.values()))]
        if all(key is None for _, key in inputs):
            return  # at once: most calls of these functions are on activations
        if any(UseId(key, name) in self.rules.readings for _, key in inputs if key is not None):
            return
        known = [TensorInput.of(tensor, ParameterKey.names_in(key or ""), key is None) for tensor, key in inputs]
        names = parameters_of_result(name, call, known, lambda: self.frames[-1].scope.in_parametrization)
        if names:
            for output in tensors_in(result):
                if self._key(output) is None:
                    self._track(self.derived, output, ParameterKey.joined(names))

    def _site(self, name: str, args: tuple[Any, ...]) -> Site | None:
        """The parameter-free site that this call is, by its place in the open frame."""
        frame = self.frames[-1]
        # A hook runs inside the frame without being its code: someone who logs means would shift the counts. The
        # recorder left hooks out too; in compiled code there is no stack to tell them by.
        if not has_ordinal(args) or (not torch.compiler.is_compiling() and _called_by_hook()):
            return None
        ordinal = frame.counts.get(name, 0)
        frame.counts[name] = ordinal + 1
        if ordinal >= frame.scope.most_calls.get(name, ordinal + 1):
            raise UnitScalingError(
                f"{frame.scope.name}: {name} was called {frame.scope.most_calls[name]} times in the recorded step and "
                "is called more often now, so its scaled calls cannot be told apart. The model takes another path "
                "here than in the recorded step; list the module in skip, or record a step that takes both paths."
            )
        site = frame.scope.sites.get((name, EVERY_CALL)) or frame.scope.sites.get((name, ordinal))
        if site is not None and site.last_dim is not None and site.operand is not None:
            found = args[site.operand].shape[-1]
            if found != site.last_dim:
                raise UnitScalingError(
                    f"{site.name}: the recorded operand had a last dimension of {site.last_dim}, this one has {found}. "
                    "The model takes another path here than in the recorded step; list the module in skip, or "
                    "record a step that takes both paths."
                )
        return site


def _scaled_output(output: Tensor, site: Site) -> Tensor:
    return output * site.factors[""] if site.divides_along is None else output / max_scale(output, site.divides_along)


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


def _asked_in_place(call: FunctionCall) -> bool:
    """Whether an activation is called with `inplace=True`, the one flag that activations have."""
    return any(argument is True for argument in (*call.args[1:], *call.kwargs.values()))


def _called_by_hook() -> bool:
    """Whether a module hook inside the open frame's method, not the method itself, made the running torch call."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        if frame.f_code is _SCOPE_CALL:
            return False
        if frame.f_code in MODULE_CALL:
            return True
        frame = frame.f_back
    return False


_SCOPE_CALL = ScopedForward.call.__code__


# Interceptors that are entered, innermost last; a prepared model may run inside another one with a plan of its own. One
# list for each thread, as modes are: checkpointed layers are run again in autograd's thread, where no mode of this one
# is entered. The compiler traces one function at a time and can't trace a thread's own list.
_TRACED: list[Interceptor] = []
_EAGER = threading.local()


def _running() -> list[Interceptor]:
    if torch.compiler.is_compiling():
        return _TRACED
    if not hasattr(_EAGER, "interceptors"):
        _EAGER.interceptors = []
    running: list[Interceptor] = _EAGER.interceptors
    return running


def _current(rules: Rules) -> Interceptor | None:
    for interceptor in _running():
        if interceptor.rules is rules:
            return interceptor
    return None
