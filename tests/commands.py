"""Programs: the command line, called as a user would, and Python without hf-purify."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from hf_purify.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def elsewhere(code: str, folder: Path | None = None) -> str:
    """What a Python program prints that runs in a process of its own, without hf-purify.

    Args:
        folder: where it runs.
    """
    code += "\nimport sys\nassert not [m for m in sys.modules if m.startswith('hf_purify')]\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def launch(
    processes: int, *arguments: object, module: str | None = None, config: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A program on so many processes of the CPU, as `accelerate launch` starts them; without `ACCELERATE_USE_CPU`, it starts one.

    Args:
        config: of accelerate; one without any sharding if not given.
        variables: of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    many = ["--main_process_port", str(port)] if processes > 1 else ["--cpu"]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    how = plain if config is None else ["--config_file", str(config)]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *how, *many, "--num_processes", str(processes)]
    command += [*(["-m", module] if module else []), *map(str, arguments)]
    tests = str(Path(__file__).parent)
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": tests, "COLUMNS": "200"} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=180)
