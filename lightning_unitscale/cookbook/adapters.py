"""LoRA adapters of peft: put into a model, and merged into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from lightning_unitscale.errors import InputError, first_line


def with_adapter(model: PreTrainedModel, lora: Mapping[str, Any]) -> PeftModel:
    """The model with LoRA layers in it, its own weights frozen.

    Args:
        model: changed in place; its modules become those of the result.
        lora: arguments of `peft.LoraConfig`.

    Raises:
        InputError: an argument is wrong, or no module has a name among `target_modules`.
    """
    try:
        adapted: PeftModel = get_peft_model(model, LoraConfig(**lora))
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {first_line(error)}") from error
    return adapted


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The plain model, all of it free to be trained again."""
    model: PreTrainedModel = adapted.merge_and_unload()
    model.requires_grad_(True)
    return model
