"""A model that learns from the data and from a larger model, whatever its task:

    loss = (1 - α) · the task's own + α · T² · KL(teacher at T ‖ student at T) + β · MSE(hidden states)

Logits are divided by the temperature T; T² keeps the gradient's size (Hinton et al., 2015, arXiv 1503.02531). They are
compared where the task's loss counts: tokens, classes. Hidden states are compared after RMS normalisation, layer by
layer, where the widths match; of an encoder and decoder those of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.data.examples import Batch
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.errors import InputError


class Taught(Task):
    """Goes in front of a task's class (`student_of`); its held-out scores are those of the data alone.

    Args:
        distillation: temperature, logits (α) and hidden (β), see above; checkpoints don't hold the teacher.
        teacher: a model with the same predictions; None trains on the data alone.
    """

    not_saved = (*Task.not_saved, "teacher")

    def __init__(
        self, *args: Any, distillation: Mapping[str, float], teacher: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = dict(distillation)
        self.teacher = Outside(teacher) if teacher is not None else None
        if teacher is not None and self.distillation["hidden"] > 0:
            for part in (
                *self.model.modules(),
                *teacher.modules(),
            ):  # an encoder and a decoder have configs of their own
                if (config := getattr(part, "config", None)) is not None:
                    config.output_hidden_states = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch, through the teacher too."""
        if self.teacher is None:
            return super().training_step(batch, batch_idx)
        settings = self.distillation
        own, output = self.loss(batch)
        taught = self.teacher(self.output, batch)
        student, teacher = self.logits(batch, output), self.logits(batch, taught)
        divergence = distance_of_logits(student, teacher, settings["temperature"])
        loss: Tensor = (1 - settings["logits"]) * own + settings["logits"] * divergence
        if settings["hidden"] > 0:
            loss = loss + settings["hidden"] * distance_of_hidden_states(_hidden(output), _hidden(taught))
        size = len(next(iter(batch.values())))
        self.log_dict({"train/loss": own, "train/distillation": divergence}, prog_bar=True, batch_size=size)
        return loss


def check_distillation(settings: Mapping[str, float]) -> None:
    """
    Raises:
        InputError: temperature, logits or hidden has no meaning.
    """
    if settings["temperature"] <= 0:
        raise InputError(f"distillation.temperature={settings['temperature']} must be positive")
    if not 0 <= settings["logits"] <= 1:
        raise InputError(f"distillation.logits={settings['logits']} must lie between 0 and 1")
    if settings["hidden"] < 0:
        raise InputError(f"distillation.hidden={settings['hidden']} must not be negative")


def student_of(task: type[Task]) -> type[Taught]:
    """The task's class, which learns from a teacher too."""
    return type(f"{task.__name__}Student", (Taught, task), {})


class Outside:
    """A frozen model that is no part of the module: not in its checkpoints, its optimizer or its unit scaling."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, output: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        """What the model makes of a batch, moved to where that is."""
        self.model.to(next(iter(batch.values())).device)
        return output(self.model, batch)


def _hidden(output: Any) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] | None = getattr(output, "decoder_hidden_states", None) or output.hidden_states
    assert states is not None  # they were asked for
    return states


def distance_of_logits(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, the mean over labels; both [labels, classes]."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def distance_of_hidden_states(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean squared difference of RMS-1 hidden states, of each student's layer and the teacher's at the same depth."""
    last, width = len(student) - 1, student[0].shape[-1]
    pairs = [(student[i], teacher[round(i * (len(teacher) - 1) / last)]) for i in range(1, last + 1)]
    return torch.stack([F.mse_loss(F.rms_norm(s, (width,)), F.rms_norm(t, (width,))) for s, t in pairs]).mean()
