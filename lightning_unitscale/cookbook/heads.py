"""Heads: the auto classes of transformers, and which of them go with an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightning_unitscale.errors import InputError, first_line

CAUSAL_LM = "AutoModelForCausalLM"
TASK_HEADS = {  # by auto class: the option of conf/task that it is trained and measured by
    CAUSAL_LM: "language_modeling",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForSequenceClassification": "text_classification",
    "AutoModelForImageClassification": "image_classification",
}


def check_head_exists(head: str) -> None:
    """
    Raises:
        InputError: transformers has no auto class of this name.
    """
    known = heads()
    if head not in known:
        near = get_close_matches(head, known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"model.head={head} is not an auto class of transformers; {hint}")


def heads() -> list[str]:
    """The auto classes of transformers."""
    return [name for name in dir(transformers) if name == "AutoModel" or name.startswith("AutoModelFor")]


def auto_class(head: str, config: PreTrainedConfig) -> Any:
    """The auto class, once it is known to have a model for this architecture."""
    check_head_exists(head)
    auto = getattr(transformers, head)
    if type(config) not in auto._model_mapping:
        fitting = [name for name in heads() if type(config) in getattr(transformers, name)._model_mapping]
        raise InputError(
            f"model.head={head} does not fit a {config.model_type} model; these do: {', '.join(fitting) or 'none'}"
        )
    return auto


def own_head(config: PreTrainedConfig) -> str:
    """The auto class of the architecture that a config names."""
    own = (config.architectures or [""])[0]
    for head in (*TASK_HEADS, *heads()):  # some classes are of several
        classes = getattr(transformers, head)._model_mapping.get(type(config), ())
        if own in [known.__name__ for known in (classes if isinstance(classes, tuple) else (classes,))]:
            return head
    return CAUSAL_LM


def class_names(classes: Sequence[str]) -> dict[str, Any]:
    """The part of a config that says what a head tells apart; nothing for a head without classes."""
    if not classes:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {label: number for number, label in enumerate(classes)}}


def new_model(config: Mapping[str, Any], head: str = CAUSAL_LM) -> PreTrainedModel:
    """A model with random weights.

    Args:
        config: `model_type`, and arguments of its config class.
        head: auto class of transformers.

    Raises:
        InputError: the architecture is not known, or the head does not fit it.
    """
    if "model_type" not in config:
        raise InputError("the model's config has no model_type: give one, model.config.model_type=llama")
    try:
        made = AutoConfig.for_model(**config)
    except ValueError as error:
        raise InputError(f"model.config.model_type={config['model_type']}: {first_line(error)}") from error
    model: PreTrainedModel = auto_class(head, made).from_config(made)
    return model
