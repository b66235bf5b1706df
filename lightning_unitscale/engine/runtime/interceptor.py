"""The explicit factors and casts of a plan at work, while the model runs.

They are applied by a `TorchFunctionMode` that is entered by `ScopedForward`, a small object whose bound method stands
in the place of `module.forward` (or another method) on the modules concerned, and on no others. What belongs to a
parameter is found by the parameter itself, followed through views and casts, so it holds in any number of calls; a
parameter-free factor by its frame and by which call (0, 1, …) of its function it is there.

In compiled code a tensor has no id, but `is` is traced: there tensors are looked for in the lists of an interceptor,
which eager code only has an index of. A scope that is compiled inside an eager interceptor (a block inside a model)
opens one of its own, that lives in the compiled code alone, and looks up what it does not know in the eager one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import TensorInput, UseId, arguments_used, is_made_of_parameters
from lightning_unitscale.engine.record.places import EVERY_CALL, Place
from lightning_unitscale.engine.record.recorder import MODULE_CALL, has_ordinal, tensors_in
from lightning_unitscale.engine.runtime.casts import AttentionCast, CastSite, WeightCast
from lightning_unitscale.engine.runtime.compilation import only_inside_others, show_to_modes
from lightning_unitscale.engine.runtime.made_of import MadeOf, made_of_by_key
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
        made_of: the weights with uses that have a factor or are cast, by key.
        casts: the uses whose operands are cast, those of products without a weight too.
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
        self.made_of = made_of_by_key(factors, readings, casts)
        self.casts, self.followed, self.free = casts, frozenset(followed), frozenset(free)
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
        show_to_modes(self.watched)

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


class FreeSite(NamedTuple):
    """A parameter-free site, and the casts of its operands if there are to be any."""

    site: Site
    cast: AttentionCast | None


class ScopedForward:
    """Stands in for `module.<method>`: opens a frame, in which the factors of the plan are applied.

    Survives `copy.deepcopy` (the copy runs the copy's weights) and `pickle`: it holds the module, and looks the method
    up at each call.

    Attributes:
        in_parametrization: whether the module makes a weight of another module.
        replaced: somebody else's function that stood in for the method already.
        touched: the parameters that the method's own code hands to torch functions: owner, attribute, what it is.
        sites: the parameter-free sites in it, by function and which call of it, each with its casts.
        most_calls: of the functions with such sites, how often one run of the recorded step called them.
        output_site: whose factor what the method returns has.
    """

    def __init__(self, module: nn.Module, method: str, rules: Rules, in_parametrization: bool) -> None:
        self.module, self.method, self.rules, self.in_parametrization = module, method, rules, in_parametrization
        self.replaced = module.__dict__.get(method)
        self.touched: list[tuple[nn.Module, str, MadeOf]] = []
        self.sites: dict[tuple[str, int], FreeSite] = {}
        self.most_calls: dict[str, int] = {}
        self.output_site: Site | None = None

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return f"{type(self.module).__name__}.{self.method}"

    @property
    def bound(self) -> MethodType:
        """What is put in the place of the method: a bound method, that has the name, signature and code of none other.

        Of any other callable there the compiler takes each for another, and compiles equal modules anew.
        """
        function = FunctionType(ScopedForward.__call__.__code__, globals(), "bound")  # pickle looks it up by this name
        if self.replaced is None:
            function.__wrapped__ = getattr(type(self.module), self.method)  # type: ignore[attr-defined]
        else:
            given = inspect.signature(self.replaced)
            owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            function.__signature__ = given.replace(parameters=(owner, *given.parameters.values()))  # type: ignore[attr-defined]
        return MethodType(function, self)

    @staticmethod
    def behind(value: Any) -> ScopedForward | None:
        """The scope that an attribute of a module runs, if it is the method of one."""
        scope = value.__self__ if isinstance(value, MethodType) else None
        return scope if isinstance(scope, ScopedForward) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method in a frame, inside the interceptor of the plan."""
        # One mode for the outermost scope and all inside it: a second one would apply every factor twice, and a weight
        # made in one frame (tied, or computed by a parent) is known in the frames that use it.
        outside = _current(self.rules)
        if outside is not None and outside.traced == torch.compiler.is_compiling():
            return outside.run(self, args, kwargs)
        return Interceptor(self.rules, outside).run_outermost(self, args, kwargs)

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
    """Applies the rules while the outermost scope runs.

    Args:
        outside: the eager one in force around compiled code, or the other way round. It takes no part meanwhile.
    """

    def __init__(self, rules: Rules, outside: Interceptor | None = None) -> None:
        super().__init__()
        self.rules, self.outside = rules, outside
        self.traced = torch.compiler.is_compiling()
        self.silent = False
        self.frames: list[_OpenFrame] = []
        # Tensors with what they are made of. They are kept alive, so that no other tensor gets their id.
        self.parameters: list[tuple[Tensor, MadeOf]] = []  # those of the open frames
        self.derived: list[tuple[Tensor, MadeOf]] = []  # what was made of them, until the outermost scope ends
        self.by_id: dict[int, MadeOf] = {}  # both, in eager mode; see `_made_of`
        self.indexed = 0

    def run_outermost(self, scope: ScopedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the scope with this interceptor in force."""
        if self.outside is None:
            with self, observers_inside():
                return self.run(scope, args, kwargs)
        self.outside.silent = True
        try:
            with self, observers_inside():
                output = self.run(scope, args, kwargs)
        finally:
            self.outside.silent = False
        self._hand_over(output, self.outside)
        return output

    def run(self, scope: ScopedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the scope's method in a frame of its own."""
        known = len(self.parameters)
        # Anew at each run: sharding and functional calls put other tensors in the place of a parameter.
        for owner, attribute, made_of in scope.touched:
            if not torch.compiler.is_compiling() and attribute not in owner._parameters:
                _refuse_computed(owner, attribute, made_of.key)
            parameter = getattr(owner, attribute)
            if self._made_of(parameter) is not made_of:
                self._track(self.parameters, parameter, made_of)
        self.frames.append(_OpenFrame(scope))
        try:
            output = scope.call(args, kwargs)
        finally:
            self.frames.pop()
            self._forget(known)
        return output if scope.output_site is None else _scaled_output(output, scope.output_site)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.silent:
            return function(*args, **kwargs)
        if function is Tensor.unflatten:  # the compiler can't follow the super() in it
            function = torch.unflatten
        name = self.rules.watched.get(function)
        if name is None:
            if torch.compiler.is_compiling() and isinstance(function, (OpOverload, OpOverloadPacket)):
                self._refuse_unknown(function, args)
            return function(*args, **kwargs)
        if name == _MULTI_HEAD:
            if function is not F.multi_head_attention_forward:
                return function(*args, **kwargs)
            with self:
                return open_multi_head_attention(*args, **kwargs)
        call = FunctionCall(function, args, kwargs)
        if name in self.rules.free:
            free = self._site(name, args)
            if free is not None:
                return self._run_site(free, name, call)
        result = self._run(name, call)
        if name in self.rules.followed:
            self._follow(name, call, result)
        return result

    def _refuse_unknown(self, operator: Any, args: tuple[Any, ...]) -> None:
        """Some libraries call another kernel where they are compiled than where they were recorded.

        Raises:
            UnitScalingError: an operator that was not recorded takes a weight with a factor.
        """
        for tensor in tensors_in(args):
            made_of = self._made_of(tensor)
            if made_of is not None and made_of.factors:
                raise UnitScalingError(
                    f"{self.frames[-1].scope.name}: compiled code calls the operator {operator} with {made_of.key}, "
                    "whose factor belongs to the function that eager code called in the recorded step. List the weight "
                    "in skip, or have the library call the same function in both."
                )

    def _run(self, name: str, call: FunctionCall) -> Any:
        """The call with the factors of its parameters, unless it makes another weight of them."""
        if name not in self.rules.ops or (name in MATMULS and self._makes_weight(name, call)):
            return call.run()
        op = MATMULS.get(name)
        if op is None:
            return call.with_each(lambda argument: self._scaled(argument, name)).run()
        operands = op.operands(call)
        if casting := self._casting(op, call):
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
            made_of = self._made_of(tensor)
            if made_of is not None and name not in made_of.readings:
                known.append(TensorInput.of(tensor, made_of.parts, constant=False))
            elif tensor.is_floating_point() or tensor.is_complex():
                return False
        return is_made_of_parameters(name, call, known, self._in_parametrization)

    def _casting(self, op: Matmul, call: FunctionCall) -> tuple[WeightCast, Any, Any] | None:
        """The site that this call is, its activation and its weight, if its operands are to be cast."""
        operands = op.cast_operands(call, self._is_known) if self.rules.casts else None
        if operands is None:
            return None
        made_of = self._made_of(operands[1])
        cast = made_of.casts.get(op.name) if made_of is not None else None
        return (cast, *operands) if cast is not None and cast.scales is not None else None

    def _is_known(self, operand: Tensor) -> bool:
        return self._made_of(operand) is not None

    def _run_site(self, free: FreeSite, name: str, call: FunctionCall) -> Any:
        """The call as the parameter-free site that it is, with its operands cast if they are to be."""
        site, cast = free
        if site.format is None:
            return self._run_with_factor(site, name, call)
        op = MATMULS[name]
        if cast is not None and cast.scales is not None:
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
        made_of = self._made_of(operand) if isinstance(operand, Tensor) else None
        if made_of is None or name not in made_of.factors:
            return 1.0
        if self.rules.applied is not None:
            self.rules.applied.add(UseId(made_of.key, name))
        return made_of.factors[name]

    def _made_of(self, tensor: Tensor) -> MadeOf | None:
        """What the tensor is known to be made of. The search costs nothing once the code is compiled."""
        if not torch.compiler.is_compiling():
            if self.indexed != len(self.parameters) + len(self.derived):  # compiled code has added some
                self.by_id = {id(known): made_of for known, made_of in (*self.parameters, *self.derived)}
                self.indexed = len(self.parameters) + len(self.derived)
            found = self.by_id.get(id(tensor))
            return found if found is not None or self.outside is None else self.outside._made_of(tensor)
        for known, made_of in self.parameters:
            if known is tensor:
                return made_of
        for known, made_of in self.derived:
            if known is tensor:
                return made_of
        return None if self.outside is None else self.outside._made_of(tensor)

    def _track(self, known: list[tuple[Tensor, MadeOf]], tensor: Tensor, made_of: MadeOf) -> None:
        known.append((tensor, made_of))
        if not torch.compiler.is_compiling():
            self.by_id[id(tensor)] = made_of
            self.indexed += 1

    def _forget(self, first: int) -> None:
        """Drop the parameters of a frame that has ended, those from `first` on."""
        if not torch.compiler.is_compiling():
            for tensor, _ in self.parameters[first:]:
                self.by_id.pop(id(tensor), None)
                self.indexed -= 1
        del self.parameters[first:]

    def _hand_over(self, output: Any, outside: Interceptor) -> None:
        """What is returned to the code around is known there too."""
        for tensor in tensors_in(output):
            made_of = self._made_of(tensor)
            if made_of is not None:
                outside.derived.append((tensor, made_of))

    def _follow(self, name: str, call: FunctionCall, result: Any) -> None:
        """Remember what the output of a call is made of, if of parameters."""
        call = arguments_used(name, call)
        inputs = [(tensor, self._made_of(tensor)) for tensor in tensors_in((*call.args, *call.kwargs.values()))]
        parameters = [made_of for _, made_of in inputs if made_of is not None]
        if not parameters:
            return  # at once: most calls of these functions are on activations
        if any([name in made_of.readings for made_of in parameters]):  # noqa: C419
            return
        known = [TensorInput.of(t, () if made_of is None else (made_of,), made_of is None) for t, made_of in inputs]
        if is_made_of_parameters(name, call, known, self._in_parametrization):
            made_of = MadeOf.all_of(parameters)
            for output in tensors_in(result):
                if self._made_of(output) is None:
                    self._track(self.derived, output, made_of)

    def _in_parametrization(self) -> bool:
        return self.frames[-1].scope.in_parametrization

    def _site(self, name: str, args: tuple[Any, ...]) -> FreeSite | None:
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
        free = frame.scope.sites.get((name, EVERY_CALL)) or frame.scope.sites.get((name, ordinal))
        site = free.site if free is not None else None
        if site is not None and site.last_dim is not None and site.operand is not None:
            found = args[site.operand].shape[-1]
            if found != site.last_dim:
                raise UnitScalingError(
                    f"{site.name}: the recorded operand had a last dimension of {site.last_dim}, this one has {found}. "
                    "The model takes another path here than in the recorded step; list the module in skip, or "
                    "record a step that takes both paths."
                )
        return free


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


def _current(rules: Rules) -> Interceptor | None:
    """The innermost interceptor of these rules that is in force; a prepared model may run inside another one's scope.

    It is one of the modes that are entered, which compiled code sees as eager code does. Each thread has its own:
    checkpointed layers are run again in autograd's thread, where no mode of this one is entered.
    """
    for position in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(position)
        if isinstance(mode, Interceptor) and mode.rules is rules:
            return mode
    return None


# `call` too: by its code the frames are known in the stack of an eager call.
only_inside_others(
    ScopedForward.call.__code__,
    *(method.__code__ for method in vars(Interceptor).values() if isinstance(method, FunctionType)),
)
