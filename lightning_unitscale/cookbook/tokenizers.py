"""Tokenizers: those of transformers, and one of the same kind for bytes."""

from __future__ import annotations

import string

import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lightning_unitscale.cookbook.hub import check_reachable
from lightning_unitscale.errors import InputError, first_line

BYTES = "bytes"  # the name of `byte_tokenizer()` where a path could stand
LETTERS = "letters"  # likewise, of `letter_tokenizer()`
CHARACTERS = "characters"  # likewise, of `character_tokenizer()`
BOS = 256  # of bytes: begins every document
VOCABULARY = 257
_DOCUMENT = "<|document|>"  # as text, the token BOS


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes as tokens 0 to 255, and one token (BOS) that begins documents, ends them and pads.

    A tokenizer without merges, so `save_pretrained` writes one that plain transformers loads.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Backend(models.BPE(vocab={**vocabulary, _DOCUMENT: BOS}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=f"{_DOCUMENT} $A", special_tokens=[(_DOCUMENT, BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_DOCUMENT,
        eos_token=_DOCUMENT,
        pad_token=_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )


def letter_tokenizer() -> PreTrainedTokenizerBase:
    """The letters a to z, apostrophe and space as tokens, for CTC: token 0 is its blank, and pads.

    Capitals are made small, and other characters are left out. Decoding takes repeated tokens and blanks away.
    """
    backend = _of_letters("<blank>")
    backend.decoder = decoders.CTC(pad_token="<blank>", word_delimiter_token="|", cleanup=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<blank>", clean_up_tokenization_spaces=False
    )


def character_tokenizer() -> PreTrainedTokenizerBase:
    """The tokens of `letter_tokenizer()` for a decoder that writes them one by one: token 0 ends a text, and pads."""
    backend = _of_letters("<end>")
    backend.decoder = decoders.Sequence([decoders.Replace("|", " "), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False
    )


def _of_letters(first: str) -> Backend:
    """A tokenizer whose token 0 is named so."""
    letters = {token: number for number, token in enumerate((first, "|", "'", *string.ascii_lowercase))}
    backend = Backend(models.WordLevel(letters, unk_token=first))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z' ]"), ""), normalizers.Replace(" ", "|")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return backend


_OWN = {BYTES: byte_tokenizer, LETTERS: letter_tokenizer, CHARACTERS: character_tokenizer}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "bytes", "letters", "characters", or a folder or hub name.

    Raises:
        InputError: there is none.
    """
    if name in _OWN:
        return _OWN[name]()
    check_reachable("model.tokenizer", name, "tokenizer_config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model.tokenizer={name}: no tokenizer there ({first_line(error)})") from error
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """
    Raises:
        InputError: the tokenizer has tokens that the model has no embedding for.
    """
    if model.main_input_name != "input_ids":
        return  # it hears or sees, and has no embeddings of tokens
    embeddings = model.get_input_embeddings()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
        raise InputError(
            f"the tokenizer ({tokenizer.name_or_path or BYTES}) has token numbers up to {largest}, but the model's "
            f"vocabulary has only {embeddings.num_embeddings}; give the one it was trained with: model.tokenizer=<path>"
        )


def is_of_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is `byte_tokenizer()`, or was saved as one."""
    return len(tokenizer) == VOCABULARY and tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def make_able_to_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Names a pad token where there is none; its positions are masked, so any token does.

    Raises:
        InputError: the tokenizer has no token that could stand there.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no pad, eos, bos or unk token to pad texts with")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # where a causal model's text ends
