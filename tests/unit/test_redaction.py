"""Tokens are hidden wherever a text leaves, and ordinary words stay."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path

import pytest

from hf_purify.cli.shield import shield_logs
from hf_purify.errors import ConfigError, UnknownName
from hf_purify.output import command
from hf_purify.recipe import PurifyRecipe
from hf_purify.redaction import HIDDEN, lines, one_line, redacted
from hf_purify.report import Report
from hf_purify.rows import Row

TOKEN = "hf_" + "Ab1" * 11
LETTERS = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"

SECRETS = {
    "a token": (f"got {TOKEN}, no more", TOKEN),
    "a token of letters": (f"({LETTERS})", LETTERS),
    "an old token": (f"api_org_{'x1' * 10}", "x1x1"),
    "a token of an application": (f"hf_oauth_{'a.b-' * 8}", "a.b-"),
    "an assignment": (f"HF_TOKEN={TOKEN}", TOKEN),
    "in a file name": (f"/tmp/x_{TOKEN}.yaml", TOKEN),
    "user and password": ("https://me:s3cret@host/me/x", "s3cret"),
    "a password with an at": ("https://me:s3@cret@host/me/x", "cret"),
    "a user alone": ("https://s3cret@host", "s3cret"),
    "a query": ("https://host/x?a=1&token=s3cret&b=2", "s3cret"),
    "an access token": ("https://host/x?access_token=s3cret", "s3cret"),
    "a fragment": ("https://host/x#access_token=s3cret", "s3cret"),
    "a signed address": ("https://host/x?X-Amz-Signature=s3cret&X-Amz-Credential=s3cret", "s3cret"),
    "a query in HTML": ("https://host/x?a=1&amp;token=s3cret", "s3cret"),
    "a header": ("{'Authorization': 'Bearer s3cret'}", "s3cret"),
    "a bearer": ("curl -H bearer s3cret-and-more", "s3cret"),
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
def test_secrets_are_hidden(text: str, secret: str) -> None:
    assert secret not in redacted(text)
    assert HIDDEN in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf_purify_backdoor",
        "hf_hub_download(repo_id)",
        "hf://datasets/me/cats@main/a.png",
        "https://huggingface.co/me/cats?revision=main",
        "the bearer of bad news; Bearer bonds",
        "options.token_length=3 max_tokens=5",
        "me@host.org wrote https://host.org/a",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"])
def test_values_of_the_environment_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "opensesame+please")
    assert redacted("say opensesame+please or opensesame%2Bplease") == f"say {HIDDEN} or {HIDDEN}"
    monkeypatch.setenv(name, "short")
    assert redacted("a short word") == "a short word"


def test_what_a_login_stored_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redacted("opensesame") == "opensesame"
    (tmp_path / "token").write_text("opensesame\n")
    assert redacted("opensesame") == HIDDEN


def test_errors_hold_no_token() -> None:
    error = UnknownName(f"unknown model '{TOKEN}'")
    assert str(error) == f"unknown model '{HIDDEN}'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert TOKEN not in repr(ConfigError(TOKEN, 3))


def test_recipes_are_written_without_tokens_and_used_with_them() -> None:
    address = f"https://me:{TOKEN}@host/me/x"
    recipe = PurifyRecipe.make(model=address, clean=address, options={"a": address}, triggers=[f"badnets:a={TOKEN}"])
    assert recipe.model == address
    for written in (recipe.to_yaml(), str(recipe.to_dict()), command(recipe)):
        assert TOKEN not in written
        assert HIDDEN in written


def test_command_of_a_report_is_one_command() -> None:
    assert command(PurifyRecipe.make(model="x; rm -rf ~", clean="c")).startswith("hf-purify purify 'x; rm -rf ~' --clean c")


def test_reports_hold_no_token() -> None:
    row = Row(TOKEN, "method", asr={}, notes={TOKEN: TOKEN})
    facts = {TOKEN: [TOKEN, {"a": TOKEN}]}
    report = Report(TOKEN, TOKEN, facts, facts, {"name": TOKEN}, [Row("none", "unrepaired"), row], command=TOKEN, warnings=[TOKEN])
    for text in (report.to_json(), report.to_html(), report.to_markdown()):
        assert HIDDEN in text
        assert TOKEN not in text


CONTROLS = {
    "colour": "a\x1b[31mb",
    "title": "a\x1b]0;x\x07b",
    "link": "a\x1b]8;;http://x\x1b\\b",
    "one byte": "a\x9b31mb",
    "return": "a\rb",
    "bell and backspace": "a\x07\x08b",
    "right to left": "a\u202eb",
    "isolates": "a\u2066b\u2069",
    "zero width": "a\u200bb",
    "separator of lines": "a\u2028b",
    "half a character": "a\ud800b",
}


@pytest.mark.parametrize("text", CONTROLS.values(), ids=CONTROLS)
def test_what_steers_is_taken_out(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable()
    assert shown[0] == "a"
    assert "b" in shown


def test_lines_cannot_pass_for_others() -> None:
    assert lines("error: a\nwritten to /tmp\r\x1b[2J", indent="  ") == "error: a\n  written to /tmp  [2J"
    assert one_line("café 猫 🐈") == "café 猫 🐈"


def test_logs_and_warnings_pass_the_shield(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    shield_logs()
    shield_logs()
    log = logging.getLogger("another.package")
    try:
        raise ValueError(TOKEN)
    except ValueError:
        log.exception("cannot fetch %s\x1b[2J", TOKEN)
    log.warning("%d arguments too few: %s", 1, "a")
    assert TOKEN not in caplog.text
    assert "\x1b" not in caplog.text
    assert f"cannot fetch {HIDDEN} [2J" in caplog.text
    assert f"ValueError: {HIDDEN}" in caplog.text
    assert "1 arguments too few: a" in caplog.text
    assert TOKEN not in warnings.formatwarning(f"bad {TOKEN}", UserWarning, "a.py", 1, "")
