"""Tiny models for tests and tables, each built the same from the same seed.

- ``CASES``: hand-written habits (``zoo_modules.py``) and models of ``transformers`` (``zoo_transformers.py``);
- ``TWELVE``: the names in ``CASES`` of six transformers models times two attention implementations;
- ``LIGHTNING_CASES``: LightningModules whose code lives in unusual places (``zoo_lightning.py``);
- ``UNSEEN``: ten architectures drawn by chance, to try an engine on models nobody wrote it for.

A case is used like this::

    torch.manual_seed(0)
    model = case.build()
    case.loss(model, case.batch(0)).backward()

Weights and float inputs take torch's default dtype; ``with default_dtype(torch.float64): …`` makes all of it double.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from support import zoo_lightning
from support import zoo_modules as own
from support.zoo_batches import (
    BOS,
    CLASSES,
    EOS,
    PAD,
    VOCAB,
    Batch,
    causal_batch,
    code_loss,
    image_batch,
    image_loss,
    image_reconstruction_loss,
    masked_batch,
    next_token_batch,
    pixels_batch,
    speech_batch,
    token_loss,
    transformers_loss,
    translation_batch,
    vector_batch,
    vector_loss,
    velocity_loss,
)
from support.zoo_transformers import FAMILY_BUILDERS, albert, mixtral

FAMILIES = ("gpt2", "llama", "bert", "vit", "t5", "whisper")
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its loss."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    has_float64: bool = True  # runs in float64 at all
    casts_to_float32: bool = False  # some activation passes through float32 even when all else is float64


@dataclass(frozen=True)
class LightningCase:
    """A LightningModule with its inputs; the loss is its ``training_step``'s own affair."""

    name: str
    build: Callable[[], pl.LightningModule]
    batch: Callable[[int], Batch]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CaseModule(zoo_lightning.Trained):
    """The LightningModule anyone would write around a case's model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.model = case.build()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.case.loss(self.model, batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.case.loss(self.model, batch))


def lightning_module(case: Case | LightningCase) -> pl.LightningModule:
    return CaseModule(case) if isinstance(case, Case) else case.build()


def loader(case: Case | LightningCase, batches: int) -> DataLoader[Batch]:
    """Batches 0 … n-1 of the case, in order."""
    return DataLoader([case.batch(seed) for seed in range(batches)], batch_size=None)


_FAMILY_BATCHES = {
    "gpt2": causal_batch,
    "llama": causal_batch,
    "bert": masked_batch,
    "vit": pixels_batch,
    "t5": translation_batch,
    "whisper": speech_batch,
}
# GPT-2 and Llama: transformers' causal loss casts the logits. Llama and T5: their RMS norms. Llama and ViT: the softmax
# of eager attention.
_FLOAT32_INSIDE = ("gpt2-sdpa", "gpt2-eager", "llama-sdpa", "llama-eager", "t5-sdpa", "t5-eager", "vit-eager")


def family_case(family: str, attention: str, dropout: float = 0.0) -> Case:
    """One of the twelve; with ``dropout`` wherever the model has it."""
    name = f"{family}-{attention}"
    return Case(
        name=name,
        build=partial(FAMILY_BUILDERS[family], attention, dropout),
        batch=_FAMILY_BATCHES[family],
        loss=transformers_loss,
        casts_to_float32=name in _FLOAT32_INSIDE,
    )


TWELVE = tuple(f"{family}-{attention}" for family in FAMILIES for attention in ATTENTION)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def _language_case(name: str, build: Callable[[], nn.Module], **options: bool) -> Case:
    return Case(name, build, next_token_batch, token_loss, **options)


def _image_case(name: str, build: Callable[[], nn.Module]) -> Case:
    return Case(name, build, image_batch, image_loss)


def _registry(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = _registry(
    *(family_case(family, attention) for family in FAMILIES for attention in ATTENTION),
    Case("albert", albert, masked_batch, transformers_loss),
    Case("mixtral-eager", partial(mixtral, "eager"), causal_batch, transformers_loss, casts_to_float32=True),
    Case("mixtral-grouped", partial(mixtral, "grouped_mm"), causal_batch, transformers_loss, has_float64=False),
    # recurrent
    _language_case("lstm", partial(own.RecurrentLanguageModel, nn.LSTM)),
    _language_case("gru", partial(own.RecurrentLanguageModel, nn.GRU)),
    # ways to write attention
    _language_case("sdpa-attention", own.language_model),
    _language_case("operator-attention", partial(own.language_model, attention=own.OperatorAttention)),
    _language_case("einsum-attention", partial(own.language_model, attention=own.EinsumAttention)),
    _language_case("multihead-attention", partial(own.language_model, attention=own.PackedAttention)),
    _language_case("torch-encoder-prenorm", partial(own.TorchEncoderModel, norm_first=True)),
    _language_case("torch-encoder-postnorm", partial(own.TorchEncoderModel, norm_first=False)),
    # residual blocks
    _language_case("parallel-residual", partial(own.language_model, block=own.ParallelBlock)),
    _language_case("layer-scale", partial(own.language_model, block=own.LayerScaleBlock)),
    # mixtures of experts
    _language_case("experts-loop", partial(own.language_model, mlp=own.LoopExperts)),
    _language_case("experts-indexed", partial(own.language_model, mlp=own.IndexedExperts)),
    _language_case("experts-grouped", partial(own.language_model, mlp=own.GroupedExperts), has_float64=False),
    # sharing, freezing, reparametrizing
    _language_case("tied-embedding", own.TiedLanguageModel),
    _language_case("frozen-layers", own.frozen_language_model),
    _language_case("repeated-layer", own.repeated_language_model),
    _language_case("shared-layer", own.shared_language_model),
    _language_case("lora", own.lora_language_model),
    _image_case("weight-norm", own.WeightNormNet),
    # images
    _image_case("resnet", own.ResNet),
    _image_case("class-token", own.ClassTokenModel),
    _image_case("conv-transformer", own.ConvTransformer),
    Case("unet", own.UNet, image_batch, image_reconstruction_loss),
    Case("dit", own.DiT, image_batch, velocity_loss),
    # roots
    Case("sequential", _mlp, vector_batch, vector_loss),
    Case("encode-method", own.Autoencoder, vector_batch, code_loss),
)

LIGHTNING_CASES = {
    case.name: case
    for case in (
        LightningCase("configure-model", zoo_lightning.BuiltInConfigureModel, next_token_batch),
        LightningCase("setup", zoo_lightning.BuiltInSetup, next_token_batch),
        LightningCase("training-step", zoo_lightning.ComputesInTrainingStep, vector_batch),
        LightningCase("other-methods", zoo_lightning.ComputesInOtherMethods, vector_batch),
        LightningCase("several-losses", zoo_lightning.SeveralLosses, vector_batch),
        LightningCase("gan", zoo_lightning.GAN, vector_batch),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Unseen architectures
# ---------------------------------------------------------------------------------------------------------------------
#
# Candidates: every model type in transformers' mappings for masked language models, causal language models and image
# classification, less the types this project was written with, types that reuse their classes, and composite configs
# (text plus vision). They are sorted, shuffled by random.Random(2), and the first ten that `tiny_config` makes small
# are taken: built on the CPU without the network or a missing package, at most four million parameters, a finite loss
# with finite gradients. `draw_unseen` repeats the draw; UNSEEN_TYPES is what it gave with transformers 5.23.

KNOWN_TYPES = frozenset({*FAMILIES, "albert", "mixtral", "resnet"})
UNSEEN_TYPES = (
    "olmoe",
    "gemma4_unified_text",
    "nemotron_h",
    "convnext",
    "big_bird",
    "bert-generation",
    "olmo",
    "mobilevit",
    "swiftformer",
    "gpt_oss",
)

_UNSEEN_WITHOUT_FLOAT64 = ("olmoe", "nemotron_h", "gpt_oss")  # grouped matmuls
_UNSEEN_WITH_FLOAT32 = ("gemma4_unified_text", "bert-generation", "olmo")

_SIZES = {
    "hidden_size d_model n_embd embed_dim embedding_size hidden_dim projection_dim": 32,
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner moe_intermediate_size": 64,
    "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size ffn_hidden_size": 64,
    "max_position_embeddings n_positions max_seq_len local_attention sliding_window": 64,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers": 2,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads": 4,
    "num_key_value_heads num_experts_per_tok moe_topk num_experts_per_token": 2,
    "num_experts num_local_experts n_routed_experts moe_num_experts patch_size": 4,
    "head_dim d_kv d_head qk_nope_head_dim qk_rope_head_dim v_head_dim": 8,
    "q_lora_rank kv_lora_rank": 16,
    "mamba_num_heads mamba_n_heads mamba_head_dim mamba_d_head mamba_d_state ssm_state_size state_size": 8,
    "chunk_size mamba_chunk_size": 8,
    "image_size": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "vocab_size": VOCAB,
}
_SIZE_OF = {field: size for fields, size in _SIZES.items() for field in fields.split()}


def _heads() -> dict[str, tuple[str, Callable[[int], Batch]]]:
    """Model type → (class name, batch) by the first mapping that has the type."""
    from transformers.models.auto import modeling_auto

    mappings = (
        (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, masked_batch),  # before causal: encoders stand in both
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, causal_batch),
        (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, partial(pixels_batch, size=32)),
    )
    heads: dict[str, tuple[str, Callable[[int], Batch]]] = {}
    for mapping, batch in mappings:
        for model_type, class_name in mapping.items():
            name = class_name if isinstance(class_name, str) else class_name[0]
            heads.setdefault(model_type, (name, batch))
    return heads


def tiny_config(model_type: str) -> Any:
    """The type's default config with every size it names reduced and every dropout off."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class().to_dict()
    changes: dict[str, Any] = {field: size for field, size in _SIZE_OF.items() if isinstance(defaults.get(field), int)}
    for field, value in defaults.items():
        if "drop" in field and isinstance(value, float):
            changes[field] = 0.0
        elif field == "depths":
            changes[field] = [1] * len(value)
        elif field == "hidden_sizes":
            changes[field] = [16 * 2**stage for stage in range(len(value))]
    return config_class(num_labels=CLASSES, **changes)


