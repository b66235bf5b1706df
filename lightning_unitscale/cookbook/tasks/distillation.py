"""A language model that learns from the text and from a larger model:

    loss = (1 - α) · CE(student, next token) + α · T² · KL(teacher at T ‖ student at T) + β · MSE(hidden states)

Logits are divided by the temperature T; T² keeps the gradient's size (Hinton et al., 2015, arXiv 1503.02531). Hidden
states are compared after RMS normalisation, layer by layer, where the widths match.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.data.examples import IGNORED, Batch
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling


class Student(LanguageModeling):
    """A language model that also learns from another one's predictions; its held-out loss is that of the text alone.

    Args:
        distillation: temperature, logits (α) and hidden (β), see above; checkpoints don't hold the teacher.
        teacher: a model with the same vocabulary; None trains on the text alone.
    """

    def __init__(
        self, *args: Any, distillation: Mapping[str, float], teacher: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters(ignore=["weights", "teacher"])
        self.distillation = dict(distillation)
        self.teacher = Outside(teacher) if teacher is not None else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch, through the teacher too."""
        if self.teacher is None:
            return super().training_step(batch, batch_idx)
        settings = self.distillation
        wants_hidden = settings["hidden"] > 0
        output = self.model(input_ids=batch["input_ids"], use_cache=False, output_hidden_states=wants_hidden)
        taught = self.teacher(batch["input_ids"], wants_hidden)
        counts = batch["labels"] != IGNORED  # [batch, sequence]
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        divergence = distance_of_logits(output.logits[counts], taught.logits[counts], settings["temperature"])
        loss: Tensor = (1 - settings["logits"]) * cross_entropy + settings["logits"] * divergence
        if wants_hidden:
            loss = loss + settings["hidden"] * distance_of_hidden_states(output.hidden_states, taught.hidden_states)
        self.log_dict({"train/loss": cross_entropy, "train/distillation": divergence}, prog_bar=True)
        return loss


class Outside:
    """A frozen model that is no part of the module: not in its checkpoints, its optimizer or its unit scaling."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, hidden_states: bool) -> Any:
        """The output of the model, moved to where the tokens are."""
        self.model.to(tokens.device)
        return self.model(input_ids=tokens, use_cache=False, output_hidden_states=hidden_states)


def distance_of_logits(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, the mean over tokens; both [tokens, vocabulary]."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def distance_of_hidden_states(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean squared difference of RMS-1 hidden states, of each student's layer and the teacher's at the same depth."""
    last, width = len(student) - 1, student[0].shape[-1]
    pairs = [(student[i], teacher[round(i * (len(teacher) - 1) / last)]) for i in range(1, last + 1)]
    return torch.stack([F.mse_loss(F.rms_norm(s, (width,)), F.rms_norm(t, (width,))) for s, t in pairs]).mean()
