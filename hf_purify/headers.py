"""Headers of safetensors files, read and checked before any other program opens the file.

A file is eight bytes with the header's length `n`, the header (`n` bytes of JSON), and the tensors' bytes, which the header cuts
without gaps:

    {"__metadata__": {"format": "pt"}, "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}

What a download that broke off leaves behind, or another format under this name, is a `ModelError`; what no writer of such files
writes is an `UnsafeCheckpoint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_purify.errors import ModelError, PurifyError, UnsafeCheckpoint, shown
from hf_purify.plain import unique_keys

PREFIX = 8  # bytes, which hold the header's length
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
MOST_TENSORS = 1_000_000
MOST_AXES = 64  # as torch has it
LONGEST_NAME = 1024
LARGEST = 2**63  # values of one tensor, which torch counts in 64 bits
BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
# How other formats begin, what they are, and whether reading one as what it is could run code.
OTHERS: tuple[tuple[bytes, str, bool], ...] = (
    *((bytes((0x80, protocol)), "this is a pickle, which can run any code when read", True) for protocol in range(2, 6)),
    (b"PK\x03\x04", "this is a zip archive, as torch.save writes them: it holds a pickle, which can run any code when read", True),
    (b"\x89HDF\r\n", "this is a file of HDF5, which Keras can store code in", True),
    (b"version https://git-lfs", "this is a pointer of Git LFS: the file itself was not downloaded (git lfs pull)", False),
    (b"GGUF", "this is a file of GGUF, which holds quantized weights: a repair needs the checkpoint that it was made of", False),
    (b"<!doctype html", "this is a page of HTML: the download gave an error's page or a log-in", False),
    (b"<html", "this is a page of HTML: the download gave an error's page or a log-in", False),
    (b"\x1f\x8b", "this is a gzip archive: unpack it", False),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        dtype: as safetensors writes it, such as `BF16`.
        begin, end: its bytes, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, read from its header alone.

    Args:
        tensors: by name, in the order of their bytes.
        metadata: what the writer noted.
        total: bytes of the file.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    total: int

    @property
    def numel(self) -> int:
        """Number of values of all tensors."""
        return sum(t.numel for t in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; of the tensors nothing is read.

    Raises:
        UnsafeCheckpoint: a pickle under this name, or a header that no writer of safetensors writes.
        ModelError: no such file, another format, or a file that is broken off.
    """
    if not path.is_file():
        raise ModelError(f"'{path}' cannot be read: it is no file")
    try:
        with path.open("rb") as file:
            start, total = file.read(64), path.stat().st_size
            length = int.from_bytes(start[:PREFIX], "little")
            if start[PREFIX : PREFIX + 1] != b"{" or not 2 <= length <= min(total - PREFIX, LONGEST_HEADER):
                raise _no_header(path, start, length, total)
            file.seek(PREFIX)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror or error}") from error
    return _checked(_parsed(raw, path), total - PREFIX - length, total, path)


