"""A model that exists already, and what belongs to it: its scaling, its tokenizer, where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.errors import InputError


@dataclass
class Pretrained:
    """A model, and what belongs to it.

    Attributes:
        model: in float32 unless asked otherwise, in eval mode, its scaling in force.
        plan: that scaling, with names as in `model.named_parameters()`; None for a model without. The model is plain
            where `plan.is_plain`.
        tokenizer: None for a model without text, or where none lies beside the weights.
        path: as given.
        head: name of the auto class that `model` was asked as.
        fresh: names of the head's parameters that `path` does not hold: they have random initial values.
        unused: names of the parameters in `path` that this head has no place for.
        weights: what weights are kept in, "float32" (whatever the dtype) or "fp8".
        settings: hyperparameters of the module in a checkpoint.
    """

    model: PreTrainedModel
    plan: Plan | None
    tokenizer: PreTrainedTokenizerBase | None
    path: str
    head: str
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    weights: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError(
                f"model.path={self.path} has no tokenizer beside it; name one: model.tokenizer=<path, or bytes>"
            )
        return self.tokenizer


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a model takes, where its positions have an end."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the pictures that the model's config names.

    Raises:
        InputError: it names none.
    """
    size = getattr(model.config, "image_size", None)
    if size is None:
        raise InputError(
            f"the config of {type(model).__name__} has no image_size; say it: +model.changes.image_size=[height,width]"
        )
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width
