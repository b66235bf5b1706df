"""Residual branches that the recorded step left out: stochastic depth, LayerDrop, early exits, mixture of depths.

A block that did not run left no call behind, only parameters that nothing used. It is known by its likeness: all the
parameters of a branch that ran ("blocks.2.attn.out.weight") have an unused twin under one other number
("blocks.5.attn.out.weight"). An expert that got no token has none for the router beside it, and is no branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightning_unitscale.engine.analysis.residuals import Branch, Residual, Stream

Shapes = Mapping[str, tuple[int, ...]]  # by parameter name


@dataclass
class Step:
    """One branch of a stream, in the order of the forward pass.

    Attributes:
        kind: "attention" or "mlp".
        parameters: what its code uses, branches inside it apart.
        seen: the branch and its addition; None if it was left out.
        order: smaller in earlier additions, equal in the same one.
    """

    kind: str
    parameters: frozenset[str]
    seen: tuple[Residual, Branch] | None = None
    order: tuple[int, int, int] = (0, -1, 0)


def steps_of(
    stream: Stream, used_at: Mapping[int, frozenset[str]], shapes: Shapes, unused: frozenset[str]
) -> list[Step]:
    """The branches of a stream, seen or left out, in order.

    Args:
        used_at: names of the parameters used, by index of the call.
        shapes: of all parameters.
        unused: names of those that no call used.
    """
    steps = []
    for position, residual in enumerate(stream.residuals):
        for branch in residual.branches:
            own = _own_calls(branch, stream)
            names = frozenset(name for index in own for name in used_at.get(index, ()))
            steps.append(Step(branch.kind, names, (residual, branch), order=(position, -1, 0)))
    steps += _left_out(steps, shapes, unused)
    return sorted(steps, key=lambda step: step.order)


def _own_calls(branch: Branch, stream: Stream) -> frozenset[int]:
    """The calls of a branch without those of branches inside it, as in a U-Net."""
    inside = [other.calls for residual in stream.residuals for other in residual.branches if other.calls < branch.calls]
    return branch.calls.difference(*inside)


def _left_out(seen: list[Step], shapes: Shapes, unused: frozenset[str]) -> list[Step]:
    found: dict[frozenset[str], Step] = {}
    for step in seen:
        for block, number, twins in _twins(step.parameters, shapes, unused):
            if twins not in found:
                position = _position(block, number, seen)
                found[twins] = Step(step.kind, twins, order=(position, number, step.order[0]))
    return list(found.values())


def _twins(
    names: frozenset[str], shapes: Shapes, unused: frozenset[str]
) -> Iterator[tuple[tuple[str, ...], int, frozenset[str]]]:
    """Each set of unused parameters like these under another number: the path before the number, it, and the set."""
    paths = [name.split(".") for name in names]
    if not paths:
        return
    for depth, parts in enumerate(zip(*paths, strict=False)):
        if len(set(parts)) > 1:
            return
        if parts[0].isdigit():
            block = tuple(paths[0][:depth])
            for number in _numbers(block, unused):
                twins = {name: ".".join([*block, str(number), *name.split(".")[depth + 1 :]]) for name in names}
                if all(twin in unused and shapes[twin] == shapes[name] for name, twin in twins.items()):
                    yield block, number, frozenset(twins.values())


def _numbers(block: tuple[str, ...], names: frozenset[str]) -> list[int]:
    """The numbers that stand behind a path in these names."""
    paths = (name.split(".") for name in names)
    found = {path[len(block)] for path in paths if tuple(path[: len(block)]) == block and len(path) > len(block)}
    return sorted(int(part) for part in found if part.isdigit())


def _position(block: tuple[str, ...], number: int, seen: list[Step]) -> int:
    """The addition of the stream behind which a block of this number stands."""
    known = [(other, step.order[0]) for step in seen for other in _numbers(block, step.parameters)]
    before = [position for other, position in known if other < number]
    return max(before) if before else min(position for _, position in known) - 1
