"""Many checkpoints: one job for each model of a list, each in a process of its own.

sweep(models, settings):
    jobs      <- a recipe for each line, and a folder named after its model and a digest of its settings
    at most `workers` at once; a folder that has a report is not run again; one that fails leaves its message, and the others go on
    table     <- a row for each line: sweep.parquet, sweep.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from hf_purify.errors import ConfigError, PurifyError, unknown
from hf_purify.files import replace_text, replacing
from hf_purify.recipe import MeasureRecipe, PurifyRecipe, Recipe
from hf_purify.redaction import redacted
from hf_purify.registry import make_method
from hf_purify.rendering import template
from hf_purify.specs import read_pairs

DONE, FAILED, MISSING = "done", "failed", "missing"
KINDS: dict[str, type[Recipe]] = {"purify": PurifyRecipe, "measure": MeasureRecipe}


@dataclass(frozen=True)
class Job:
    """One line of the list.

    Args:
        kind: `purify` or `measure`.
        recipe: everything that the job needs; its output is the job's folder.
        name: of the folder: the model's, and a digest of the settings.
        out: folder of the sweep.
    """

    kind: str
    recipe: Recipe
    name: str
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def failure(self) -> Path:
        return self.out / "jobs" / f"{self.name}.failed.json"

    @property
    def status(self) -> str:
        if (self.folder / "report.json").is_file():
            return DONE
        return FAILED if self.failure.is_file() else MISSING


def sweep_models(
    models: Path,
    out: Path,
    kind: str,
    preset: Path | None,
    settings: dict[str, Any],
    *,
    workers: int = 1,
    only: int | None = None,
    collect: bool = False,
) -> list[dict[str, Any]]:
    """Run the jobs of a list that are missing, and write the table.

    Args:
        models: the list, see `read_jobs`.
        out: folder for the results.
        kind: `purify` or `measure`.
        preset: a recipe for all jobs, which `settings` override, and a line's own settings those.
        workers: jobs at once.
        only: run this one job, from 1, and write no table: for array jobs of a cluster.
        collect: run nothing.

    Returns:
        The rows of the table, or of the one job.

    Raises:
        ConfigError: the list is none, or has no such job.
    """
    if kind not in KINDS:
        raise unknown("job", kind, KINDS)
    jobs = read_jobs(models, out, kind, preset, settings)
    if only is not None and only > len(jobs):
        raise ConfigError(f"there are {len(jobs)} jobs in '{models}', and number {only} was asked for (--only)")
    if only is not None:
        run_jobs(jobs[only - 1 : only])
        return [row(jobs[only - 1])]
    try:
        run_jobs([] if collect else jobs, workers)
    finally:
        rows = write_table(jobs, out)
    return rows


def read_jobs(models: Path, out: Path, kind: str, preset: Path | None, settings: dict[str, Any]) -> list[Job]:
    """The jobs of a list: a model a line, with settings of its own behind it as `key=value`; `#` begins a comment.

    Raises:
        ConfigError: the list cannot be read or is empty, or a line is no job.
    """
    try:
        lines = models.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the list of models '{models}': {error}") from error
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, 1):
        try:
            model, *own = shlex.split(line, comments=True) or [""]
            if not model:
                continue
            merged = {**settings, **read_pairs(own), "model": model, "output": str(out)}
            made = KINDS[kind].read(preset, **merged) if preset else KINDS[kind].make(**merged)
            _check_open(made)
            if isinstance(made, PurifyRecipe):
                make_method(made.method, **made.options)
        except (PurifyError, ValueError) as error:
            raise ConfigError(f"line {number} of '{models}': {error}") from error
        plain = yaml.safe_dump({k: v for k, v in made.to_dict().items() if k != "output"}, sort_keys=False, allow_unicode=True)
        digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '--', model).strip('.-')[-80:]}-{digest}"
        jobs[name] = Job(kind, dataclasses.replace(made, output=str(out / name)), name, out)
    if not jobs:
        raise ConfigError(f"the list '{models}' names no model; expected one a line")
    return list(jobs.values())


def _check_open(recipe: Recipe) -> None:
    """Raises ConfigError for settings that hold a token or a password: those of a job are written to its file."""
    if redacted(text := str(vars(recipe))) != text:
        raise ConfigError("its settings hold a token or a password, and a sweep writes them to files: log in, or set HF_TOKEN, instead")


def run_jobs(jobs: Sequence[Job], workers: int = 1) -> None:
    """Run the jobs that have no report, at most `workers` at once; when this is interrupted, they are stopped, too."""
    missing = [job for job in jobs if job.status != DONE]
    running: dict[str, subprocess.Popen] = {}
    stop, lock = threading.Event(), threading.Lock()

    def one(job: Job) -> None:
        recipe = job.out / "jobs" / f"{job.name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        replace_text(recipe, job.recipe.to_yaml())
        command = [sys.executable, "-m", "hf_purify", job.kind, "--recipe", str(recipe), "--json"]
        log = recipe.with_suffix(".log")
        with log.open("wb") as said:
            with lock:
                if stop.is_set():
                    return
                running[job.name] = process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
            code = process.wait()
        with lock:
            del running[job.name]
        if stop.is_set():
            return
        if code:
            replace_text(job.failure, json.dumps({"exit_code": code, "message": _last_words(log)}))
        else:
            job.failure.unlink(missing_ok=True)

    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="sweep", delay=1.0)
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(one, job) for job in missing]):
            done.result()
            bar.update()
    except BaseException:
        with lock:
            stop.set()
            for process in running.values():
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _last_words(log: Path) -> str:
    """What a job said of its failure."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return (told or lines or ["it said nothing"])[-1].removeprefix("error: ")


