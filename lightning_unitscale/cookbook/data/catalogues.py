"""Translations that ship with a package: the message catalogues of gettext, English to other languages.

Those of `plone-app-locales` (GPL-2.0, as Plone is) have some 3,000 messages in English for each language; they are read
where the package is installed and are no part of this one. A message is known by its English words, or by a name, whose
English words stand in a comment of the catalogue's source.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_unitscale.cookbook.data.examples import Pair
from lightning_unitscale.errors import InputError

_KEY = re.compile(r"[\w.:\-]+")  # an identifier in place of the English text
_DEFAULT = re.compile(r'^#\. Default: "(.*)"$(?:\n#.*$)*\nmsgid "(.+)"$', re.MULTILINE)


def catalogues(
    languages: Sequence[str], package: str = "plone.app.locales", folder: str = "locales", max_length: int = 120
) -> list[Pair]:
    """English messages and their translations; those of the same words stay on one side of a split.

    Args:
        languages: names of folders, "de". With more than one, a source begins with its language: "de: Save".
        package: an installed package.
        folder: below it, with `<language>/LC_MESSAGES/*.mo`.
        max_length: characters; longer messages are left out.

    Raises:
        InputError: the package is not installed, or has no such language.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"data.package={package} is not installed: pip install 'lightning-unitscale[translation]'")
    root = Path(spec.submodule_search_locations[0]) / folder
    pairs: dict[tuple[str, str], Pair] = {}
    for language in languages:
        files = sorted((root / language / "LC_MESSAGES").glob("*.mo"))
        if not files:
            raise InputError(f"data.languages: {package} has no catalogue of {language} in {root}")
        for file in files:
            for english, translation in _messages(file):
                if _is_pair(english, translation, max_length):
                    source = f"{language}: {english}" if len(languages) > 1 else english
                    group = " ".join(re.findall(r"\w+", english.lower())) or english
                    pairs.setdefault((language, english), Pair(source, translation, group))
    return list(pairs.values())


def _messages(file: Path) -> Iterator[tuple[str, str]]:
    """English and its translation."""
    with file.open("rb") as stream:
        messages: dict[object, str] = vars(gettext.GNUTranslations(stream))["_catalog"]
    source = file.with_suffix(".po")
    text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    english = {key: default.replace('\\"', '"') for default, key in _DEFAULT.findall(text)}
    for key, translation in messages.items():
        if isinstance(key, str):
            yield english.get(key, key), translation


def _is_pair(english: str, translation: str, max_length: int) -> bool:
    """A message in words, that is another one in the other language."""
    words = not _KEY.fullmatch(english) or english.istitle()
    return words and english != translation and 0 < len(translation) <= max_length and 0 < len(english) <= max_length
