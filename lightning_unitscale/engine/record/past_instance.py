"""Which running methods were entered past their instance, by `super().method(…)` or `Base.method(self, …)`.

A scope stands in for a method as an attribute of the instance, which such a call does not ask. What the method does
then belongs to the method that called it, when a step is recorded as when its plan is at work.
"""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_BETWEEN = frozenset({"PRECALL", "EXTENDED_ARG", "CACHE"})


def is_past_instance(frame: FrameType, owner: object) -> bool:
    """Whether a frame runs a method of `owner` that was not looked up on `owner` itself."""
    code, caller = frame.f_code, frame.f_back
    if _is_overridden(type(owner).__mro__, code):
        return True
    return caller is not None and _asks_super_for(caller.f_code, code.co_name)


@lru_cache(maxsize=4096)
def _is_overridden(bases: tuple[type, ...], code: CodeType) -> bool:
    """Whether the code is that of a base class's method which a class nearer to the instance has too."""
    methods = [vars(base)[code.co_name] for base in bases if code.co_name in vars(base)]
    return any(_code_of(method) is code for method in methods[1:]) and _code_of(methods[0]) is not code


def _code_of(method: Any) -> CodeType | None:
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return code if isinstance(code, CodeType) else None


@lru_cache(maxsize=4096)
def _asks_super_for(code: CodeType, name: str) -> bool:
    """Whether code looks a method up on `super()` wherever it looks it up."""
    if "super" not in code.co_names or name not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
    found = [
        step.opname.startswith("LOAD_SUPER") or _is_super(steps[:position])
        for position, step in enumerate(steps)
        if step.argval == name and (step.opname in _LOADS or step.opname.startswith("LOAD_SUPER"))
    ]
    return bool(found) and all(found)


def _is_super(before: list[dis.Instruction]) -> bool:
    """Whether instructions end with `super()` or `super(Class, self)`; later Pythons have an instruction for that."""
    if not before or not before[-1].opname.startswith("CALL") or before[-1].arg not in (0, 2):
        return False
    called = before[-2 - before[-1].arg :][:1]
    return bool(called) and called[0].argval == "super"
