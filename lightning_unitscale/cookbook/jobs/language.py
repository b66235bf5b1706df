"""Language models of `transformers`; scores are nats per symbol, of text per byte."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.text import BYTES, MASK, chains, masked, text_crops

HEAD_WIDTH = 16
SYMBOLS = 16  # of chains


class LanguageJob(Job):
    """Crops of text, and a model over bytes."""

    def __init__(self, length: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.length = length
        self.model = self.build()

    @abstractmethod
    def build(self) -> nn.Module:
        """The model of these sizes, as its author initialised it."""

    def attention_sizes(self) -> dict[str, int]:
        """What configurations of transformers call alike."""
        return {"hidden_size": self.width, "num_attention_heads": self.width // HEAD_WIDTH}


class CausalLanguageJob(LanguageJob):
    """Predicting the next byte."""

    def examples(self) -> tuple[Tensor, ...]:
        """Crops that are one byte longer than the context."""
        return (text_crops(self.length + 1),)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        (crops,) = batch
        logits = self.model(input_ids=crops[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


class Llama(CausalLanguageJob):
    """RMSNorm, rotary positions, gated MLP, embedding and readout apart."""

    branch_outputs = ("*.o_proj", "*.down_proj")

    def build(self) -> nn.Module:
        """Initialised with std 0.02."""
        sizes = {"intermediate_size": 3 * self.width, "num_hidden_layers": self.depth, **self.attention_sizes()}
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", vocab_size=BYTES, max_position_embeddings=self.length, **sizes)
        )
        return model


class GPT2(CausalLanguageJob):
    """LayerNorm, learned positions, embedding tied to the readout."""

    branch_outputs = ("*.c_proj",)

    def build(self) -> nn.Module:
        """Initialised with std 0.02, branch outputs smaller."""
        sizes = {"n_embd": self.width, "n_layer": self.depth, "n_head": self.width // HEAD_WIDTH}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        special = {"bos_token_id": None, "eos_token_id": None}
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", vocab_size=BYTES, n_positions=self.length, **sizes, **dropout, **special)
        )
        return model


class Mamba(CausalLanguageJob):
    """A selective state-space model, tied."""

    branch_outputs = ("*.out_proj",)
    kept = ("*.dt_proj.weight",)

    def build(self) -> nn.Module:
        """Initialised with std 0.1, and its own for dt, A and D."""
        sizes = {"hidden_size": self.width, "num_hidden_layers": self.depth, "state_size": 8}
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=BYTES, **sizes))
        return model


class T5(LanguageJob):
    """An encoder–decoder that writes a text whose copy in the encoder has bytes masked."""

    branch_outputs = ("*.o", "*.wo")
    kept = ("*.relative_attention_bias.weight", "*.q.weight")  # queries carry the 1/√d that its attention has not

    def build(self) -> nn.Module:
        """Its own initialisation is by fan-in already."""
        sizes = {"d_model": self.width, "d_kv": HEAD_WIDTH, "d_ff": 4 * self.width, "num_layers": self.depth}
        config = AutoConfig.for_model(
            "t5",
            vocab_size=BYTES,
            num_heads=self.width // HEAD_WIDTH,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            **sizes,
        )
        model: nn.Module = AutoModelForSeq2SeqLM.from_config(config)
        return model

    def examples(self) -> tuple[Tensor, ...]:
        """Masked crops, and the crops."""
        crops = text_crops(self.length)
        return masked(crops, MASK, share=0.3)[0], crops

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of every byte."""
        hidden, crops = batch
        logits = self.model(input_ids=hidden, labels=crops).logits
        return F.cross_entropy(logits.flatten(0, 1), crops.flatten())


class Bert(LanguageJob):
    """Post-norm, tied; predicting masked symbols of chains."""

    branch_outputs = ("*.attention.output.dense", "*.layer.*.output.dense")

    def build(self) -> nn.Module:
        """Initialised with std 0.02."""
        sizes = {"intermediate_size": 4 * self.width, "num_hidden_layers": self.depth, **self.attention_sizes()}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model: nn.Module = AutoModelForMaskedLM.from_config(
            AutoConfig.for_model(
                "bert", vocab_size=SYMBOLS + 1, max_position_embeddings=self.length, **sizes, **dropout
            )
        )
        return model

    def examples(self) -> tuple[Tensor, ...]:
        """Masked chains, and labels."""
        return masked(chains(self.length, SYMBOLS), SYMBOLS, share=0.15)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of the masked symbols."""
        hidden, labels = batch
        return F.cross_entropy(self.model(input_ids=hidden).logits.flatten(0, 1), labels.flatten())
