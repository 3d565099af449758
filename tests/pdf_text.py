"""The words of a PDF that Chromium printed: enough of the format for what Skia writes, as a reader's search would find them."""

from __future__ import annotations

import re
import unicodedata
import zlib


def text_of(data: bytes) -> str:
    """All glyphs in the order in which they are drawn, `as_printed`."""
    objects = {int(number): body for number, body in re.findall(rb"(\d+) 0 obj\s(.*?)\sendobj", data, re.DOTALL)}
    fonts = dict(pair for body in objects.values() for block in re.findall(rb"/Font <<(.*?)>>", body, re.DOTALL) for pair in _pairs(block))
    letters = {name: _letters(objects, objects[number]) for name, number in fonts.items()}
    found, current = [], {}
    for body in objects.values():
        for name, glyphs in re.findall(rb"/(F\d+) \S+ Tf|<([0-9A-Fa-f]+)>", _content(body)):
            current = letters.get(name, {}) if name else current
            found += [current.get(glyphs[i : i + 4].upper(), "") for i in range(0, len(glyphs), 4)]
    return as_printed("".join(found))


def as_printed(text: str) -> str:
    """A text without spaces, at which lines break, and with ligatures taken apart."""
    return unicodedata.normalize("NFKC", "".join(text.split()))


def _pairs(block: bytes) -> list[tuple[bytes, int]]:
    return [(name, int(number)) for name, number in re.findall(rb"/(F\d+) (\d+) 0 R", block)]


def _content(body: bytes) -> bytes:
    """The drawing commands of a page; nothing for other objects."""
    stream = _stream(body)
    return stream if b" Tf" in stream else b""


def _stream(body: bytes) -> bytes:
    head, found, tail = body.partition(b"stream")
    if not found:
        return b""
    raw = tail.lstrip(b"\r\n").rpartition(b"endstream")[0]
    return zlib.decompressobj().decompress(raw) if b"FlateDecode" in head else raw


def _letters(objects: dict[int, bytes], font: bytes) -> dict[bytes, str]:
    """Glyph in hexadecimal -> text, by the font's ToUnicode table."""
    number = re.search(rb"/ToUnicode (\d+) 0 R", font)
    table = _stream(objects[int(number[1])]) if number else b""
    found: dict[bytes, str] = {}
    for block in re.findall(rb"beginbfchar(.*?)endbfchar", table, re.DOTALL):
        found |= {glyph.upper(): bytes.fromhex(text.decode()).decode("utf-16-be") for glyph, text in re.findall(rb"<(\w+)> <(\w+)>", block)}
    for block in re.findall(rb"beginbfrange(.*?)endbfrange", table, re.DOTALL):
        for first, last, start in re.findall(rb"<(\w+)> <(\w+)> <(\w+)>", block):
            steps = range(int(last, 16) - int(first, 16) + 1)
            found |= {b"%04X" % (int(first, 16) + i): chr(int(start, 16) + i) for i in steps}
    return found
