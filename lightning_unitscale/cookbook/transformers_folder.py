"""What a fine-tuning leaves: a folder that plain transformers loads and, with LoRA, one that peft loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_unitscale.cookbook.tasks import Task
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.plain_torch import remove_unit_scaling


def write_folders(module: Task, folder: Path) -> list[str]:
    """Writes the adapter, if there is one, and the model as plain transformers loads it; returns what to print."""
    model: Any = module.model
    lines = []
    if module.hparams["lora"]:
        model.save_pretrained(str(folder / "adapter"))
        model.get_base_model().config.save_pretrained(str(folder / "adapter"))  # knows the classes
        lines.append(f"adapter for peft {folder / 'adapter'}")
        model = model.merge_and_unload()
    else:
        try:
            remove_unit_scaling(module)
        except UnitScalingError as error:
            if "is not unit-scaled" not in str(error):
                return [f"no folder for transformers ({error}) Use unitscale export format=hf."]
    save_for_transformers(model, module.tokenizer, folder / "model")
    return [*lines, f"for transformers {folder / 'model'}"]


def save_for_transformers(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, config and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
