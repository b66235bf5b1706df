"""Conversations as the text that a model reads: the tokenizer's chat template, or one of our own where it has none."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cookbook.data.conversations import Message
from lightning_unitscale.errors import InputError

ASSISTANT = "assistant"
TEMPLATE = """\
{{ bos_token or '' }}{% for message in messages %}{{ message.role + '\n' + message.content + eos_token }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"""


def make_able_to_chat(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Gives the tokenizer a chat template where it has none, and the model a token that ends its answers.

    Raises:
        InputError: the tokenizer has no eos token, so that an answer would never end.
    """
    if tokenizer.chat_template and model.generation_config.eos_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos token, so an answer would never end; give another one")
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    if model.generation_config.eos_token_id is None:
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Messages as text with its special tokens, up to where the assistant begins to answer.

    Raises:
        InputError: the template refuses such messages.
    """
    return _rendered(tokenizer, messages, answer=True)


def pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """A conversation up to its last answer, cut into texts that are answers (True) and what stands before them.

    Raises:
        InputError: the template refuses such messages, or what it writes of the first ones depends on later ones.
    """
    found, done = [], ""
    for number, message in enumerate(messages):
        if message.role != ASSISTANT:
            continue
        before = _rendered(tokenizer, messages[:number], answer=True)
        after = _rendered(tokenizer, messages[: number + 1], answer=False)
        if not before.startswith(done) or not after.startswith(before):
            raise InputError("the chat template writes earlier messages anew at each answer; give another tokenizer")
        found += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: bool) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise InputError(f"the chat template refuses messages of {roles} ({error})") from error
    return str(text)
