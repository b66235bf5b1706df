"""The object whose bound method stands in the place of `module.forward`, and through which factors come into force."""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch

from lightning_unitscale.engine.runtime.interceptor import Interceptor
from lightning_unitscale.engine.runtime.rules import Rules
from lightning_unitscale.engine.runtime.scope import Scope


class ScopedForward(Scope):
    """Stands in for `module.<method>`: opens a frame, in which the factors of the plan are applied.

    Survives `copy.deepcopy` (the copy runs the copy's weights) and `pickle`: it holds the module, and looks the method
    up at each call.
    """

    @property
    def bound(self) -> MethodType:
        """What is put in the place of the method: a bound method, that has the name, signature and code of none other.

        Of any other callable there the compiler takes each for another, and compiles equal modules anew.
        """
        function = FunctionType(ScopedForward.__call__.__code__, globals(), "bound")  # pickle looks it up by this name
        if self.replaced is None:
            vars(function)["__wrapped__"] = getattr(type(self.module), self.method)
        else:
            given = inspect.signature(self.replaced)
            owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            vars(function)["__signature__"] = given.replace(parameters=(owner, *given.parameters.values()))
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
