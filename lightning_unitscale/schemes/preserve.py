"""`preserve`: the model's own function and training, with everything seen and nothing changed.

All multipliers are 1, weights and learning rates are the model's own. It is what a pretrained model wants; what it
adds is the plan itself, on which low-precision formats rest.
"""

from __future__ import annotations

from torch import nn

from lightning_unitscale.engine.plan.fold import resolve
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.draft import Draft


def preserve(module: nn.Module, trace: Trace, options: Options) -> Plan:
    """The plan that changes nothing, for a recorded step."""
    plan = Draft(module, trace, options).plan({}, [])
    resolve(plan, options.storage)
    return plan
