"""Models as transformers keeps them: a config and weights in a folder or on the hub, with the head that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cookbook.heads import auto_class, own_head
from lightning_unitscale.cookbook.hub import check_reachable
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tokenizers import load_tokenizer
from lightning_unitscale.errors import InputError, first_line
from lightning_unitscale.export.fp8_weights import load_fp8
from lightning_unitscale.near_names import not_found

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
# Config arguments that are no plain fields of it.
_SPECIAL_CHANGES = ("attn_implementation", "num_labels", "id2label", "label2id", "dtype")


def from_transformers(name: str, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    """A model in a folder or on the hub; by default with the head of the architecture in its config."""
    check_reachable("model.path", name, "config.json")
    try:
        config = AutoConfig.from_pretrained(name)
        check_changes(config, changes)
        config = AutoConfig.from_pretrained(name, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.path={name}: {_not_loaded(name, error)}") from error
    return with_weights(name, None, config, head or own_head(config), changes.get("dtype"), _tokenizer_in(name))


def from_fp8(folder: Path, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    """A model whose weights `unitscale export dtype=fp8` wrote."""
    config = AutoConfig.from_pretrained(folder)
    own = own_head(config)
    if head not in (None, own) or changes:
        raise InputError(
            f"model.path={folder}: weights in fp8 are for inference with their own head ({own}) and config; start from "
            "the checkpoint that they were exported from"
        )
    model = auto_class(own, config).from_config(config)
    load_fp8(model, folder)
    return Pretrained(model, None, _tokenizer_in(str(folder)), str(folder), own, weights="fp8")


def with_weights(
    name: str,
    state: dict[str, Tensor] | None,
    config: PreTrainedConfig,
    head: str,
    dtype: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Pretrained:
    """A model with this head, with weights from the state dict, or from the folder or hub name."""
    classes = auto_class(head, config)._model_mapping[type(config)]
    model_class = classes[0] if isinstance(classes, tuple) else classes
    try:
        model, info = model_class.from_pretrained(
            None if state else name,
            config=config,
            state_dict=state,
            dtype=dtype or "float32",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"model.path={name}: {_not_loaded(name, error)}") from error
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    lost = [key for key in absent if not _in_head(key, model)]
    if lost:
        raise InputError(
            f"model.path={name}: {len(lost)} weights of {type(model).__name__} are missing or have another shape than "
            f"config.json says: {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}"
        )
    return Pretrained(model, None, tokenizer, name, head, absent, sorted(info["unexpected_keys"]))


def _in_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a parameter belongs to what a task adds to the base model (poolers are part of some base models)."""
    return not name.startswith(f"{model.base_model_prefix}.") or "pooler" in name


def check_changes(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Raises InputError for a setting that models of this type have not."""
    known = [*config.to_dict(), *_SPECIAL_CHANGES]
    for key in changes:
        if key not in known:
            near = get_close_matches(key, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"a {config.model_type} model has no setting {key}{hint}")


def _tokenizer_in(name: str) -> PreTrainedTokenizerBase | None:
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    if folder.is_dir():
        return load_tokenizer(name)
    try:
        return load_tokenizer(name)
    except InputError:
        return None  # image models of the hub have none


def _not_loaded(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return first_line(error)
    return f"the Hugging Face hub did not deliver it ({first_line(error)}), and here there is {not_found(name)}"
