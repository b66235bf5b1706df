"""Muon for the hidden matrices, AdamW for all else: one optimizer, with one learning rate.

Muon makes the momentum of a matrix orthogonal (Jordan et al., 2024, kellerjordan.github.io/posts/muon). It is meant for
what maps one hidden width to another: embeddings, readouts, gains and biases are AdamW's. So are convolutions, whose
kernels are no matrices: `torch.optim.Muon` refuses them, and only flattens them in its author's code. Torch's own
classes take the steps. Those of Muon are multiplied to be as large as AdamW's (`adjust_lr_fn="match_rms_adamw"`, Liu et
al., arXiv 2502.16982), so that a rate, its schedule and weight decay mean the same for both.

Which is which is told from the module, as plans are made later than optimizers, and untouched models have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

_MUON = "use_muon"  # in a group: which of the two steps it, and for unit scaling its family


class MuonWithAdamW(Optimizer):
    """Two groups: hidden matrices, and the rest.

    Args:
        params: what is trained.
        module: that has them.
        lr: of both.
        weight_decay: of both, beside the gradient.
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.
        adamw_for: globs of names of matrices that are AdamW's too, such as readouts beside the last.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        module: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_for: Sequence[str] = (),
    ) -> None:
        params, matrices = list(params), set(hidden_matrices(module, adamw_for))
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon: dict[str, Any] = {**both, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        parts: list[Optimizer] = []
        if hidden := [p for p in params if p in matrices]:
            parts.append(Muon(hidden, **muon))
        if others := [p for p in params if p not in matrices]:
            parts.append(AdamW(others, **both, betas=(betas[0], betas[1]), eps=eps))
        super().__init__(
            [{**group, _MUON: isinstance(part, Muon)} for part in parts for group in part.param_groups], both
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each of the two on its groups, with the state of this optimizer."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for cls in (Muon, AdamW):
            groups = [group for group in self.param_groups if group[_MUON] == (cls is Muon)]
            if groups:
                part: Any = cls(groups[0]["params"])
                part.param_groups, part.state = groups, self.state
                part.step()
        return loss


def hidden_matrices(module: nn.Module, but: Sequence[str] = ()) -> list[nn.Parameter]:
    """The weight matrices of a module without its embeddings and readouts.

    A readout is the last weight matrix in the module's order, and whatever has a name that matches a glob. A matrix
    that is no `weight…` of a module (positions, decay rates) is none.
    """
    owners = {plain: owner for plain, owner in module.named_modules() if _weights(owner)}
    ends = [owner for owner in owners.values() if isinstance(owner, (nn.Embedding, nn.EmbeddingBag))]
    ends += list(owners.values())[-1:]
    left = {weight for owner in ends for weight in _weights(owner).values()}
    return [
        weight
        for prefix, owner in owners.items()
        for name, weight in _weights(owner).items()
        if weight not in left and not any(fnmatchcase(f"{prefix}.{name}", glob) for glob in but)
    ]


def _weights(owner: nn.Module) -> dict[str, nn.Parameter]:
    own = owner.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if "weight" in name and parameter.ndim == 2}
