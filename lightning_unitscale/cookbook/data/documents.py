"""Where text comes from, as documents (name -> bytes), and which of them are held out."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path

from lightning_unitscale.cookbook.data.utf16 import looks_like_utf16, without_utf16
from lightning_unitscale.cookbook.hub import check_reachable
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found
from lightning_unitscale.warn_user import warn_user


def python_topics() -> dict[str, bytes]:
    """The language reference that CPython carries for `help()`: about 80 documents, 460 kB, no download."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python comes without its documentation (module pydoc_data.topics); "
            "use your own text: data=text data.path=<file, folder or glob>"
        ) from error
    return {name: text.encode() for name, text in sorted(topics.items())}


def text_files(path: str) -> dict[str, bytes]:
    """One document per file: a file, every file below a folder, or a glob (`**` goes through folders).

    Text in UTF-16 with its mark is taken as the same text in UTF-8.
    Hidden files and files with a NUL byte (binaries) are left out when a folder or glob is searched.

    Raises:
        InputError: nothing is there, or nothing with text in it.

    Warns:
        of binaries that are left out, and of text that is not UTF-8: a tokenizer of bytes takes it as it is, others
        read what they can't decode as U+FFFD.
    """
    if not path:
        raise InputError("data.path is empty; give a file, a folder or a glob: data.path=<path>")
    root = Path(path).expanduser()
    if root.is_file():
        candidates = [root]
    elif root.is_dir():
        candidates = sorted(file for file in root.rglob("*") if not _is_hidden(file.relative_to(root)))
    else:
        candidates = sorted(map(Path, glob.glob(str(root), recursive=True)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not candidates:
            pattern = f"the pattern matches no file (looked in {Path.cwd()})"
            raise InputError(f"data.path={path}: {pattern if glob.has_magic(str(root)) else not_found(root)}")

    documents: dict[str, bytes] = {}
    binaries, foreign = [], []
    for file in candidates:
        if not file.is_file():
            continue
        try:
            content = without_utf16(file.read_bytes())
        except OSError as error:
            raise InputError(f"data.path={path}: cannot read {file}: {error.strerror}") from error
        if b"\0" in content:
            encoding = looks_like_utf16(content)
            convert = f" (or {encoding} without its mark? Convert it: iconv -f {encoding} -t UTF-8)" if encoding else ""
            binaries.append(f"{file}{convert}")
        elif content.strip():
            documents[str(file)] = content
            if not _is_utf8(content):
                foreign.append(str(file))
    if not documents:
        named = f"; binary: {_some(binaries)}" if binaries else ""
        raise InputError(
            f"data.path={path}: found no text ({len(candidates)} entries, all empty, binary or folders){named}"
        )
    if binaries:
        warn_user(f"data.path={path}: left out as binary: {_some(binaries)}")
    if foreign:
        warn_user(
            f"data.path={path}: not UTF-8, and read byte by byte: {_some(foreign)}; convert them (iconv -t UTF-8)"
        )
    return documents


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _some(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def hugging_face(
    name: str, config: str | None = None, split: str = "train", column: str = "text", max_documents: int = 10_000
) -> dict[str, bytes]:
    """The first `max_documents` rows of a data set on the Hugging Face hub, streamed; needs the network.

    Raises:
        InputError: `datasets` is not installed, the data set can't be loaded, or the column is not text.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("data=hf needs the `datasets` package: pip install 'lightning-unitscale[hub]'") from error

    check_reachable("data.name", name, None)
    documents: dict[str, bytes] = {}
    try:
        for number, row in enumerate(load_dataset(name, config, split=split, streaming=True).take(max_documents)):
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"data.column={column}: not a text column of {name}; its columns are {', '.join(map(str, row))}"
                )
            if row[column].strip():
                documents[f"{name}/{split}/{number}"] = row[column].encode()
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's client raises offline or for unknown names
        raise InputError(
            f"data.name={name}: the hub did not deliver it ({type(error).__name__}: {error}). "
            "Without the network use data=topics or data=text data.path=<path>."
        ) from error
    if not documents:
        raise InputError(f"data.name={name}: split {split!r} holds no text in column {column!r}")
    return documents


def hold_out(documents: Mapping[str, bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """Splits documents into (training, held-out), the latter at most `share` of all bytes.

    Documents are chosen in the order of a hash of their text, so the split depends on the texts alone, not on names,
    order or seed, and two copies of one text never end up on different sides. A single document is cut near its end.
    """
    if not 0 < share < 1:
        raise InputError(f"data.held_out={share} must lie between 0 and 1")
    ordered = sorted(set(documents.values()), key=lambda text: hashlib.blake2b(text).digest())
    if len(ordered) == 1:
        (text,) = ordered
        cut = int(len(text) * (1 - share))
        cut = text.rfind(b"\n", 0, cut) + 1 or cut
        return [text[:cut]], [text[cut:]]

    room = share * sum(map(len, ordered))
    held_out: list[bytes] = []
    for text in ordered:
        if len(text) <= room:
            held_out.append(text)
            room -= len(text)
    held_out = held_out or [min(ordered, key=len)]  # all documents are larger than the share
    return [text for text in ordered if text not in held_out], held_out
