"""Throughput on several processes: the library's loop beside plain data-parallel fine-tuning in the same processes.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/processes.py --output benchmarks/results/processes-cpu.json

A ResNet-18 with the stem of CIFAR, random images of 32 pixels, one global batch size whatever the number of processes. The plain side is
torch's `DistributedDataParallel` with SGD, each process with its share of the batch and the statistics of that share; the library's
batch norms see the whole batch, at the cost of two exchanges a norm. Both sides take turns. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timing import CLASSES, context, finish, interleaved, machine, network, ratio, summary, table
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.loop import TrainConfig, train
from hf_purify.routines import tune_mask

BOUND = 1.3  # of fine-tuning, over plain fine-tuning on as many processes
SIDES = ("plain fine-tuning", "fine-tuning", "fine-tuning, norms at rest", "mask tuning")


class Images:
    """Random images that are made when they are asked for."""

    lengths = None

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) % CLASSES
        self.pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[indices], "labels": self.labels[indices]}


def plain(model: nn.Module, data: Images, batch: int, steps: int, accelerator: Accelerator) -> None:
    """Data-parallel fine-tuning as torch has it."""
    world, rank = accelerator.num_processes, accelerator.process_index
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        mine = torch.randint(len(data), (batch,), generator=generator).tensor_split(world)[rank]
        part = data.batch(mine)
        F.cross_entropy(wrapped(part["pixel_values"]), part["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def work(batch: int, steps: int, repeats: int, out: Path) -> None:
    """One process of several: every side in turns."""
    accelerator = Accelerator(cpu=True)
    data = Images(512)
    models = {side: network("cifar") for side in SIDES}
    contexts = {side: context(models[side], data.pixels[:2], CLASSES, data, data, accelerator) for side in SIDES}
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch, "replacement": True, "lr": 1e-3, "augment": False}

    def tuned(side: str, mode: str) -> None:
        train(contexts[side], models[side].parameters(), TrainConfig(**settings, mode=mode))

    def masks() -> None:
        tune_mask(contexts[SIDES[3]], contexts[SIDES[3]].neurons(), TrainConfig(**settings, mode="train"))

    calls = {
        SIDES[0]: lambda: plain(models[SIDES[0]], data, batch, steps, accelerator),
        SIDES[1]: lambda: tuned(SIDES[1], "train"),
        SIDES[2]: lambda: tuned(SIDES[2], "frozen_norm"),
        SIDES[3]: masks,
    }

    times = interleaved(calls, repeats, torch.device("cpu"), time.perf_counter)  # who waits for others takes no processor time
    if accelerator.is_main_process:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        out.write_text(json.dumps({"times": times, "peak_mb": round(peak, 1), "machine": machine(torch.device("cpu"))}), "utf-8")
    accelerator.end_training()


def launch(processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a launch on so many processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            __file__,
            "--work",
            str(out),
        ]
        command += ["--batch", str(given.batch), "--steps", str(given.steps), "--repeats", str(given.repeats)]
        subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
        return json.loads(out.read_text("utf-8"))


def main() -> int:
    """Measure on one, two and four processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.batch, given.steps, given.repeats, given.work)
        return 0
    settings = {"batch": given.batch, "steps": given.steps, "repeats": given.repeats}
    result: dict[str, Any] = {"benchmark": "processes", "settings": settings, "processes": {}}
    checks = []
    for processes in given.processes:
        found = launch(processes, given)
        times, base = found["times"], found["times"][SIDES[0]]
        rows = {side: {**summary(times[side]), "over_plain": ratio(times[side], base)} for side in SIDES}
        for row in rows.values():
            row["samples_per_s"] = round(given.batch * given.steps / row["median_s"], 1)
        result["machine"] = found["machine"] | {"clock": "perf_counter"}
        result["processes"][str(processes)] = {"sides": rows, "peak_mb": found["peak_mb"]}
        print(f"\n{processes} process(es), peak {found['peak_mb']} MiB each")
        print(table([[n, r["samples_per_s"], r["over_plain"]] for n, r in rows.items()], ["side", "samples/s", "/ plain"]))
        checks.append((f"fine-tuning / plain, {processes} process(es)", rows[SIDES[1]]["over_plain"], BOUND))
    return finish(result, checks, given.output)


if __name__ == "__main__":
    sys.exit(main())