def row(job: Job) -> dict[str, Any]:
    """What became of a job: figures before and after with the first trigger, and what the method took for suspicious."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {"model": str(job.recipe.model), "status": job.status, "folder": job.name}
    if job.status == FAILED:
        failure = json.loads(job.failure.read_text("utf-8"))
        return found | {"message": failure["message"], "exit_code": failure["exit_code"]}
    if job.status == MISSING:
        return found
    report = json.loads((job.folder / "report.json").read_text("utf-8"))
    before, *others = report["rows"]
    after = others[0] if others else None
    trigger = next(iter(before["asr"]), None)
    for name, line in (("before", before), ("after", after)):
        if line is None:
            continue
        accuracy, asr = line["clean_accuracy"], line["asr"].get(trigger)
        found[f"accuracy_{name}"] = accuracy and accuracy["value"]
        found |= (
            {f"asr_{name}": asr["value"], f"asr_{name}_low": asr["low"], f"asr_{name}_high": asr["high"], "asr_n": asr["n"]} if asr else {}
        )
    if after is not None:
        suspicious = [str(v) for k, v in after["notes"].items() if k.endswith("suspicious class")]
        found |= {
            "method": after["name"],
            "seconds": after["seconds"],
            "der": after["der"].get(trigger),
            "suspicious": "; ".join(suspicious) or None,
        }
    return found | {"trigger": trigger, "exit_code": 0}


COLUMNS: dict[str, str] = {
    "model": "string",
    "status": "string",
    "method": "string",
    "accuracy_before": "float64",
    "accuracy_after": "float64",
    "trigger": "string",
    "asr_before": "float64",
    "asr_before_low": "float64",
    "asr_before_high": "float64",
    "asr_after": "float64",
    "asr_after_low": "float64",
    "asr_after_high": "float64",
    "asr_n": "int64",
    "der": "float64",
    "suspicious": "string",
    "seconds": "float64",
    "message": "string",
    "exit_code": "int64",
    "folder": "string",
}


def write_table(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """Write `sweep.parquet` and `sweep.html` of all jobs; gives the rows."""
    import datasets

    rows = [row(job) for job in jobs]
    out.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({name: datasets.Value(kind) for name, kind in COLUMNS.items()})
    with replacing(out / "sweep.parquet") as work:
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(work))
    counts = {status: sum(r["status"] == status for r in rows) for status in (DONE, FAILED, MISSING)}
    replace_text(out / "sweep.html", template("sweep.html.j2").render(rows=rows, counts=counts))
    return rows
