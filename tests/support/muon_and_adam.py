"""An optimizer whose groups are of two families, as the class that Muon was published with is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import muon

NS = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7, "adjust_lr_fn": None}


class MuonAndAdam(torch.optim.Optimizer):
    """Groups say `use_muon`, as those of the class that Muon was published with do."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if group.get("use_muon"):
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "momentum": 0.95}
                    muon(
                        *([parameter], [parameter.grad], [buffer]),
                        **{**options, **NS, "nesterov": True, "has_complex": False},
                    )
                else:
                    self._adamw(parameter, state, group)
        return loss

    @staticmethod
    def _adamw(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        first, second = (state.setdefault(name, torch.zeros_like(parameter)) for name in ("m", "v"))
        count = state["count"] = state.get("count", 0) + 1
        gradient = parameter.grad
        assert gradient is not None
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = (second / (1 - 0.999**count)).sqrt() + group["eps"]
        parameter.addcdiv_(first / (1 - 0.9**count), size, value=-group["lr"])