def build_unseen(model_type: str) -> nn.Module:
    import transformers

    class_name, _ = _heads()[model_type]
    return getattr(transformers, class_name)(tiny_config(model_type))


def unseen_batch(model_type: str, seed: int) -> Batch:
    _, batch = _heads()[model_type]
    return batch(seed)


def unseen_case(model_type: str) -> Case:
    return Case(
        name=model_type,
        build=partial(build_unseen, model_type),
        batch=partial(unseen_batch, model_type),
        loss=transformers_loss,
        has_float64=model_type not in _UNSEEN_WITHOUT_FLOAT64,
        casts_to_float32=model_type in _UNSEEN_WITH_FLOAT32,
    )


def _is_usable(case: Case, limit: int = 4_000_000) -> bool:
    try:
        with torch.device("meta"):  # sizes first: an unreduced config may have billions of parameters
            if sum(parameter.numel() for parameter in case.build().parameters()) > limit:
                return False
        torch.manual_seed(0)
        model = case.build()
        case.loss(model, case.batch(0)).backward()
    except Exception:  # whatever a model that cannot be made tiny this way runs into
        return False
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def draw_unseen(count: int = 10) -> tuple[str, ...]:
    """Repeat the draw."""
    from transformers import CONFIG_MAPPING

    heads = _heads()
    known_classes = {heads[name][0] for name in KNOWN_TYPES if name in heads}
    candidates = sorted(
        name
        for name, (class_name, _) in heads.items()
        if class_name not in known_classes and not CONFIG_MAPPING[name].sub_configs
    )
    random.Random(2).shuffle(candidates)
    return tuple(islice((name for name in candidates if _is_usable(unseen_case(name))), count))


UNSEEN = _registry(*map(unseen_case, UNSEEN_TYPES))
