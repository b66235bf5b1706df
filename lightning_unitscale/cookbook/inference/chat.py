"""mode=chat: a conversation in the terminal, or with what is piped in; each line is a message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig

from lightning_unitscale.cookbook.chat_template import prompt_of
from lightning_unitscale.cookbook.data.conversations import Message
from lightning_unitscale.cookbook.generation import NEW_TOKENS, generate, generation_config, number_of_new_tokens
from lightning_unitscale.cookbook.inference.loading import load_with_tokenizer
from lightning_unitscale.cookbook.pretrained import Pretrained, context_length
from lightning_unitscale.cookbook.runs import plain
from lightning_unitscale.errors import InputError

ANEW = "/new"  # a message that begins another conversation


def chat(cfg: DictConfig, path: str) -> list[str]:
    """Answers each message as it comes, token by token, with what was said before in view; returns the answers.

    Raises:
        InputError: the model was not trained on conversations.
    """
    found = load_with_tokenizer(cfg, path)
    tokenizer = found.text_tokenizer()
    if not found.model.can_generate() or not tokenizer.chat_template:
        raise InputError(
            f"model.path={path} was not trained on conversations (unitscale pretrain experiment=dialogue); if it was, "
            "say so: task=dialogue"
        )
    config = generation_config(found.model, tokenizer, plain(cfg.generation))
    if config.num_beams not in (None, 1):
        raise InputError(f"generation.num_beams={config.num_beams}: mode=chat writes as it goes, without beams")
    print(f"Say something; {ANEW} begins another conversation, Ctrl-D ends.")
    torch.manual_seed(cfg.seed)
    said: list[Message] = []
    answers = []
    asked = config.max_new_tokens
    for text in _messages():
        if text == ANEW:
            said = []
            continue
        try:
            said, config.max_new_tokens = _fitting(found, [*said, Message("user", text)], asked)
        except InputError as error:
            print(f"({error})")
            continue
        print("model> ", end="", flush=True)
        prompt = prompt_of(tokenizer, said)
        made = generate(found.model, tokenizer, [prompt], config, stream=True, special_tokens=False)
        answers += made.texts
        said.append(Message("assistant", made.texts[0]))
    return answers


def _messages() -> Iterator[str]:
    """Lines that say something, until there are no more."""
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            raise InputError(f"what came in is no UTF-8 ({error.reason})") from error
        if text:
            yield text


def _fitting(found: Pretrained, said: Sequence[Message], asked: int | None) -> tuple[list[Message], int]:
    """The messages without the first exchanges that the model's context has no room for, and the answer's tokens.

    Where nobody asks for a number of tokens, the answer is left half of the context if it is short.

    Raises:
        InputError: the last message alone is too long.
    """
    tokenizer, context = found.text_tokenizer(), context_length(found.model)
    wanted = asked or min(NEW_TOKENS, (context or 2 * NEW_TOKENS) // 2)
    kept = list(said)
    while True:
        prompts = [prompt_of(tokenizer, kept)]
        try:
            new_tokens = number_of_new_tokens(
                *(found.model, tokenizer, prompts, asked if len(kept) == 1 else wanted), special_tokens=False
            )
        except InputError:
            if len(kept) == 1:
                raise
            kept = kept[2:]
        else:
            break
    if len(kept) < len(said):
        left_out = len(said) - len(kept)
        print(f"(the model's context has no room for what was said first: {left_out} messages are left out)")
    return kept, new_tokens