def _no_header(path: Path, start: bytes, length: int, total: int) -> PurifyError:
    """What is wrong with a file that does not begin as safetensors do."""
    lowered = start.lstrip().lower()
    for magic, what, runs_code in OTHERS:
        if start.startswith(magic) or (magic.startswith(b"<") and lowered.startswith(magic)):
            return (UnsafeCheckpoint if runs_code else ModelError)(f"'{path}' is no safetensors file: {what}")
    if total < PREFIX + 2:
        return ModelError(f"'{path}' cannot be read: it has {total} bytes and no header; download it again")
    if start[PREFIX : PREFIX + 1] == b"{" and total - PREFIX < length <= LONGEST_HEADER:
        return ModelError(f"'{path}' cannot be read: its header has {length} bytes and the file {total}; it broke off: download it again")
    if start[PREFIX : PREFIX + 1] == b"{":
        return UnsafeCheckpoint(f"'{path}' asks for a header of {length} bytes; expected 2 to {LONGEST_HEADER}")
    return ModelError(f"'{path}' cannot be read: it is no safetensors file: no header at its beginning")


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    """The header's JSON, without what readers of JSON disagree about: repeated keys, NaN, minus zero."""

    def repeated(key: str) -> UnsafeCheckpoint:
        return UnsafeCheckpoint(f"the header of '{path}' names {shown(key)} twice")

    def number(text: str) -> int:
        if text.startswith("-") or len(text) > 19:
            raise UnsafeCheckpoint(f"the header of '{path}' holds the number {shown(text)}; expected 0 to {LARGEST}")
        return int(text)

    def constant(text: str) -> NoReturn:
        raise UnsafeCheckpoint(f"the header of '{path}' holds {text}, which is no JSON")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys(repeated), parse_int=number, parse_constant=constant)
    except RecursionError as error:
        raise UnsafeCheckpoint(f"the header of '{path}' is nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"'{path}' cannot be read: its header is no valid JSON ({error}); download it again") from error
    return dict(found)  # it begins with a brace


def _checked(parsed: dict[str, Any], space: int, total: int, path: Path) -> Header:
    """The header, with its tensors held against the bytes that the file has for them."""
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _encodes(k + v) for k, v in metadata.items()):
        raise UnsafeCheckpoint(f"the header of '{path}' has a __metadata__ that is no mapping of texts to texts")
    if len(parsed) > MOST_TENSORS:
        raise UnsafeCheckpoint(f"the header of '{path}' names {len(parsed)} tensors; expected at most {MOST_TENSORS}")
    entries = sorted(((n, _entry(n, d, path)) for n, d in parsed.items()), key=lambda e: (e[1].begin, e[1].end))
    at = 0
    for name, entry in entries:
        if entry.begin != at:
            what = "lies over the one before" if entry.begin < at else "leaves a hole in front of it"
            raise UnsafeCheckpoint(f"the header of '{path}': tensor {shown(name)} {what} (byte {entry.begin}, expected {at})")
        at = entry.end
    if at > space:
        raise ModelError(
            f"'{path}' cannot be read: its header tells of {at} bytes and the file has {space}; it broke off: download it again"
        )
    if at < space:
        raise UnsafeCheckpoint(f"'{path}' has {space - at} bytes behind its last tensor, which no tensor uses")
    return Header(dict(entries), metadata, total)


def _entry(name: str, given: Any, path: Path) -> Entry:
    """One tensor as the header describes it."""
    where = f"the header of '{path}': tensor {shown(name)}"
    if not name.isprintable() or not 1 <= len(name) <= LONGEST_NAME:
        raise UnsafeCheckpoint(f"{where} has a name that is empty, longer than {LONGEST_NAME} or not printable")
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnsafeCheckpoint(f"{where} must have dtype, shape and data_offsets and nothing else, got {shown(given)}")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ModelError(f"{where} has the dtype {shown(dtype)}, which is not known; expected one of {', '.join(BITS)}")
    if not _are_counts(shape) or len(shape) > MOST_AXES:
        raise UnsafeCheckpoint(f"{where} has the shape {shown(shape)}; expected a list of at most {MOST_AXES} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnsafeCheckpoint(f"{where} has the data_offsets {shown(offsets)}; expected its first byte and the one behind its last")
    bits, size = BITS[dtype], 1
    for side in shape:
        size *= side
        if size * bits >= LARGEST:
            raise UnsafeCheckpoint(f"{where} has the shape {shown(shape)}, which is larger than any memory")
    if size * bits != 8 * (offsets[1] - offsets[0]):
        raise UnsafeCheckpoint(
            f"{where} takes {offsets[1] - offsets[0]} bytes, and its shape {shown(shape)} in {dtype} {math.ceil(size * bits / 8)}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _are_counts(given: Any) -> bool:
    """Is this a list of whole numbers from zero? True and False are none."""
    return isinstance(given, list) and all(type(v) is int and 0 <= v < LARGEST for v in given)


def _encodes(text: str) -> bool:
    """Is a text valid Unicode? JSON can hold half a pair of surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
