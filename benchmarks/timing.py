"""What the benchmarks share: machine facts, interleaved timing, exact memory, tables."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_purify.adapter import Loaded
from hf_purify.method import Context
from hf_purify.neurons import NeuronIndex
from hf_purify_adapters.vision import VisionAdapter

CLASSES = 10


def network(stem: str) -> nn.Module:
    """ResNet-18 with random weights; the stem of CIFAR keeps the resolution."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=CLASSES)
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model.eval()


def machine(device: torch.device) -> dict[str, Any]:
    """Facts about the machine that a ratio may depend on; no names and no paths."""
    facts = {
        "processor": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": str(device),
        "clock": clock(device).__name__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock around it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Callable[[], float]:
    """The clock to use: processor time of this process on one CPU thread, else wall time.

    A neighbour that takes the core away does not count in processor time; nothing that is measured here waits or sleeps.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(call: Callable[[], object], device: torch.device, now: Callable[[], float] | None = None) -> float:
    """Time of one call, by the device's clock or another."""
    now = now or clock(device)
    synchronize(device)
    start = now()
    call()
    synchronize(device)
    return now() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, now: Callable[[], float] | None = None, warm: int = 1
) -> dict[str, list[float]]:
    """Times of several calls, taken in turns (A B C A B C ...), so that a busy neighbour hits all of them alike.

    Every second round runs backwards, so that none always follows the same other one.
    """
    for call in calls.values():
        for _ in range(warm):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            names = list(calls) if turn % 2 == 0 else list(calls)[::-1]
            for name in names:
                times[name].append(seconds(calls[name], device, now))
    finally:
        gc.enable()
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and minimum, and the quartiles as a measure of noise."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {"median_s": round(middle, 5), "min_s": round(min(times), 5), "q1_s": round(low, 5), "q3_s": round(high, 5)}


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each round."""
    return round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 4)


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each distinct storage, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}


def step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of one step: what is held before it, and the most that it holds besides.

    On CUDA the allocator's own counter. On CPU the running sum of every allocation and release that torch reports to
    its profiler: exact, and free of the allocator's reserve that makes resident size a poor measure.
    """
    step()  # the optimizer's state exists from here on
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    state = [v for s in optimizer.state.values() for v in s.values()]
    held = sum(storages([*model.parameters(), *model.buffers(), *state]).values())
    return held + max(itertools.accumulate(allocations(step), initial=0))


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation of a call on CPU, and negative those of every release, in order; what it returns lives until the end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler talks otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    del result
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def saved_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that one forward pass leaves behind, which is what its graph keeps for the backward pass.

    Not told by hooks on saved tensors: where such hooks are, masks keep more.
    """
    gc.collect()
    if device.type != "cuda":
        return sum(allocations(forward))
    before = torch.cuda.memory_allocated(device)
    loss = forward()
    found = torch.cuda.memory_allocated(device) - before
    del loss
    return found


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    """Each gradient of a convolution costs what its forward pass does; torch's own count forgets the groups."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (bool(rest[-1][0]) + bool(rest[-1][1]))


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of one step (a multiply-add counts two)."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}) as counter:
        step()
    return counter.get_total_flops()


def context(
    model: nn.Module, sample: Tensor, classes: int, data: Any = None, held_out: Any = None, accelerator: Accelerator | None = None
) -> Context:
    """The context that a method would get for this model, on the device of the sample."""
    adapter = VisionAdapter()
    index: NeuronIndex = adapter.index(Loaded(model, None), {"pixel_values": sample})
    accelerator = accelerator or Accelerator(cpu=sample.device.type == "cpu")
    return Context(model, adapter, data, torch.Generator().manual_seed(0), accelerator, "crop+flip", index, held_out, classes)


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """A Markdown table, aligned."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def finish(result: dict[str, Any], checks: Sequence[tuple[str, float, float]], output: Path | None) -> int:
    """Print the bounds, write the JSON, and give the exit code: 1 where a bound is missed."""
    result["bounds"] = [{"what": what, "value": round(value, 4), "bound": bound, "met": value <= bound} for what, value, bound in checks]
    print(
        "\n"
        + table(
            [[b["what"], b["value"], b["bound"], "yes" if b["met"] else "MISSED"] for b in result["bounds"]],
            ["bound", "measured", "at most", "met"],
        )
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(b["met"] for b in result["bounds"]) else 1
