"""Why something in a model is left alone, in the words of the plan."""

from __future__ import annotations

from lightning_unitscale.engine.plan.parameter_plan import UNUSED
from lightning_unitscale.engine.record.trace import Call

SKIPPED = "skipped by the options"
LEFT_ALONE_ROLES = {
    "scale": "multiplies activations elementwise; kept as the model initialises it",
    "relative_position": "added to attention logits; kept as the model initialises it",
    "other": "used in a way no rule is known for",
    "unused": UNUSED,
}
IN_TRANSFORM = (
    "used by no torch call that could be followed: torch.func (vmap, grad, functional_call) runs the model on tensors "
    "of its own"
)
IN_FUNCTION = (
    "inside a hand-written autograd.Function, or a checkpointed function that is no method, whose backward pass would "
    "not see it"
)


def no_place(call: Call) -> str:
    """Why a parameter-free factor or cast can't stand at a call; empty if it can."""
    if call.in_function:
        return IN_FUNCTION
    if call.frame is None:
        return "in a hook, or in a module made while running, its frame cannot be found again"
    if call.frame.module == "" and call.frame.method.endswith("_step"):
        return "its frame is loss code"
    return ""
