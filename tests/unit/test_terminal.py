"""What stands around commands on the terminal."""

from __future__ import annotations

import logging

import pytest
import typer

from hf_purify.cli.terminal import errors, quiet
from hf_purify.errors import ConfigError


@pytest.mark.parametrize(("world", "speaker"), [("4", "[process 2 of 4] "), ("1", "")])
def test_logs_and_errors_say_which_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: str, speaker: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "2")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    quiet(as_json=False)
    logging.getLogger("hf_purify.anything").warning("the sky falls")
    with pytest.raises(typer.Exit), errors():
        raise ConfigError("no such sky")
    said = capsys.readouterr().err
    assert f"{speaker}the sky falls\n" in said
    assert f"{speaker}error: no such sky\n" in said


def test_what_was_noted_on_the_way_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    reason = KeyboardInterrupt()
    reason.add_note("the same command goes on")
    with pytest.raises(typer.Exit) as end, errors():
        raise reason
    assert end.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted; nothing was left half-written; the same command goes on\n"
