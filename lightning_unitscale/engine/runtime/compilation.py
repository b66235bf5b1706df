"""What `torch.compile` has to be told so that compiled code applies a plan as eager code does.

Eager code and compiled code may alternate in one pass: a block is compiled inside an eager model, or a graph breaks
inside a compiled one. Three things would differ between them:

    which calls a function mode sees     the compiler shows it those alone that torch lists as overridable, and not
                                         `torch._weight_norm` or `torch._grouped_mm`, which eager code shows it
    what a graph runs under              a backend for debugging ("eager") runs the traced calls as they are, and so
                                         shows them once more to the modes that they were traced through
    what is compiled on its own          where the compiler gives up a frame it goes on with the frames below, those of
                                         the interceptor too: half of its state would be eager, half traced
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from types import FunctionType
from typing import Any

from torch._dynamo.comptime import ComptimeContext
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.variables.torch import get_overridable_functions


def show_to_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Have compiled code show function modes these functions, as eager code does."""
    get_overridable_functions().update(function for function in functions if _shows_itself(function))


def _shows_itself(function: Callable[..., Any]) -> bool:
    """Whether it is the function that eager code shows a mode, not one that it calls: it is written in C, or asks."""
    return not isinstance(function, FunctionType) or "handle_torch_function" in function.__code__.co_names


def run_graph_inside(context: ComptimeContext, around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Have the graph that is being traced run inside `around()`."""
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    compiler = output.compiler_fn
    if compiler is None or hasattr(compiler, "_runs_inside"):
        return

    @wraps(compiler)
    def compile_graph(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        compiled = compiler(graph, inputs, **options)

        @wraps(compiled)
        def run(*args: Any, **kwargs: Any) -> Any:
            with around():
                return compiled(*args, **kwargs)

        return run

    compile_graph._runs_inside = around  # type: ignore[attr-defined]  # a mark
    output.compiler_fn = compile_graph


def only_inside_others(*code: type | Callable[..., Any]) -> None:
    """Have these functions, and all methods of these classes, compiled as a part of what calls them alone.

    Called by eager code they are eager.
    """
    for one in code:
        for function in vars(one).values() if isinstance(one, type) else (one,):
            if isinstance(function, FunctionType):
                skip_code(function.__code__)
