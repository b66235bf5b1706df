"""Turn what a user names as `model.path` into a model that is ready: its weights, its scaling, its tokenizer.

run.ckpt          a checkpoint of `unitscale pretrain`, `finetune` or `distill`: a file, or a folder with shards
folder/           config.json and weights, as `save_pretrained` of transformers writes them
folder/           config.json and weights in fp8, as `unitscale export dtype=fp8` writes them
folder/           adapter_config.json and weights, as peft writes them; merged into the base model that it names
owner/name        a model of the Hugging Face hub; needs the network
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig

from lightning_unitscale.cookbook.adapters import merged
from lightning_unitscale.cookbook.heads import check_head_exists
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.recipe_checkpoint import from_checkpoint
from lightning_unitscale.cookbook.tokenizers import check_tokenizer, load_tokenizer
from lightning_unitscale.cookbook.transformers_weights import from_fp8, from_transformers
from lightning_unitscale.errors import InputError, first_line
from lightning_unitscale.export.fp8_weights import FP8_FILE
from lightning_unitscale.near_names import may_be_hub_name, not_found
from lightning_unitscale.sharded_checkpoint import file_beside_weights, is_in_shards


def load_pretrained(
    path: str, head: str | None = None, tokenizer: str | None = None, **config_changes: Any
) -> Pretrained:
    """Load a model.

    Args:
        path: see above.
        head: auto class of transformers, "AutoModelForCausalLM" and so on. Default: that of the checkpoint; for a
            folder or hub name that of the architecture in its config, or AutoModelForCausalLM.
        tokenizer: "bytes", or a path or hub name of one, to be used in place of the model's own.
        config_changes: fields of the model's config to be changed (`num_labels=10`, `attn_implementation="eager"`),
            and `dtype` (default "float32").

    Raises:
        InputError: there is no such model, its weights are incomplete, the head does not fit the architecture, or the
            tokenizer does not fit the vocabulary; with the reason and what to do.
    """
    where = Path(path).expanduser() if path else None
    if where is None:
        raise InputError("model.path is empty; give a checkpoint, a folder of transformers, or a hub name")
    if head is not None:
        check_head_exists(head)
    if where.is_file() or is_in_shards(where):
        found = from_checkpoint(where, head, config_changes)
    elif (where / "adapter_config.json").is_file():
        found = _from_adapter(where, head, config_changes)
    elif (where / FP8_FILE).is_file():
        found = from_fp8(where, head, config_changes)
    elif (where / "config.json").is_file() or may_be_hub_name(path):
        found = from_transformers(path if not where.exists() else str(where), head, config_changes)
    else:
        raise InputError(f"model.path={path}: {_what_is_there(where)}")
    if tokenizer is not None:
        found.tokenizer = load_tokenizer(tokenizer)
    found.path = path
    if found.tokenizer is not None:
        check_tokenizer(found.tokenizer, found.model)
    found.model.eval()
    return found


def _from_adapter(folder: Path, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    settings = json.loads((folder / "adapter_config.json").read_text())
    base = settings.get("base_model_name_or_path")
    if not base:
        raise InputError(f"model.path={folder}: adapter_config.json names no base model (base_model_name_or_path)")
    own = folder / "config.json"  # of the model that was adapted, where `unitscale finetune` wrote the adapter
    kept: dict[str, Any] = {}
    if own.is_file():
        config = AutoConfig.from_pretrained(folder)
        kept = {"id2label": config.id2label, "label2id": config.label2id, "pad_token_id": config.pad_token_id}
    try:
        found = load_pretrained(base, head, **{**kept, **changes})
    except InputError as error:
        raise InputError(f"model.path={folder}: the adapter's base model can't be loaded: {error}") from error
    if found.plan is not None and not found.plan.is_plain:
        raise InputError(f"model.path={folder}: its base {base} is not plain; export that first: unitscale export")
    try:
        found.model = merged(PeftModel.from_pretrained(found.model, str(folder)))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model.path={folder}: the adapter does not fit {base} ({first_line(error)})") from error
    found.plan = None
    saved = settings.get("modules_to_save") or ()
    found.fresh = [name for name in found.fresh if name.rpartition(".")[0] not in saved]
    return found


def _what_is_there(where: Path) -> str:
    if not where.exists():
        return not_found(where)
    if file_beside_weights(where).is_file():
        return (
            "a checkpoint of DeepSpeed; make one file of it first, with convert_zero_checkpoint_to_fp32_state_dict of "
            "pytorch_lightning.utilities.deepspeed"
        )
    below = sorted(where.rglob("*.ckpt")) or sorted(file.parent for file in where.rglob("config.json"))
    if below:
        return f"a folder without config.json; did you mean {below[-1]}?"
    return "a folder without config.json or adapter_config.json, so not a model of transformers or peft"
