"""Runs: each a child process with a command line of hf-purify, one at a time, in the order in which they were asked for."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_purify.errors import ConfigError
from hf_purify.files import free_name
from hf_purify.redaction import SECRETS
from hf_purify.ui.screen import Screen

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
SUSPICIOUS = 3  # the exit code of a scan that ended well, and found something
TERMINATED = (None, 143, -signal.SIGTERM, -signal.SIGKILL)  # None: before it began; 143 and SIGTERM: after and before it was listening
KEPT = 200  # runs that are remembered
WIDTH = 100  # of the terminal of a child
GRACE = 30.0  # seconds that a run has to put away what it began


class Run:
    """One child process.

    Args:
        kind: `scan`, `repair` or `again`.
        model: what it is about, as it was filled in.
        arguments: of `hf-purify`.
        output: the folder that it writes when it ends well.
        environment, folder: of the process.
    """

    def __init__(self, kind: str, model: str, arguments: list[str], output: Path, environment: dict[str, str], folder: Path | None) -> None:
        self.name = secrets.token_urlsafe(16)  # who knows it may see the run
        self.kind, self.model, self.arguments, self.output = kind, model, arguments, output
        self.screen = Screen()
        self.code: int | None = None
        self.began: float | None = None
        self.seconds = 0.0
        self._environment, self._folder = environment, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: float | None = None  # when it was asked to stop
        self._lock = threading.Lock()
        self._over = threading.Event()

    @property
    def state(self) -> str:
        if not self._over.is_set():
            return WAITING if self.began is None else RUNNING
        if self.code == 0 or (self.code == SUSPICIOUS and self.kind != "repair"):
            return DONE
        return STOPPED if self._asked is not None and self.code in TERMINATED else FAILED

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    @property
    def stopping(self) -> bool:
        return self._asked is not None and not self.ended

    @property
    def error(self) -> str:
        """What went wrong, in the words of the command line; where it found none, what it said last."""
        return self.screen.error or "\n".join([*self.screen.lines[-12:], f"the run ended with exit code {self.code}"])

    def stop(self) -> None:
        """Ask the process to put away what it began and to end; one that waits for its turn never begins."""
        with self._lock:
            if self._asked is None:
                self._asked = time.monotonic()
                self._signal(signal.SIGTERM)
            if self.began is None:
                self._over.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end; returns whether it has come."""
        return self._over.wait(seconds)

    def work(self) -> None:
        """Run the process to its end."""
        try:
            with self._lock:
                if self._asked is not None:
                    return
                self.began = time.monotonic()
                terminal = self._start()
            try:
                self._follow(terminal)
            finally:
                os.close(terminal)
        except OSError as error:  # no process or terminal to be had
            self.screen.feed(f"error: cannot start the run: {error.strerror or error}\n".encode())
        finally:
            self.seconds = time.monotonic() - self.began if self.began is not None else 0.0
            self._over.set()

    def _start(self) -> int:
        """Start the process on a terminal of its own, since bars are drawn on terminals alone; returns our end of it."""
        ours, theirs = os.openpty()
        try:
            termios.tcsetwinsize(theirs, (24, WIDTH))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hf_purify", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=theirs,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def _follow(self, terminal: int) -> None:
        """Read what the process says until it has ended."""
        while True:
            ended = self._ended()
            readable, _, _ = select.select([terminal], [], [], 0.0 if ended else 0.2)
            data = b""
            if readable:
                with contextlib.suppress(OSError):  # on Linux the end of a terminal is an error
                    data = os.read(terminal, 65_536)
            if data:
                self.screen.feed(data)
            elif ended:
                self.screen.feed(b"", final=True)
                return
            elif readable:
                time.sleep(0.05)  # it has closed its terminal, and is about to end

    def _ended(self) -> bool:
        """Whether the process has ended; one that was asked to, and does not, is killed with all that it started."""
        with self._lock:
            if self._process is None:
                return True
            self.code = self._process.poll()
            if self.code is None and self._asked is not None and time.monotonic() - self._asked > GRACE:
                self._signal(signal.SIGKILL)
            return self.code is not None

    def _signal(self, what: signal.Signals) -> None:
        """Under the lock, which whoever reaps the process holds: until then its id is its own."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, what)


class Runs:
    """All runs of a page.

    Args:
        folder: what runs write lies below it.
        public: strangers reach the page: a run sees no secret of this machine, and stands in a folder with nothing in it.
    """

    def __init__(self, folder: Path, public: bool = False) -> None:
        self.folder, self.public = folder, public
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._turns = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run")
        self._nowhere = tempfile.TemporaryDirectory(prefix="hf-purify-") if public else None

    def start(self, kind: str, model: str, command: Callable[[Path], list[str]]) -> Run:
        """Begin a run, or let it wait for its turn.

        Args:
            command: makes the arguments, given the output folder.

        Raises:
            PurifyError: of `command`.
        """
        with self._lock:
            taken = {run.output for run in self._runs.values()}
            output = free_name(self.folder / kind, taken)
            run = Run(kind, model, command(output), output, self._environment(), Path(self._nowhere.name) if self._nowhere else None)
            for name in [n for n, r in self._runs.items() if r.ended][: max(len(self._runs) + 1 - KEPT, 0)]:
                del self._runs[name]
            self._runs[run.name] = run
        try:
            self._turns.submit(run.work)
        except RuntimeError as error:
            raise ConfigError("the page is closing; start it again") from error
        return run

    def find(self, name: object) -> Run | None:
        """The run of that name; None where it is not known, as after a restart."""
        return self._runs.get(name) if isinstance(name, str) else None

    def ahead(self, run: Run) -> int:
        """How many runs come before one that waits."""
        before = list(self._runs.values())
        return sum(not r.ended for r in before[: before.index(run)]) if run in before else 0

    def close(self) -> None:
        """Stop all runs, and wait until they have ended."""
        for run in self._runs.values():
            run.stop()
        self._turns.shutdown(wait=True)
        if self._nowhere:
            self._nowhere.cleanup()

    def _environment(self) -> dict[str, str]:
        hidden = SECRETS if self.public else ()
        return {k: v for k, v in os.environ.items() if k not in hidden} | {"NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
