"""Schemes: from a recorded step to a plan."""

from collections.abc import Callable

from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.preserve import preserve
from lightning_unitscale.schemes.umup import umup

SCHEMES: dict[str, Callable[[nn.Module, Trace, Options], Plan]] = {"umup": umup, "preserve": preserve}
