"""Conversations: those of `chatterbot-corpus` (BSD), read where it is installed, and the user's own.

A conversation is what a chat template takes: messages of the roles system, user and assistant. The corpus has 2,026 in
English, of which more than a thousand are copies of ten; each is taken once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_unitscale.cookbook.data.sound_rows import sound_rows
from lightning_unitscale.cookbook.data.table_files import TableRow, table_rows
from lightning_unitscale.errors import InputError

ROLES = ("system", "user", "assistant")
_NO_LETTER = re.compile(r"[\W_]+")


class Message(NamedTuple):
    """What one of ROLES says."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in their order; conversations of one group stay on one side of a split."""

    messages: tuple[Message, ...]
    group: str


def conversation_of(messages: Sequence[Message]) -> Conversation:
    """Its group is how it begins, in small letters without punctuation: "Hi!" and "hi" have answers of one kind.

    Raises:
        InputError: nobody answers.
    """
    kept = list(messages)
    while kept and kept[-1].role != "assistant":
        kept.pop()  # what nobody answers teaches no answer
    first = next((message.content for message in kept if message.role == "user"), None)
    if first is None:
        raise InputError("no message of a user with an answer of the assistant")
    return Conversation(tuple(kept), group=_NO_LETTER.sub(" ", first.lower()).strip() or first)


def chatterbot_corpus(languages: Sequence[str] = ("english",)) -> list[Conversation]:
    """The conversations of the package, each once; who begins is the user, and who answers the assistant.

    Args:
        languages: names of folders, "german".

    Raises:
        InputError: the package is not installed, or has no such language.
    """
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("data=chatterbot needs chatterbot-corpus: pip install 'lightning-unitscale[dialogue]'")
    root = Path(spec.submodule_search_locations[0]) / "data"
    found: dict[Conversation, None] = {}
    for language in languages:
        files = sorted((root / language).glob("*.yml"))
        if not files:
            known = ", ".join(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
            raise InputError(f"data.languages: chatterbot-corpus has no {language!r}; it has {known}")
        for file in files:
            for texts in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                found.setdefault(conversation_of(_in_turn([str(text).strip() for text in texts])))
    return list(found)


def _in_turn(texts: Sequence[str]) -> list[Message]:
    return [Message(ROLES[1 + number % 2], text) for number, text in enumerate(texts)]


def conversation_file(path: str, messages: str = "messages", skip_broken: bool = False) -> list[Conversation]:
    """The user's own conversations, one a row.

    Args:
        path: a .jsonl or .parquet file (see `table_rows`).
        messages: name of the key, or column, with a list of objects with `role` and `content`, or of texts, which the
            user and the assistant say in turn.
        skip_broken: leave out rows that can't be read or where nobody answers, and say how many they were.

    Raises:
        InputError: no such file, another ending or encoding, or a row that is no conversation.
    """

    def read(row: TableRow) -> Conversation:
        said = row.value(messages, "data.messages")
        try:
            return conversation_of(_messages(said))
        except InputError as error:
            raise InputError(f"data.path={path}: {row.place}: {error}") from error

    return sound_rows(table_rows(path), read, skip_broken)


def _messages(said: Any) -> list[Message]:
    if not isinstance(said, list):
        raise InputError(f"the messages are {type(said).__name__}, and not a list of them")
    if all(isinstance(text, str) for text in said):
        return _in_turn(said)
    found = []
    for number, one in enumerate(said, start=1):
        role, content = (one.get("role"), one.get("content")) if isinstance(one, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise InputError(f"message {number} needs a role ({', '.join(ROLES)}) and its content as text")
        found.append(Message(str(role), content))
    return found
