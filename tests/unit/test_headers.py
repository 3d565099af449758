"""Headers of safetensors files: what is refused and with which words, and that what passes is what safetensors itself reads."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from hf_purify.errors import ModelError, PurifyError, UnsafeCheckpoint
from hf_purify.headers import LONGEST_HEADER, read_header
from hf_purify.weights import check_weights


def stored(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which may be given as JSON, and these bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def torch_archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


FOUR = b"\0" * 4
ONE = stored({"a": tensor()}, FOUR)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"
BAD: dict[str, tuple[bytes, type[PurifyError], str]] = {
    "a pickle": (pickle.dumps({"weight": list(range(50))}), UnsafeCheckpoint, "this is a pickle"),
    "a pickle of the oldest binary kind": (pickle.dumps([0.5] * 50, protocol=2), UnsafeCheckpoint, "this is a pickle"),
    "what torch.save writes": (torch_archive(), UnsafeCheckpoint, "a zip archive, as torch.save writes them: it holds a pickle"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), UnsafeCheckpoint, "a file of HDF5"),
    "a pointer": (POINTER, ModelError, "a pointer of Git LFS: the file itself was not downloaded"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), ModelError, "a file of GGUF"),
    "a page": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", ModelError, "a page of HTML"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(64), ModelError, "a gzip archive"),
    "plain JSON": (b'{"error": "not found"}', ModelError, "no header at its beginning"),
    "nothing": (b"", ModelError, "0 bytes and no header"),
    "a length alone": (struct.pack("<Q", 2), ModelError, "8 bytes and no header"),
    "a header that broke off": (ONE[:40], ModelError, r"its header has \d+ bytes and the file 40; it broke off"),
    "a header of 2**63 bytes": (stored({}, length=2**63), UnsafeCheckpoint, f"expected 2 to {LONGEST_HEADER}"),
    "a header longer than allowed": (stored({}, length=LONGEST_HEADER + 1), UnsafeCheckpoint, f"of {LONGEST_HEADER + 1} bytes"),
    "no header": (stored(b"{}", length=0), UnsafeCheckpoint, "a header of 0 bytes"),
    "a header cut short": (stored({"a": tensor()}, FOUR, length=20), ModelError, "no valid JSON"),
    "a list": (stored([1, 2]), ModelError, "no header at its beginning"),
    "bytes that are no UTF-8": (stored(b'{"\xff": 1}'), ModelError, "no valid JSON.*utf-8"),
    "a tensor twice": (stored(b'{"a": 1, "a": 2}'), UnsafeCheckpoint, "names 'a' twice"),
    "a key of a tensor twice": (
        stored(b'{"a": {"dtype": "F32", "shape": [1], "shape": [9], "data_offsets": [0, 4]}}', FOUR),
        UnsafeCheckpoint,
        "names 'shape' twice",
    ),
    "metadata that is a list": (stored({"__metadata__": ["pt"]}), UnsafeCheckpoint, "__metadata__ that is no mapping"),
    "metadata with a number": (stored({"__metadata__": {"format": 1}}), UnsafeCheckpoint, "__metadata__ that is no mapping"),
    "metadata with half a character": (stored({"__metadata__": {"a": "\ud800"}}), UnsafeCheckpoint, "__metadata__"),
    "NaN": (stored(b'{"a": NaN}'), UnsafeCheckpoint, "holds NaN"),
    "deep nesting": (stored(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), UnsafeCheckpoint, "nested too deeply"),
    "an unknown dtype": (stored({"a": tensor("F128")}, FOUR), ModelError, "the dtype 'F128', which is not known"),
    "a dtype that is a list": (stored({"a": tensor(["F32"])}, FOUR), ModelError, "which is not known"),
    "a negative side": (stored({"a": tensor(shape=[-1])}, FOUR), UnsafeCheckpoint, "the number '-1'"),
    "minus zero": (stored(b'{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'), UnsafeCheckpoint, "the number '-0'"),
    "a side that is a switch": (stored({"a": tensor(shape=[True])}, FOUR), UnsafeCheckpoint, r"the shape \[True\]"),
    "a side with a comma": (stored({"a": tensor(shape=[1.0])}, FOUR), UnsafeCheckpoint, r"the shape \[1.0\]"),
    "a shape that is a number": (stored({"a": tensor(shape=1)}, FOUR), UnsafeCheckpoint, "the shape 1; expected a list"),
    "65 axes": (stored({"a": tensor(shape=[1] * 65)}, FOUR), UnsafeCheckpoint, "at most 64 whole numbers"),
    "a product beyond 64 bits": (stored({"a": tensor(shape=[2**32, 2**32])}, FOUR), UnsafeCheckpoint, "larger than any memory"),
    "the same, times zero": (stored({"a": tensor(shape=[2**40, 2**40, 0], offsets=[0, 0])}), UnsafeCheckpoint, "larger than any memory"),
    "a side of thousands of digits": (stored(b'{"a": ' + b"9" * 6000 + b"}"), UnsafeCheckpoint, "holds the number '9"),
    "one offset": (stored({"a": tensor(offsets=[4])}, FOUR), UnsafeCheckpoint, r"the data_offsets \[4\]"),
    "offsets in the wrong order": (stored({"a": tensor(offsets=[4, 0])}, FOUR), UnsafeCheckpoint, r"the data_offsets \[4, 0\]"),
    "offsets that do not fit the shape": (stored({"a": tensor(shape=[2])}, FOUR), UnsafeCheckpoint, r"takes 4 bytes.*in F32 8"),
    "half a byte": (stored({"a": tensor("F4", [3], [0, 2])}, b"\0\0"), UnsafeCheckpoint, "takes 2 bytes"),
    "tensors over each other": (stored({"a": tensor(), "b": tensor()}, FOUR), UnsafeCheckpoint, "'b' lies over the one before"),
    "tensors half over each other": (stored({"a": tensor(), "b": tensor(offsets=[2, 6])}, FOUR * 2), UnsafeCheckpoint, "lies over"),
    "a hole": (stored({"a": tensor(), "b": tensor(offsets=[8, 12])}, FOUR * 3), UnsafeCheckpoint, "leaves a hole in front of it"),
    "a hole at the start": (stored({"a": tensor(offsets=[4, 8])}, FOUR * 2), UnsafeCheckpoint, "leaves a hole"),
    "bytes behind the last tensor": (ONE + b"PK\x05\x06", UnsafeCheckpoint, "4 bytes behind its last tensor"),
    "a tensor that broke off": (ONE[:-1], ModelError, "tells of 4 bytes and the file has 3; it broke off: download it again"),
    "a key that tensors do not have": (
        stored({"a": tensor(code="x")}, FOUR),
        UnsafeCheckpoint,
        "dtype, shape and data_offsets and nothing",
    ),
    "a tensor without a shape": (stored({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), UnsafeCheckpoint, "and nothing else"),
    "a tensor that is a text": (stored({"a": "F32"}), UnsafeCheckpoint, "and nothing else, got 'F32'"),
    "a name of control characters": (stored({"a\x1b[2J": tensor()}, FOUR), UnsafeCheckpoint, r"'a\\x1b\[2J' has a name"),
    "a name written backwards": (stored({"a\u202etp": tensor()}, FOUR), UnsafeCheckpoint, "not printable"),
    "an empty name": (stored({"": tensor()}, FOUR), UnsafeCheckpoint, "a name that is empty"),
    "an endless name": (stored({"a" * 2000: tensor()}, FOUR), UnsafeCheckpoint, "longer than 1024"),
}


@pytest.mark.parametrize(("content", "error", "words"), BAD.values(), ids=BAD)
def test_bad_file_is_refused_with_the_reason(content: bytes, error: type[PurifyError], words: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        read_header(file)
    assert type(caught.value) is error
    message = str(caught.value).removeprefix(str(file))
    assert len(message) < 700
    assert message.isprintable()


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_purify.headers.MOST_TENSORS", 1)
    (tmp_path / "model.safetensors").write_bytes(stored({n: tensor(shape=[0], offsets=[0, 0]) for n in "ab"}))
    with pytest.raises(UnsafeCheckpoint, match="names 2 tensors; expected at most 1"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["folder", "nothing"])
def test_what_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="it is no file"):
        read_header(tmp_path / "model.safetensors")


def as_safetensors_reads(file: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}


def as_we_read(file: Path) -> dict[str, tuple[str, list[int]]]:
    return {name: (t.dtype, list(t.shape)) for name, t in read_header(file).tensors.items()}


def half_a_header_of_640_bytes() -> bytes:
    """Its first two bytes are those of a pickle."""
    plain = json.dumps({"a": tensor()}).encode()
    return stored(plain + b" " * (640 - len(plain)), FOUR)


GOOD: dict[str, Callable[[], bytes]] = {
    "floats": lambda: save({"a": torch.zeros(2, 3), "b.weight": torch.ones(4)}, {"format": "pt"}),
    "float16": lambda: save({"a": torch.zeros(3, dtype=torch.float16)}),
    "bfloat16": lambda: save({"a": torch.zeros(3, dtype=torch.bfloat16)}),
    "float8": lambda: save({"a": torch.zeros(3, dtype=torch.float8_e4m3fn), "b": torch.zeros(5, dtype=torch.float8_e5m2)}),
    "integers": lambda: save({"a": torch.zeros(3, dtype=torch.int64), "b": torch.zeros(2, dtype=torch.bool)}),
    "complex": lambda: save({"a": torch.zeros(3, dtype=torch.complex64)}),
    "four bits": lambda: stored({"a": tensor("F4", [8], [0, 4])}, FOUR),
    "a scalar": lambda: save({"a": torch.tensor(1.0)}),
    "empty tensors": lambda: save({"a": torch.zeros(0), "b": torch.zeros(3, 0, 2), "c": torch.zeros(1)}),
    "no tensors": lambda: stored({}),
    "padding": lambda: stored(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}      ', FOUR),
    "tensors in another order than their bytes": lambda: stored({"b": tensor(offsets=[4, 8]), "a": tensor()}, FOUR * 2),
    "names in other scripts": lambda: save({"层.0": torch.zeros(1), "couche é": torch.zeros(1)}),
    "the two bytes that begin a pickle": half_a_header_of_640_bytes,
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_good_file_is_read_as_safetensors_reads_it(make: Callable[[], bytes], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(make())
    assert as_we_read(file) == as_safetensors_reads(file)
    assert read_header(file).total == file.stat().st_size


def test_values_and_metadata_are_counted(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.numel == 7
    assert header.metadata == {"format": "pt"}


TENSORS = {"encoder.layer.0.weight": torch.arange(6.0).view(2, 3), "head": torch.zeros(0, 4), "count": torch.tensor(1, dtype=torch.int16)}
VALID = save(TENSORS, {"format": "pt", "written by": "a test that needs some text which may change"})


def agrees(file: Path, content: bytes) -> bool:
    """Is a file refused (False), or read as safetensors reads it (True)?"""
    file.write_bytes(content)
    try:
        found = as_we_read(file)
    except PurifyError:
        return False
    assert found == as_safetensors_reads(file), content
    return True


def test_changed_bytes_are_refused_or_read_alike(tmp_path: Path) -> None:
    """Bytes replaced, put in, taken out, doubled, and numbers replaced by others, in a valid file; always the same ones."""
    draw = random.Random(0)
    pieces = [
        b"0",
        b"-1",
        b"1e2",
        b"true",
        b"null",
        b"NaN",
        b'"',
        b"{",
        b"}",
        b"[",
        b",",
        b":",
        b"\\",
        b"\xff",
        b"\xc3",
        b" ",
        b"[]",
        b"18446744073709551616",
    ]
    accepted = 0
    for _ in range(2000):
        content = bytearray(VALID)
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(content))
            match draw.randrange(8):
                case 0:
                    content[at] = draw.randrange(256)
                case 5 | 6 | 7:
                    content[at] = draw.choice(b"0123456789abcFIU")
                case 1:
                    content[at:at] = draw.choice(pieces)
                case 2:
                    del content[at : at + draw.randint(1, 4)]
                case 3:
                    content[at : at + 1] = draw.choice(pieces)
                case 4:
                    content[at:at] = content[at : at + draw.randint(1, 40)]
        raw = bytes(content)
        if draw.random() < 0.7 and b"}}" in raw:  # the length is mended, so that the change is seen by what reads the header
            raw = struct.pack("<Q", raw.rindex(b"}}") + 2 - 8) + raw[8:]
        accepted += agrees(tmp_path / "model.safetensors", raw)
    assert 40 < accepted < 1500, "otherwise the mutations are too coarse or too fine to prove anything"


numbers = st.one_of(st.integers(-2, 9), st.integers(2**31, 2**65), st.booleans(), st.floats(), st.none())
descriptions = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F4", "F6_E2M3", "BOOL", "I64", "F8_E4M3", "f32", ""]),
        "shape": st.lists(st.one_of(st.integers(0, 4), numbers), max_size=3),
        "data_offsets": st.lists(st.one_of(st.integers(0, 16), numbers), min_size=1, max_size=3),
    }
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=st.dictionaries(st.text(max_size=4), descriptions, max_size=3), space=st.integers(0, 40))
def test_made_up_headers_are_refused_or_read_alike(headers: dict[str, Any], space: int, tmp_path: Path) -> None:
    agrees(tmp_path / "model.safetensors", stored(headers, b"\0" * space))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sides=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "I8", "F4", "C64"]), st.lists(st.integers(0, 4), max_size=3), st.text("ab.0é", min_size=1)
        ),
        max_size=4,
        unique_by=lambda t: t[2],
    )
)
def test_made_up_good_headers_are_accepted(sides: list[tuple[str, list[int], str]], tmp_path: Path) -> None:
    bits = {"F32": 32, "F16": 16, "I8": 8, "F4": 4, "C64": 64}
    at, header = 0, {}
    for dtype, shape, name in sides:
        size = bits[dtype]
        for side in shape:
            size *= side
        if size % 8 == 0:
            header[name] = tensor(dtype, shape, [at, at + size // 8])
            at += size // 8
    assert agrees(tmp_path / "model.safetensors", stored(header, b"\0" * at))


def sharded(folder: Path, **change: Any) -> Path:
    """A checkpoint in two shards; `change` replaces entries of the index's weight_map, None takes one out."""
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, key in zip(names, "ab", strict=True):
        save_file({key: torch.zeros(2)}, folder / name)
    index = {k: v for k, v in (dict(zip("ab", names, strict=True)) | change).items() if v is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": index}))
    return folder


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "neuron_mask.safetensors").write_bytes(stored({"mask": tensor()}, FOUR))
    assert list(check_weights(folder, "m")) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


