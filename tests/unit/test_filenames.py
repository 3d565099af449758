"""Names of files that a stranger chose: only plain ones inside the checkpoint pass, on POSIX and on Windows."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_purify.errors import UnsafeCheckpoint
from hf_purify.filenames import TEMPLATES, check_links, check_listing, check_name

BAD: dict[str, tuple[Any, str]] = {
    "up": ("../model.safetensors", "goes up by '..'"),
    "up in between": ("a/../../model.safetensors", "goes up by '..'"),
    "up at the end": ("a/..", "goes up by '..'"),
    "here": ("./model.safetensors", "an empty part"),
    "an empty part": ("a//model.safetensors", "an empty part"),
    "a folder": ("a/", "an empty part"),
    "absolute": ("/etc/passwd", "it is absolute"),
    "UNC": ("//server/share/model.safetensors", "it is absolute"),
    "UNC of Windows": (r"\\server\share\model.safetensors", "a backslash"),
    "up on Windows": (r"..\model.safetensors", "a backslash"),
    "a drive": ("C:/model.safetensors", "begins with a drive"),
    "a drive's own folder": ("c:model.safetensors", "begins with a drive"),
    "a stream of Windows": ("model.safetensors:hidden", "holds ':'"),
    "a pattern": ("model*.safetensors", r"holds '\*'"),
    "NUL": ("model\0.safetensors", "control characters"),
    "a new line": ("model\n.safetensors", "control characters"),
    "an escape": ("\x1b[2Jmodel.safetensors", "control characters"),
    "half a character": ("model\ud800.safetensors", "control characters"),
    "written backwards": ("model\u202esrotcat.safetensors", "not shown"),
    "a device": ("con", "a device on Windows"),
    "a device with an ending": ("NUL.safetensors", "a device on Windows"),
    "a device with a blank": ("aux .txt", "a device on Windows"),
    "a device inside": ("a/com1/model.safetensors", "a device on Windows"),
    "a device in superscript": ("lpt\u00b2.txt", "a device on Windows"),
    "a dot behind": ("model.safetensors.", "ends with a dot or a space"),
    "a space behind": ("model.safetensors ", "ends with a dot or a space"),
    "three dots": (".../model.safetensors", "ends with a dot or a space"),
    "empty": ("", "empty or no text"),
    "no text": (None, "empty or no text"),
    "a list": (["model.safetensors"], "empty or no text"),
    "a long part": ("a" * 256, "more than 255 bytes"),
    "a part that is long in bytes": ("é" * 128, "more than 255 bytes"),
    "long": ("a/" * 600 + "a", "1201 characters"),
}


@pytest.mark.parametrize(("name", "words"), BAD.values(), ids=BAD)
def test_bad_name_is_refused(name: Any, words: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match=words) as caught:
        check_name(name, "the index of 'org/model'")
    assert "the index of 'org/model' names the file" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "a/b/c.json",
        ".gitattributes",
        "..x",
        "a..b",
        "console.txt",
        "com10",
        "层.txt",
    ],
)
def test_good_name_passes(name: str) -> None:
    check_name(name, "a test")


PIECES = ["..", ".", "/", "\\", ":", "c", "C:", "con", "nul", "COM1", " ", "\0", "a", "model", ".txt", "é", "~", "$", "\u202e", "//", "\n"]
names = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))


@settings(max_examples=1500)
@given(name=names)
def test_accepted_names_stay_below_their_folder_everywhere(name: str) -> None:
    try:
        check_name(name, "a test")
    except UnsafeCheckpoint:
        return
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
    for path in (posix, windows):
        assert not path.is_absolute()
        assert not path.anchor
        assert not path.drive
        assert ".." not in path.parts
    assert posix.parts == windows.parts == tuple(name.split("/"))
    assert not any(part != part.rstrip(". ") for part in windows.parts)


WANTED = ["*.safetensors", "config.json"]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "..\\config.json", "/config.json", "a/con.safetensors", "../../evil.py", "x\ny.py"]
)
def test_listing_with_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match="the repository 'org/model' names the file"):
        check_listing(["config.json", name], WANTED, "org/model")


def test_odd_names_of_files_that_nobody_fetches_pass() -> None:
    check_listing(["config.json", "figures/what?.png", "aux.py", "notes .md"], WANTED, "org/model")


def snapshot(cache: Path, *names: str) -> Path:
    """A repository in the Hub's cache, as huggingface_hub lays it out."""
    folder = cache / "models--org--model" / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    (cache / "models--org--model" / "blobs").mkdir()
    for i, name in enumerate(names):
        blob = cache / "models--org--model" / "blobs" / f"{i:064x}"
        blob.write_text(name)
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_links_of_the_hubs_cache_pass(tmp_path: Path) -> None:
    check_links(snapshot(tmp_path, "config.json", "model.safetensors", f"{TEMPLATES}/tool.jinja"), "org/model")


def test_links_inside_the_folder_pass(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.safetensors").write_text("")
    (tmp_path / "model.safetensors").symlink_to("weights/a.safetensors")
    (tmp_path / "same.safetensors").symlink_to(tmp_path / "model.safetensors")
    check_links(tmp_path, "m")


def test_folder_that_is_itself_a_link_passes(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("")
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("real")
    check_links(tmp_path / "link", "m")


OUTSIDE = {
    "absolute": "/etc/hostname",
    "up": "../secret",
    "what looks like a blob outside a cache": "../../blobs/" + "0" * 64,
    "nothing": "../not/there",
}


@pytest.mark.parametrize("target", OUTSIDE.values(), ids=OUTSIDE)
def test_link_that_leaves_the_folder_is_refused(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("")
    (folder / "vocab.txt").symlink_to(target)
    with pytest.raises(UnsafeCheckpoint, match=r"'vocab.txt' in 'm' is a link to .*, outside the checkpoint"):
        check_links(folder, "m")


@pytest.mark.parametrize(
    "target", ["../../../models--org--other/blobs/" + "0" * 64, "../../blobs/../../secret", "../../refs/main", "../../../secret"]
)
def test_link_of_the_cache_to_another_repository_is_refused(target: str, tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "config.json")
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(UnsafeCheckpoint, match=r"'model.safetensors' in 'm' is a link"):
        check_links(folder, "m")


def test_blob_that_is_a_link_itself_is_refused(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "config.json")
    blob = tmp_path / "models--org--model" / "blobs" / f"{0:064x}"
    blob.unlink()
    blob.symlink_to("/etc/hostname")
    with pytest.raises(UnsafeCheckpoint, match=r"'config.json' in 'm' is a link"):
        check_links(folder, "m")


def test_link_over_a_folder_that_leaves_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.txt").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").symlink_to("../outside")  # a folder that nobody opens
    check_links(folder, "m")
    (folder / "vocab.txt").symlink_to("sub/x.txt")
    with pytest.raises(UnsafeCheckpoint, match=r"'vocab.txt' in 'm' is a link"):
        check_links(folder, "m")


def test_folder_of_templates_that_leaves_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / TEMPLATES).symlink_to("../outside")
    with pytest.raises(UnsafeCheckpoint, match=f"'{TEMPLATES}' in 'm' is a link"):
        check_links(folder, "m")
