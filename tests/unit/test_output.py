"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_purify.errors import OutputError
from hf_purify.output import folder, recorded_backdoor, versions


def fill(out: Path, text: str = "new") -> None:
    (out / "sub").mkdir()
    (out / "sub" / "file.txt").write_text(text)


def tree(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_folder_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with folder(str(final), overwrite=False) as work:
        assert work is not None
        fill(work)
        assert not final.exists()
        assert work.parent == final.parent, "a rename within one file system"
    assert tree(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/file.txt"]
    assert stat.S_IMODE(final.stat().st_mode) == 0o755


def test_no_output_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with folder(None, overwrite=False) as work:
        assert work is None
    assert tree(tmp_path) == []


@pytest.mark.parametrize("stop", [RuntimeError("power"), KeyboardInterrupt(), SystemExit(1)], ids=["error", "Ctrl-C", "exit"])
def test_nothing_is_left_of_an_interrupted_job(tmp_path: Path, stop: BaseException) -> None:
    def job() -> None:
        with folder(str(tmp_path / "out"), overwrite=False) as work:
            assert work is not None
            fill(work)
            raise stop

    with pytest.raises(type(stop)):
        job()
    assert tree(tmp_path) == []


def test_what_a_killed_process_left_is_swept_away_and_what_others_write_stays(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    names = {
        "killed": f".out.{platform.node()}-{ended.stdout.strip()}.abc",
        "alive": f".out.{platform.node()}-{os.getpid()}.abc",
        "of another machine": f".out.elsewhere-{ended.stdout.strip()}.abc",
        "of another output": f".outer.{platform.node()}-{ended.stdout.strip()}.abc",
    }
    for name in names.values():
        fill_later = tmp_path / name
        fill_later.mkdir()
        fill(fill_later)
    with folder(str(tmp_path / "out"), overwrite=False):
        pass
    assert {f.name for f in tmp_path.iterdir()} == {"out", *names.values()} - {names["killed"]}


def test_existing_folder_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    with (
        pytest.raises(OutputError, match=r"exists; choose another name, or replace it with overwrite=True \(--overwrite\)"),
        folder(str(final), False),
    ):
        pytest.fail("the job must not start")
    assert tree(tmp_path) == ["out"]


def test_existing_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="exists"), folder(str(tmp_path / "out"), False):
        pytest.fail("the job must not start")
    assert (tmp_path / "out").read_text() == "mine"


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old.txt").write_text("old")
    with folder(str(final), overwrite=True) as work:
        assert work is not None
        fill(work)
        assert tree(final) == ["old.txt"]
    assert tree(tmp_path) == ["out", "out/sub", "out/sub/file.txt"]


@pytest.mark.parametrize("stop", [RuntimeError("power"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_failed_replacement_keeps_the_old_folder(tmp_path: Path, stop: BaseException) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old.txt").write_text("old")

    def job() -> None:
        with folder(str(final), overwrite=True) as work:
            assert work is not None
            fill(work)
            raise stop

    with pytest.raises(type(stop)):
        job()
    assert tree(tmp_path) == ["out", "out/old.txt"]


def test_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old.txt").write_text("old")
    rename, calls = os.rename, []

    def failing(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)

    def job() -> None:
        with folder(str(final), overwrite=True) as work:
            assert work is not None
            fill(work)

    with pytest.raises(OutputError, match="Input/output error; nothing was left half-written"):
        job()
    assert tree(tmp_path) == ["out", "out/old.txt"]


def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    def job() -> None:
        with folder(str(tmp_path / "out"), overwrite=False) as work:
            assert work is not None
            fill(work)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device; nothing was left half-written"):
        job()
    assert tree(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match=r"cannot write to '.*': Permission denied"), folder(str(tmp_path / "out"), False):
            pytest.fail("the job must not start")
    finally:
        tmp_path.chmod(0o755)


def test_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), folder(str(tmp_path / "file" / "out"), False):
        pytest.fail("the job must not start")


def test_recorded_backdoor(tmp_path: Path) -> None:
    assert recorded_backdoor(tmp_path) is None
    for content, found in (("no json", None), ("[1]", None), ("{}", None), ('{"hf_purify_backdoor": {"target": 3}}', {"target": 3})):
        (tmp_path / "config.json").write_text(content)
        assert recorded_backdoor(tmp_path) == found


def test_versions_name_what_matters() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "hf-purify"} <= set(found)
    assert all(v[0].isdigit() for v in found.values())
