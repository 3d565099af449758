"""A repair that is killed at random points, so often, and then left to end; beside it one that is not.

python tests/kills.py VICTIM DATA FOLDER KILLS

Everything is imported once, and each run is a fork of it: what is killed is the job, not the import of libraries.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

EVERY = 2


def settings(victim: str, data: str, out: Path) -> list[str]:
    options = ["--option", "ft_sam.batch_size=20", "--option", "ft_sam.epochs=20", "--option", "rnp.recover_epochs=10"]
    chosen = ["-m", "rnp+ft_sam", *options, "-n", "200", "--no-controls", "--checkpoint-every", str(EVERY), "--device", "cpu", "--json"]
    return ["purify", victim, "--clean", f"{data}/train.parquet", "-o", str(out), *chosen]


def child(arguments: list[str], log: Path) -> None:
    """Run the command, and note each step that a training takes."""
    import contextlib

    from hf_purify.cli import app
    from hf_purify.resuming import _Kept

    before = _Kept.step

    def step(self: Any, number: int, state: Any) -> None:
        with log.open("a") as out:
            out.write(f"{self.progress.number} {number}\n")
        before(self, number, state)

    _Kept.step = step  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            app(arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
    os._exit(0)


def warm_up(victim: str, data: str) -> None:
    """Import all that a run does. No gradients: torch's engine would not bear the fork."""
    from hf_purify.purifier import measure

    measure(victim, f"{data}/test.parquet", device="cpu", test_samples=20)


def steps(log: Path) -> list[tuple[int, int]]:
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    return [(int(a), int(b)) for a, b in (line.split() for line in lines if line.count(" ") == 1)]


def main(victim: str, data: str, folder: Path, kills: int) -> None:
    warm_up(victim, data)
    draw = random.Random(0)
    killed, resumed, lost, half = 0, 0, 0, []
    for out in (folder / "once", folder / "killed"):
        while not out.exists():
            log = folder / "steps.log"
            log.unlink(missing_ok=True) if out.name == "once" else None
            before = steps(log) if out.name == "killed" else []
            job = os.fork()
            if job == 0:
                child(settings(victim, data, out), log)
            if out.name == "killed" and killed < kills:
                if killed % 5:  # most of them in the midst of a training; the others anywhere
                    while len(steps(log)) <= len(before) + EVERY and os.waitid(os.P_PID, job, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                        time.sleep(0.01)
                time.sleep(draw.uniform(0.0, 0.15))
                os.kill(job, draw.choice([signal.SIGKILL, signal.SIGTERM]))
                killed += 1
            _, status = os.waitpid(job, 0)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM, 143):
                sys.exit(f"the job ended with {code}")
            if out.exists() and not (out / "report.json").is_file():
                half.append(out.name)
            after = steps(log)[len(before) :]
            if before and after and out.name == "killed":
                # in the same training: from which step it went on, beside the last that was taken
                (stage, last), (again, first) = before[-1], after[0]
                resumed += stage == again and first > 1
                lost = max(lost, last - first + 1 if stage == again else 0)
        (folder / "steps.log").unlink(missing_ok=True)
    seen = {"kills": killed, "resumed": resumed, "lost": lost, "every": EVERY, "half_written": half}
    (folder / "seen.json").write_text(json.dumps(seen), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
