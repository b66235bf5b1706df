"""A trace is a graph, and its parts are shown in messages, debuggers and reports of failed tests."""

from __future__ import annotations

import torch
from torch import nn

from lightning_unitscale.engine.record.recorder import recording


def test_parts_of_a_deep_graph_name_themselves_alone() -> None:
    net = nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(4, 4), nn.Tanh())))
    with recording(net) as recorder:
        trace = recorder.finish(net(torch.ones(2, 4)).sum(), [])
    assert repr(trace) == f"<trace of {len(trace.calls)} calls, 1 losses>"
    first = next(call for call in trace.calls if call.name == "linear")
    assert len(repr(first)) < 200
    assert "linear" in repr(first)
    assert "0.weight" in repr(first)
    assert repr(first.output) == f"<value {first.output.index} [2, 4]>"
