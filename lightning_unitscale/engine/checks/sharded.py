"""A model is prepared whole: afterwards it may be sharded or split over devices, before it may not.

What the rehearsed step shows of a sharded model is the machinery that gathers and splits it, not the model: the weights
that calls use are other tensors than its parameters, and the plan made of that is another one, or none.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_unitscale.errors import UnitScalingError


def refuse_sharded(module: nn.Module) -> None:
    """
    Raises:
        UnitScalingError: parameters are sharded by FSDP2, or distributed by tensor parallelism.
    """
    distributed = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    if not distributed:
        return
    if any(isinstance(child, FSDPModule) for child in module.modules()):
        how, call = "sharded by FSDP2", "fully_shard"
    else:
        how, call = "split by tensor parallelism", "parallelize_module"
    raise UnitScalingError(
        f"{len(distributed)} parameters of {type(module).__name__} are {how} already (DTensor): {distributed[0]}"
        f"{' …' if len(distributed) > 1 else ''}. A plan can be made of the whole model only; nothing was changed. "
        f"Call unit_scale(model, step) before {call}(model, …), with the same weights in every process: factors stay "
        "in place through it."
    )
