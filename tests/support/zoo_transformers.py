"""Small models of `transformers` with random weights."""

from torch import nn

from support.zoo_batches import BOS, CLASSES, EOS, LENGTH, PAD, VOCAB

TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def _gpt2(attention: str, dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        attn_implementation=attention,
        **TOKENS,
    )
    return GPT2LMHeadModel(config)


def _llama(attention: str, dropout: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        attn_implementation=attention,
        **TOKENS,
    )
    return LlamaForCausalLM(config)


def _bert(attention: str, dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
        **TOKENS,
    )
    return BertForMaskedLM(config)


def _vit(attention: str, dropout: float) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )
    return ViTForImageClassification(config)


def _t5(attention: str, dropout: float) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=dropout,
        decoder_start_token_id=PAD,
        attn_implementation=attention,
        **TOKENS,
    )
    return T5ForConditionalGeneration(config)


def _whisper(attention: str, dropout: float) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        decoder_start_token_id=BOS,
        begin_suppress_tokens=None,
        attn_implementation=attention,
        **TOKENS,
    )
    return WhisperForConditionalGeneration(config)


FAMILY_BUILDERS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "vit": _vit, "t5": _t5, "whisper": _whisper}


def albert() -> nn.Module:
    """Four layers, one set of weights; factorised embedding."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        **TOKENS,
    )
    return AlbertForMaskedLM(config)


def mixtral(experts: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        sliding_window=None,
        experts_implementation=experts,
        **TOKENS,
    )
    return MixtralForCausalLM(config)
