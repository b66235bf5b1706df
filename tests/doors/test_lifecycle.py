"""The table at the head of `lifecycle` says what happens when: it names methods that are there, and all of them."""

from __future__ import annotations

import inspect
import re

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import Strategy

from lightning_unitscale import lifecycle

WIRING = {"settings", "wrap"}  # how the doors connect, not what happens in a run


def test_the_table_names_every_step() -> None:
    _heading, *rows = re.findall(r"^    (\w+) +(\w+) {2,}\S", inspect.getdoc(lifecycle), re.MULTILINE)
    assert {ours for _, ours in rows} == {n for n in vars(lifecycle.Lifecycle) if not n.startswith("_")} - WIRING
    for hook, _ in rows:
        assert hasattr(Strategy, hook) or hasattr(Callback, hook), hook
