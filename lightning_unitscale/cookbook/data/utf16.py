"""Text in UTF-16, as PowerShell's `>` and Notepad write it: read as UTF-8 where it says what it is, named where not."""

from __future__ import annotations

import codecs

LOOKED_AT = 4096  # bytes
MOST = 0.7  # of every other byte of Latin text in UTF-16 is NUL


def without_utf16(content: bytes) -> bytes:
    """The same text in UTF-8, if it begins with the mark of UTF-16; else the content as it is."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeError:  # UTF-16 that is cut or wrong
            return content
    return content


def looks_like_utf16(content: bytes) -> str:
    """The name of the encoding of content that has no mark, and NUL where UTF-16 has it; empty for other content."""
    start = content[:LOOKED_AT]
    for name, places in (("UTF-16LE", start[1::2]), ("UTF-16BE", start[::2])):
        if places and places.count(0) > MOST * len(places) and start.count(0) < 1.3 * len(places):
            return name
    return ""