INDEXES: dict[str, tuple[dict[str, Any], type[PurifyError], str]] = {
    "a shard that is not there": ({"a": "model-00003.safetensors"}, ModelError, "names 'model-00003.safetensors', which is not there"),
    "a tensor that its shard does not hold": ({"b": "model-00001-of-00002.safetensors"}, ModelError, "holds 'b', which it does not"),
    "a tensor that no shard holds": ({"c": "model-00001-of-00002.safetensors"}, ModelError, "holds 'c', which it does not"),
    "a shard elsewhere": ({"a": "../../other/model.safetensors"}, UnsafeCheckpoint, "goes up by '..'"),
    "a shard from the root": ({"a": "/etc/model.safetensors"}, UnsafeCheckpoint, "it is absolute"),
    "a pickle as a shard": ({"a": "model.bin"}, UnsafeCheckpoint, "names 'model.bin'; expected safetensors files alone"),
    "a number as a shard": ({"a": 3}, UnsafeCheckpoint, "it is empty or no text"),
}


@pytest.mark.parametrize(("change", "error", "words"), INDEXES.values(), ids=INDEXES)
def test_bad_index_is_refused(change: dict[str, Any], error: type[PurifyError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        check_weights(sharded(tmp_path / "model", **change), "m")


def test_shard_with_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file({"b": torch.zeros(2), "extra": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"holds .extra., which model\.safetensors\.index\.json does not say"):
        check_weights(folder, "m")


def test_index_that_nothing_is_loaded_by_may_name_files_that_are_gone(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", a="gone.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    assert list(check_weights(folder, "m")) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "neuron_mask.safetensors", "anything.safetensors"])
def test_every_safetensors_file_of_a_folder_is_checked(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(VALID)
    (tmp_path / name).write_bytes(pickle.dumps(list(range(99))))
    with pytest.raises(UnsafeCheckpoint, match=f"{name}' is no safetensors file: this is a pickle"):
        check_weights(tmp_path, "m")
