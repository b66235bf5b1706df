"""Turn what a user names as `model.path` into a model that is ready: its weights, its scaling, its tokenizer.

run.ckpt          a checkpoint of `unitscale pretrain`, `finetune` or `distill`
folder/           config.json and weights, as `save_pretrained` of transformers writes them
folder/           config.json and weights in fp8, as `unitscale export dtype=fp8` writes them
folder/           adapter_config.json and weights, as peft writes them; merged into the base model that it names
owner/name        a model of the Hugging Face hub; needs the network
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.checkpoint import plan_in, prepare_for_loading, read_checkpoint
from lightning_unitscale.cookbook.heads import CAUSAL_LM, auto_class, check_head_exists, new_model, own_head
from lightning_unitscale.cookbook.tokenizers import BYTES, VOCABULARY, check_tokenizer, load_tokenizer
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.rename import plan_inside
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY, encode
from lightning_unitscale.errors import InputError, UnitScalingError, first_line
from lightning_unitscale.export.fp8_weights import FP8_FILE, load_narrow

MODEL = "model"  # the attribute of the recipes' LightningModules that holds the transformers model
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
# Config arguments that are no plain fields of it.
_SPECIAL_CHANGES = ("attn_implementation", "num_labels", "id2label", "label2id", "dtype")


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
    if where.is_file():
        found = _from_checkpoint(where, head, config_changes)
    elif (where / "adapter_config.json").is_file():
        found = _from_adapter(where, head, config_changes)
    elif (where / FP8_FILE).is_file():
        found = _from_fp8(where, head, config_changes)
    elif (where / "config.json").is_file() or _may_be_hub_name(path, where):
        found = _from_transformers(path if not where.exists() else str(where), head, config_changes)
    else:
        raise InputError(f"model.path={path}: {_what_is_there(where)}")
    if tokenizer is not None:
        found.tokenizer = load_tokenizer(tokenizer)
    found.path = path
    if found.tokenizer is not None:
        check_tokenizer(found.tokenizer, found.model)
    found.model.eval()
    return found


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


# ----------------------------------------------------------------------------------------------------------------------
# A folder or a hub name


def _from_transformers(name: str, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    try:
        config = AutoConfig.from_pretrained(name)
        _check_changes(config, changes)
        config = AutoConfig.from_pretrained(name, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.path={name}: {_not_loaded(name, error)}") from error
    return _with_weights(name, None, config, head or own_head(config), changes.get("dtype"), _tokenizer_in(name))


def _from_fp8(folder: Path, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    config = AutoConfig.from_pretrained(folder)
    own = own_head(config)
    if head not in (None, own) or changes:
        raise InputError(
            f"model.path={folder}: weights in fp8 are for inference with their own head ({own}) and config; start from "
            "the checkpoint that they were exported from"
        )
    model = auto_class(own, config).from_config(config)
    load_narrow(model, folder)
    return Pretrained(model, None, _tokenizer_in(str(folder)), str(folder), own, weights="fp8")


def _with_weights(
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


def _check_changes(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint of the recipes


def _from_checkpoint(file: Path, head: str | None, changes: Mapping[str, Any]) -> Pretrained:
    checkpoint, settings = _read(file)
    made_with = settings.get("head") or CAUSAL_LM
    config = {**settings["model"], **{key: value for key, value in changes.items() if key != "dtype"}}
    model = new_model(config, made_with)
    _check_changes(model.config, changes)
    if settings.get("lora"):
        adapted = with_adapter(model, settings["lora"])
        _load(file, checkpoint, adapted)
        model = _merged(adapted)
    else:
        _load(file, checkpoint, model)
    found = Pretrained(model, plan_of(model), _tokenizer_of(settings, model), str(file), made_with)
    if head not in (None, made_with):
        found = _with_other_head(found, str(head), changes)
    found.settings = settings
    dtype = str(changes.get("dtype", "float32")).removeprefix("torch.")
    nn.Module.to(found.model, getattr(torch, dtype))
    return found


def _load(file: Path, checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """The checkpoint's weights into the model below its module, and its scaling in force there."""
    plan = plan_in(checkpoint)
    state = {key.removeprefix(f"{MODEL}."): value for key, value in checkpoint["state_dict"].items()}
    if plan is not None:
        plan = plan_inside(plan, MODEL)
        if PLAN_KEY in state:
            state[PLAN_KEY] = encode(plan)  # with names as in the model
    prepare_for_loading(model, plan)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"model.path={file}: the weights do not fit the model ({first_line(error)})") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint and the hyperparameters of its module."""
    try:
        checkpoint = read_checkpoint(file)
    except UnitScalingError as error:
        raise InputError(f"model.path={error}") from error
    settings: dict[str, Any] = checkpoint.get("hyper_parameters") or {}
    if "model_type" not in (settings.get(MODEL) or {}) or "state_dict" not in checkpoint:
        raise InputError(
            f"model.path={file}: not a checkpoint of a transformers model made by unitscale (its hyper_parameters "
            "hold no model with a model_type). A folder that save_pretrained wrote can be given instead."
        )
    return checkpoint, settings


def _tokenizer_of(settings: Mapping[str, Any], model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    name = settings.get("tokenizer")
    if name is None and getattr(model.config, "vocab_size", None) == VOCABULARY:
        name = BYTES  # `unitscale pretrain` knows no other
    return load_tokenizer(name) if name else None


def _with_other_head(found: Pretrained, head: str, changes: Mapping[str, Any]) -> Pretrained:
    """The base of a loaded model under a new head; possible where the weights alone are the function."""
    if found.plan is not None and not found.plan.is_plain:
        raise InputError(
            f"model.path={found.path}: this checkpoint has unit-scaling factors in its forward pass, so it can't take "
            f"another head ({head}). Write plain weights first: unitscale export format=hf"
        )
    model, dtype = found.model, changes.get("dtype")
    return _with_weights(found.path, model.state_dict(), model.config, head, dtype, found.tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


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


def _merged(adapted: PeftModel) -> PreTrainedModel:
    """The plain model, all of it free to be trained again."""
    model: PreTrainedModel = adapted.merge_and_unload()
    model.requires_grad_(True)
    return model


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
        found.model = _merged(PeftModel.from_pretrained(found.model, str(folder)))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model.path={folder}: the adapter does not fit {base} ({first_line(error)})") from error
    found.plan = None
    saved = settings.get("modules_to_save") or ()
    found.fresh = [name for name in found.fresh if name.rpartition(".")[0] not in saved]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What went wrong


def _may_be_hub_name(path: str, where: Path) -> bool:
    return not where.exists() and where.suffix != ".ckpt" and path[0] not in "./~" and path.count("/") <= 1


def _what_is_there(where: Path) -> str:
    if not where.exists():
        return f"no such file or folder (looked in {Path.cwd()})"
    checkpoints = sorted(where.rglob("*.ckpt"))
    if checkpoints:
        return f"a folder without config.json; did you mean {checkpoints[-1]}?"
    return "a folder without config.json or adapter_config.json, so not a model of transformers or peft"


def _not_loaded(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return first_line(error)
    return (
        f"no such file or folder here (looked in {Path.cwd()}), and the Hugging Face hub did not deliver it "
        f"({first_line(error)})"
    )
