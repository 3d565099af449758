"""The page without a browser: command lines, what a terminal showed, child processes and who may ask the server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from hf_purify import ui
from hf_purify.cli import app
from hf_purify.errors import ConfigError, MissingExtra, OutputError
from hf_purify.ui import commands, runs, screen
from hf_purify.ui.commands import KnownTrigger, Request

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")

OUT = Path("/out")


class TestCommands:
    def test_scan(self) -> None:
        request = Request(" me/net ", "me/data ", 50, "train", "cpu").checked(public=False)
        given = commands.scan(request, OUT, "me/more")
        options = ["--clean=me/data", "--samples=50", "--split=train", "--device=cpu", "--output=/out", "--suspects=me/more"]
        assert given == ["scan", *options, "--", "me/net"]

    def test_repair(self) -> None:
        known = KnownTrigger("me/test", "badnets:size=4", 0, "all-to-one").arguments(public=False)
        assert known == ["--test=me/test", "--trigger=badnets:size=4", "--target=0", "--rule=all-to-one"]
        given = commands.purify(Request("net", "data"), OUT, "nft", "lr=0.1\n\n steps=3 ", known, Path("/scan"), controls=False)
        assert given[:6] == ["purify", "--clean=data", "--output=/out", "--method=nft", "--option=lr=0.1", "--option=steps=3"]
        assert given[6:] == [*known, "--from-scan=/scan", "--no-controls", "--", "net"]

    @pytest.mark.parametrize("name", ["--help", "-o", "--output=/etc", "a; rm -rf /", "$(id)", "a b"])
    def test_nothing_filled_in_becomes_an_option(self, name: str, tmp_path: Path) -> None:
        """The command takes it for the name that it is, and does not find it."""
        given = commands.purify(Request(name, name).checked(public=False), tmp_path / "out", "random_mask", controls=False)
        done = CliRunner().invoke(app, [*given[:1], "--device=cpu", *given[1:]])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert name.strip() in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request("", "data"), "no model given; expected a checkpoint folder"),
            (Request("net", "  "), "no data given; expected a data set"),
            (Request("net", "data", 0), "clean samples: expected at least 1, got 0"),
            (Request("net\n--help", "data"), "control characters"),
            (Request("a\0b", "data"), "control characters"),
        ],
    )
    def test_what_cannot_be_run(self, request_: Request, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            request_.checked(public=False)

    def test_trigger_without_test_data(self) -> None:
        assert KnownTrigger().arguments(public=False) == []
        with pytest.raises(ConfigError, match="measured on labelled test data"):
            KnownTrigger(trigger="badnets").arguments(public=False)

    @pytest.mark.parametrize(
        "name", ["/etc/passwd", "../up", "~/net", "./net", "a/../b", "a/b/c", "https://evil.org/a", "file:///a", "-x", "é/b"]
    )
    def test_strangers_name_no_files(self, name: str) -> None:
        assert Request("me/net", "hf-internal-testing/data.v1").checked(public=True).model == "me/net"
        with pytest.raises(ConfigError, match="expected a name on the Hub"):
            Request(name, "me/data").checked(public=True)
        with pytest.raises(ConfigError, match="expected a name on the Hub"):
            Request("me/net", name).checked(public=True)
        with pytest.raises(ConfigError, match="expected a name on the Hub"):
            commands.scan(Request("me/net", "me/data"), OUT, name, public=True)
        with pytest.raises(ConfigError, match="expected a name on the Hub"):
            KnownTrigger(name).arguments(public=True)


class TestScreen:
    SAID = (
        b"warning: odd\r\n\rNFT:   0%|          | 0/40 [00:00<?, ?it/s]\rNFT:  55%|#####5    | 22/40 [00:01<00:01, 17.45it/s]"
        b"\r                      \rerror: first\r\n  second line\r\nlast\r\n"
    )

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    def test_in_pieces_of_any_size(self, size: int) -> None:
        shown, bars = screen.Screen(), []
        for start in range(0, len(self.SAID), size):
            shown.feed(self.SAID[start : start + size])
            bars.append(shown.bar and (shown.bar.title, shown.bar.percent))
        shown.feed(b"", final=True)
        assert shown.lines == ["warning: odd", "error: first", "  second line", "last"]
        assert shown.error == "first\nsecond line"
        assert shown.bar is None
        if size < 10:
            assert ("NFT", 0) in bars
            assert ("NFT", 55) in bars
            assert bars[-1] is None

    def test_bar_of_tqdm(self) -> None:
        """As the installed tqdm draws it on a terminal."""
        code = "import sys, tqdm\nbar = tqdm.tqdm(total=8, desc='read it', file=sys.stderr, ascii=False)\nbar.update(2); bar.refresh()\nimport os; os._exit(0)"
        env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}  # which commands with --json set
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env).stderr
        shown = screen.Screen()
        shown.feed(said)
        assert shown.bar is not None
        assert (shown.bar.title, shown.bar.percent) == ("read it", 25)
        assert shown.bar.detail.startswith("2/8 [")

    def test_no_token_and_no_escape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
        shown = screen.Screen()
        shown.feed(f"error: \x1b[31mhf_{'a' * 34}\x1b[0m \u202eevil\n".encode() + b"\xff\xfe\n")
        shown.feed(f"hf_{'a' * 34}:  10%|#   | 1/10".encode())
        assert shown.error == "[hidden]  evil"
        assert shown.bar is not None
        assert shown.bar.title == "[hidden]"

    def test_endless_line_is_bounded(self) -> None:
        shown = screen.Screen()
        for _ in range(40):
            shown.feed(b"x" * 10_000)
        for number in range(screen.LINES + 50):
            shown.feed(f"{number}\n".encode())
        assert len(shown.lines) == screen.LINES
        assert len(shown._pending) <= screen.LONGEST


@pytest.fixture
def made(tmp_path: Path) -> Iterator[runs.Runs]:
    made = runs.Runs(tmp_path / "work")
    (tmp_path / "work").mkdir()
    yield made
    made.close()


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a Python program stand for hf-purify in the children."""

    def write(code: str) -> None:
        folder = tmp_path / "standin" / "hf_purify"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "__main__.py").write_text(f"import os, signal, sys, time\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))

    return write


def until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


class TestRuns:
    def test_bars_and_log_reach_us(self, made: runs.Runs, scripted: Any) -> None:
        scripted(
            "from tqdm import tqdm\nprint('unseen')\nprint('read', sys.argv[1:], file=sys.stderr)\n"
            "bar = tqdm(total=4, desc='learn', disable=None)\nbar.update(3); bar.refresh()\n"
            "while not os.path.exists(sys.argv[1]): time.sleep(0.02)\nbar.close()"
        )
        run = made.start("repair", "net", lambda out: [str(out), "a b"])
        until(lambda: run.screen.bar is not None)
        assert (run.state, run.screen.bar.title, run.screen.bar.percent) == (runs.RUNNING, "learn", 75)
        run.output.touch()
        assert run.wait(30)
        assert (run.state, run.code) == (runs.DONE, 0)
        assert run.screen.lines[0] == f"read ['{run.output}', 'a b']"
        assert run.screen.bar is None

    @pytest.mark.parametrize(("kind", "state"), [("scan", runs.DONE), ("again", runs.DONE), ("repair", runs.FAILED)])
    def test_what_exit_code_3_means(self, made: runs.Runs, scripted: Any, kind: str, state: str) -> None:
        scripted("sys.exit(3)")
        run = made.start(kind, "net", lambda out: [])
        assert run.wait(30)
        assert run.state == state

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("print('error: no such model', file=sys.stderr); sys.exit(2)", "no such model"),
            ("sys.stderr.write('Traceback\\nValueError: x\\n'); sys.exit(1)", "Traceback\nValueError: x\nthe run ended with exit code 1"),
            ("os.kill(os.getpid(), signal.SIGKILL)", "the run ended with exit code -9"),
        ],
    )
    def test_failure_in_its_own_words(self, made: runs.Runs, scripted: Any, code: str, said: str) -> None:
        scripted(code)
        run = made.start("repair", "net", lambda out: [])
        assert run.wait(30)
        assert (run.state, run.error) == (runs.FAILED, said)

    def test_stop_ends_the_process_and_what_it_started(self, made: runs.Runs, scripted: Any) -> None:
        scripted(
            "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nprint(child.pid, file=sys.stderr, flush=True)\ntime.sleep(600)"
        )
        run = made.start("repair", "net", lambda out: [])
        until(lambda: run.screen.lines)
        child = psutil.Process(int(run.screen.lines[0]))
        run.stop()
        assert run.wait(30)
        assert (run.state, run.code) == (runs.STOPPED, 143)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)

    def test_one_that_does_not_listen_is_killed(self, made: runs.Runs, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "GRACE", 0.2)
        scripted("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', file=sys.stderr, flush=True)\ntime.sleep(600)")
        run = made.start("repair", "net", lambda out: [])
        until(lambda: run.screen.lines)
        run.stop()
        assert run.wait(30)
        assert (run.state, run.code) == (runs.STOPPED, -signal.SIGKILL)

    def test_they_take_turns(self, made: runs.Runs, scripted: Any) -> None:
        scripted("time.sleep(600) if sys.argv[1] == 'long' else None")
        first, second, third = (made.start("scan", "net", lambda out, what=what: [what]) for what in ("long", "short", "short"))
        until(lambda: first.state == runs.RUNNING)
        assert (second.state, made.ahead(second), made.ahead(third)) == (runs.WAITING, 1, 2)
        assert [r.output.name for r in (first, second, third)] == ["scan", "scan-2", "scan-3"]
        second.stop()
        assert (second.state, made.ahead(third)) == (runs.STOPPED, 1), "at once, not when its turn comes"
        first.stop()
        assert third.wait(30)
        assert (first.state, second.state, third.state) == (runs.STOPPED, runs.STOPPED, runs.DONE)
        assert second.began is None
        assert made.find(third.name) is third
        assert made.find({"not": "a name"}) is None

    def test_closing_stops_all(self, tmp_path: Path, scripted: Any) -> None:
        scripted("time.sleep(600)")
        made = runs.Runs(tmp_path)
        begun, waits = made.start("scan", "net", lambda out: []), made.start("scan", "net", lambda out: [])
        until(lambda: begun.state == runs.RUNNING)
        made.close()
        assert (begun.state, waits.state) == (runs.STOPPED, runs.STOPPED)
        with pytest.raises(ConfigError, match="the page is closing"):
            made.start("scan", "net", lambda out: [])

    def test_strangers_runs_see_no_secret_and_no_file(self, tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
        scripted("print(os.environ.get('HF_TOKEN', 'none'), os.listdir(), file=sys.stderr)")
        made = runs.Runs(tmp_path, public=True)
        run = made.start("scan", "net", lambda out: [])
        assert run.wait(30)
        made.close()
        assert run.screen.lines == ["none []"]


def test_a_real_command_that_is_stopped_leaves_nothing(made: runs.Runs, tmp_path: Path) -> None:
    """Early, while it imports; and an error comes in the words of the command line."""
    run = made.start("repair", "net", lambda out: commands.purify(Request(str(tmp_path / "none"), "data"), out, "nft"))
    assert run.wait(90)
    assert run.state == runs.FAILED
    assert str(tmp_path / "none") in run.error
    assert "exit code" not in run.error
    early = made.start("repair", "net", lambda out: commands.purify(Request(str(tmp_path / "none"), "data"), out, "nft"))
    until(lambda: early.state == runs.RUNNING)
    early.stop()
    assert early.wait(60)
    assert early.state == runs.STOPPED
    assert list(made.folder.iterdir()) == []


class TestGate:
    @pytest.mark.parametrize(
        ("method", "site", "passes"),
        [
            ("POST", b"same-origin", True),
            ("POST", None, True),
            ("GET", b"cross-site", True),
            ("POST", b"cross-site", False),
            ("POST", b"same-site", False),
            ("DELETE", b"cross-site", False),
        ],
    )
    def test_other_pages_change_nothing(self, method: str, site: bytes | None, passes: bool) -> None:
        from hf_purify.ui.gate import OwnPageOnly

        reached, answers = [], []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope)

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "method": method, "headers": [(b"sec-fetch-site", site)] if site else []}
        asyncio.run(OwnPageOnly(inner)(scope, None, send))
        assert bool(reached) == passes
        assert [a.get("status") for a in answers] == ([] if passes else [403, None])


class TestServe:
    def test_without_gradio(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(MissingExtra, match=r"pip install 'hf-purify\[ui\]'"), ui.serve(tmp_path / "work"):
            pass
        assert list((tmp_path / "work").iterdir()) == []

    def test_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="name another folder"), ui.serve(tmp_path / "file" / "work"):
            pass

    def test_the_package_alone_does_not_import_gradio(self) -> None:
        code = "import sys, hf_purify, hf_purify.cli, hf_purify.ui; print('gradio' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"
