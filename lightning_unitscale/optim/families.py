"""How an optimizer's update answers to the scale of a gradient, which decides its learning-rate multipliers."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lightning_unitscale.errors import UnitScalingError

FAMILIES = ("adam", "sgd", "muon")

# "adam" needs an update that does not change when gradient and eps are multiplied by one constant.
_TORCH_FAMILIES = {
    "Adam": "adam",
    "AdamW": "adam",
    "NAdam": "adam",
    "Adamax": "adam",
    "Adagrad": "adam",
    "RMSprop": "adam",
    "SparseAdam": "adam",
    "SGD": "sgd",
    "Muon": "muon",
}
# Optimizers of other packages (torchao, bitsandbytes, apex, DeepSpeed, lion-pytorch) that keep the same symmetry.
_NAMED_FAMILIES = {
    "Lion": "adam",
    "FusedAdam": "adam",
    "DeepSpeedCPUAdam": "adam",
    "AdamW8bit": "adam",
    "AdamW4bit": "adam",
    "AdamWFp8": "adam",
    "PagedAdamW": "adam",
    "PagedAdamW8bit": "adam",
}
_WHY_NOT = {
    "RAdam": "its first steps, before rectification, are plain momentum and follow the gradient's scale",
    "Adafactor": "its step is relative to the parameter's own RMS",
    "Adadelta": "its step is made from the size of former steps",
    "ASGD": "its decay `lambd` can't be matched to a parameter's scale",
    "Rprop": "its step sizes live in its state, where no learning rate reaches them",
    "LBFGS": "it takes one step size for all parameters",
    "LAMB": "its step is relative to the parameter's own norm",
    "Lamb": "its step is relative to the parameter's own norm",
    "LARS": "its step is relative to the parameter's own norm",
}


def optimizer_family(optimizer: Optimizer) -> str:
    """How the optimizer's update answers to the scale of a gradient: `"adam"`, `"sgd"` or `"muon"`.

    "adam": not at all, up to an eps in units of the gradient (Adam, AdamW, NAdam, Adamax, Adagrad, RMSprop, SparseAdam
    and, by name, Lion and the fused or quantised Adams); "sgd": in proportion; "muon": not at all, and the update of a
    matrix has a fixed spectral norm. A subclass is of its parent's family.

    Raises:
        UnitScalingError: the class is of none of these families; the message says how to name one.
    """
    torch_families = {getattr(torch.optim, name, None): family for name, family in _TORCH_FAMILIES.items()}
    reason = ""
    for cls in type(optimizer).__mro__:
        family = torch_families.get(cls) or _NAMED_FAMILIES.get(cls.__name__)
        if family and optimizer.defaults.get("initial_accumulator_value"):
            reason = ": its initial_accumulator_value is not 0 and has the unit of a squared gradient"
            break
        if family:
            return family
        if cls.__name__ in _WHY_NOT:
            reason = f": {_WHY_NOT[cls.__name__]}"
            break
    name = type(optimizer).__name__
    raise UnitScalingError(
        f"Unit scaling doesn't know which learning-rate multipliers the optimizer {name} needs{reason}. Use one of "
        f"{', '.join(_TORCH_FAMILIES)}, or say which family {name} "
        'belongs to: scale_learning_rates(optimizer, plan, family="adam") if its update does not depend on the '
        'gradient\'s scale, family="sgd" if it is proportional to it, family="muon" if it orthogonalises it.'
    )
