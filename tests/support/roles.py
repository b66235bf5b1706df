"""What a person who has read the modeling code says about the twelve (sdpa and eager share labels).

Names are those of ``model.named_parameters()``, in which a tied weight appears once, under its embedding's name.
Globs are ``fnmatch``'s: ``*`` also matches dots. Every parameter matches exactly one glob of its model.
"""

from fnmatch import fnmatchcase
from typing import Final, Literal

Role = Literal["embedding", "position", "hidden", "readout", "norm", "bias", "relative_position", "token"]

ROLES: Final[dict[str, dict[str, Role]]] = {
    # Learned positions; Conv1D stores [in, out]; lm_head is wte.
    "gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position",
        "transformer.h.*.attn.c_attn.weight": "hidden",
        "transformer.h.*.c_proj.weight": "hidden",
        "transformer.h.*.mlp.c_fc.weight": "hidden",
        "transformer.h.*.ln_?.weight": "norm",
        "transformer.ln_f.weight": "norm",
        "*.bias": "bias",
    },
    # Rotary positions, grouped-query attention, gated MLP, no biases, its own head.
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*_proj.weight": "hidden",
        "model.layers.*layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "readout",
    },
    # Three embeddings summed before a norm; the head is dense, gelu, norm, then word_embeddings and a bias of its own.
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
        "bert.embeddings.position_embeddings.weight": "position",
        "bert.encoder.layer.*.query.weight": "hidden",
        "bert.encoder.layer.*.key.weight": "hidden",
        "bert.encoder.layer.*.value.weight": "hidden",
        "bert.encoder.layer.*.dense.weight": "hidden",
        "cls.predictions.transform.dense.weight": "hidden",
        "*.LayerNorm.weight": "norm",
        "*.bias": "bias",
    },
    # Patches by a strided convolution; class token and positions are plain parameters.
    "vit": {
        "vit.embeddings.cls_token": "token",
        "vit.embeddings.position_embeddings": "position",
        "vit.embeddings.patch_embeddings.projection.weight": "hidden",
        "vit.layers.*_proj.weight": "hidden",
        "vit.layers.*.mlp.fc?.weight": "hidden",
        "vit.layers.*.layernorm_*.weight": "norm",
        "vit.layernorm.weight": "norm",
        "classifier.weight": "readout",
        "*.bias": "bias",
    },
    # One embedding for encoder, decoder and lm_head; the first layer of each stack has a table [bucket, head] that is
    # looked up like an embedding and added to attention scores; attention logits are not divided by √d; no biases.
    "t5": {
        "shared.weight": "embedding",
        "*.relative_attention_bias.weight": "relative_position",
        "*Attention.[qkvo].weight": "hidden",
        "*.DenseReluDense.w[io].weight": "hidden",
        "*layer_norm.weight": "norm",
    },
    # Two convolutions with gelu; the encoder's positions are frozen sinusoids, the decoder's are learned; k_proj has no
    # bias; proj_out is the decoder's embedding.
    "whisper": {
        "model.decoder.embed_tokens.weight": "embedding",
        "model.*coder.embed_positions.weight": "position",
        "model.encoder.conv?.weight": "hidden",
        "model.*coder.layers.*_proj.weight": "hidden",
        "model.*coder.layers.*.fc?.weight": "hidden",
        "model.*layer_norm.weight": "norm",
        "*.bias": "bias",
    },
}

# The module that reads the embedding's weight a second time, as readout.
TIED_READOUT: Final[dict[str, str]] = {
    "gpt2": "lm_head",
    "bert": "cls.predictions.decoder",
    "t5": "lm_head",
    "whisper": "proj_out",
}

# Additions `stream + branch` in one forward pass of the zoo's models (two layers per stack; the layers of the decoders
# of T5 and Whisper have three).
RESIDUAL_BRANCHES: Final[dict[str, int]] = {
    "gpt2": 2 * 2,
    "llama": 2 * 2,
    "bert": 2 * 2,
    "vit": 2 * 2,
    "t5": 2 * 2 + 2 * 3,
    "whisper": 2 * 2 + 2 * 3,
}

# The last matmul weight of each branch: one glob per kind of branch.
PARAMETER_AT_BRANCH_END: Final[dict[str, tuple[str, ...]]] = {
    "gpt2": ("transformer.h.*.attn.c_proj.weight", "transformer.h.*.mlp.c_proj.weight"),
    "llama": ("model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight"),
    "bert": (
        "bert.encoder.layer.*.attention.output.dense.weight",
        "bert.encoder.layer.[0-9].output.dense.weight",
    ),
    "vit": ("vit.layers.*.attention.o_proj.weight", "vit.layers.*.mlp.fc2.weight"),
    "t5": (
        "*.SelfAttention.o.weight",
        "decoder.block.*.EncDecAttention.o.weight",
        "*.DenseReluDense.wo.weight",
    ),
    "whisper": (
        "model.*coder.layers.*.self_attn.out_proj.weight",
        "model.decoder.layers.*.encoder_attn.out_proj.weight",
        "model.*coder.layers.*.fc2.weight",
    ),
}

# Where the norm stands: at the start of each branch, or after each addition.
NORM_PLACEMENT: Final[dict[str, Literal["pre", "post"]]] = {
    "gpt2": "pre",
    "llama": "pre",
    "bert": "post",
    "vit": "pre",
    "t5": "pre",
    "whisper": "pre",
}


def labels_of(family: str, parameter: str) -> list[Role]:
    """The labels whose glob matches: one, if the labels are complete and disjoint."""
    return [role for glob, role in ROLES[family].items() if fnmatchcase(parameter, glob)]


def ends_branch(family: str, parameter: str) -> bool:
    return any(fnmatchcase(parameter, glob) for glob in PARAMETER_AT_BRANCH_END[family])
