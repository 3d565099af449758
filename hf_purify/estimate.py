"""What a repair takes, before anything is downloaded: memory by process under FSDP2, operations, and time.

`memory` has the formula, and `rehearsal` counts activations and operations on the meta device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_purify.adapter import Adapter, Outline
from hf_purify.checkpointing import check_layers
from hf_purify.errors import ConfigError, ModelError, first_line, unknown
from hf_purify.hub import pull_config
from hf_purify.loop import steps_of
from hf_purify.memory import Memory, memory_of
from hf_purify.method import Context, Training
from hf_purify.neurons import NeuronIndex
from hf_purify.registry import find, make_method, names
from hf_purify.rehearsal import META, Cost, between, rehearse
from hf_purify.twins import narrow, widened

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRACED = 250_000_000  # parameters of a network that is built with random weights to find its neurons; a larger one is made narrow
TOKENS = 8  # of the texts that show which channels a layer reads
HELD_OUT = 0.2  # share of the clean samples that no step sees, as in a recipe


@dataclass(frozen=True)
class Plan:
    """What is asked about a model.

    Args:
        method: one that knows beforehand how it trains.
        processes: numbers of processes, each with a device of its own.
        precision: `no` computes in the checkpoint's dtype, `bf16` and `fp16` in those.
        batch_size: samples of a step over all processes; the method's own if not given.
        length: tokens of a text; as many as the library reads if not given.
        steps: of the repair; the method's own if not given.
        samples: clean samples, one in five of them held out.
        tflops: 10^12 operations a second that a device sustains; without it there is no time.
    """

    method: str = "nft"
    processes: tuple[int, ...] = (1, 2, 4, 8)
    precision: str = "no"
    batch_size: int | None = None
    length: int | None = None
    steps: int | None = None
    samples: int = 500
    tflops: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if not self.processes:
            raise ConfigError("processes must name at least one number, such as 1,2,4,8; got none")
        for count in self.processes:
            _check_count("processes", count)
        for name in ("batch_size", "length", "steps", "samples"):
            if (value := getattr(self, name)) is not None:
                _check_count(name, value)
        if self.tflops is not None and not 0 < self.tflops < math.inf:
            raise ConfigError(f"tflops must be a positive number, what one device sustains; got {self.tflops}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be whole numbers of at least 1; got {value!r}")


def read_counts(text: str) -> tuple[int, ...]:
    """Numbers of processes, as they are written on a command line: `1,2,4,8`.

    Raises:
        ConfigError: something else than whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"processes must be whole numbers with commas between them, such as 1,2,4,8; got '{text}'") from None


@dataclass(frozen=True)
class Row:
    """One number of processes, with layers run again in the backward pass or not.

    Args:
        samples: that each process runs; a share of the batch, and partners of mixed texts.
        flops: operations of a step on each process.
        seconds: of the whole repair, from the operations alone; None where it is not known what a device sustains.
    """

    processes: int
    checkpointing: bool
    samples: int
    memory: Memory
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What a repair takes; see `memory` for the formula.

    Args:
        parameters: of the network.
        neurons: that the mask acts on; 0 where weights are learned.
        dtype: of the checkpoint's weights, as its config says.
        sample: what a sample is, in words.
        forward, backward: operations of one step on the whole batch, on one process without checkpointing.
    """

    model: str
    revision: str | None
    architecture: str
    plan: Plan
    parameters: int
    neurons: int
    dtype: str
    sample: str
    batch_size: int
    steps: int
    forward: int
    backward: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with totals."""
        found = dataclasses.asdict(self)
        for row, given in zip(found["rows"], self.rows, strict=True):
            row["memory"]["total"] = given.memory.total
        return found


def estimate(model: str, plan: Plan | None = None, revision: str | None = None) -> Estimate:
    """Tell what a repair of a model takes, from its `config.json` alone; no weights are fetched or made.

    Args:
        model: folder, Hub id, timm name, or a `config.json`.
        plan: the repair and the machines.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: no config, or one of which no model can be made and run.
        UnsafeCheckpoint: the config asks for code of its own.
        ConfigError: a setting outside its range, or a method that decides on the way what it does.

    >>> estimate("org/llama-7b", Plan(batch_size=8, precision="bf16")).rows[-1].memory.total  # doctest: +SKIP
    """
    known = [find("adapter", n)() for n in names("adapter")]
    config, commit = pull_config(next((place for a in known if (place := a.locate(model))), model), revision)
    return estimate_config(config, plan or Plan(), model, commit)


def estimate_config(config: Mapping[str, Any], plan: Plan, name: str = "", revision: str | None = None) -> Estimate:
    """The same from what a `config.json` says."""
    method = make_method(plan.method)
    adapter = _adapter(config, name)
    with META:
        outline = adapter.outline(config, plan.length)
    network, computed = outline.loaded.model, PRECISIONS[plan.precision] or outline.dtype
    network.to(computed)
    index = find_neurons(adapter, config, network)
    training = method.plan(Context(network, adapter, None, torch.Generator(), None, index=index))  # type: ignore[arg-type]
    seen = max(1, plan.samples - round(HELD_OUT * plan.samples))
    train = dataclasses.replace(training.train, batch_size=plan.batch_size or training.train.batch_size)
    train = dataclasses.replace(train, batch_size=train.batch_size if train.replacement else min(train.batch_size, seen))
    training, steps = dataclasses.replace(training, train=train), plan.steps or steps_of(seen, train)
    shares = {p: samples_of(adapter, outline, training, p) for p in plan.processes}
    rows: list[Row] = []
    cost: Callable[[int, bool], Cost] = _costs(adapter, outline, training, [train.batch_size, *shares.values()])
    for processes, samples in shares.items():
        for again in (False, True) if _layered(network) else (False,):
            found = cost(samples, again)
            memory = memory_of(network, outline.dtype, computed, training, processes, found)
            flops = found.forward + found.backward
            rows.append(Row(processes, again, samples, memory, flops, flops * steps / plan.tflops / 1e12 if plan.tflops else None))
    whole = cost(train.batch_size, False)
    return Estimate(
        name,
        revision,
        type(network).__name__,
        plan,
        sum(p.numel() for p in network.parameters()),
        len(training.mask or ()),
        str(outline.dtype).removeprefix("torch."),
        outline.sample,
        train.batch_size,
        steps,
        whole.forward,
        whole.backward,
        tuple(rows),
    )


def _adapter(config: Mapping[str, Any], name: str) -> Adapter:
    """The modality that claims a config."""
    known = [find("adapter", n)() for n in names("adapter")]
    found = next((a for a in known if a.claims(config)), None)
    if found is None:
        said = ", ".join(config.get("architectures") or []) or "no architecture"
        kinds = " and ".join(f"{a.task} ({a.name})" for a in known)
        raise ModelError(f"'{name}' is of no kind that can be repaired: its config names {said}; there is {kinds}")
    return found


def _layered(network: nn.Module) -> bool:
    """Has a network layers that can be run again?"""
    try:
        check_layers(network)
    except ConfigError:
        return False
    return True


def samples_of(adapter: Adapter, outline: Outline, training: Training, processes: int) -> int:
    """Samples that a process runs: its rows of the batch; where samples are mixed inside the network, at most as many partners; all of a batch that is
    smaller than there are processes.
    """
    size = training.train.batch_size
    if size < processes:
        return size
    rows = math.ceil(size / processes)
    if processes > 1 and training.train.mixup:
        mixed = adapter.mix({k: v[:0] for k, v in outline.batch(1).items()}, torch.arange(0), torch.tensor(0.5))
        return min(size, 2 * rows) if "partner" in mixed else rows
    return rows


def _costs(adapter: Adapter, outline: Outline, training: Training, sizes: Iterable[int]) -> Callable[[int, bool], Cost]:
    """Costs by samples and checkpointing: counted for the fewest and the most samples, and in between on the line that joins them."""
    low, high = min(sizes := list(sizes)), max(sizes)

    @functools.cache
    def at(samples: int, again: bool) -> Cost:
        return rehearse(adapter, outline.loaded.model, outline.batch, training, samples, again)

    return lambda samples, again: between(at(low, again), at(high, again), samples)


def find_neurons(adapter: Adapter, config: Mapping[str, Any], network: nn.Module) -> NeuronIndex:
    """All neurons of a network that is on the meta device: those of one with random weights.

    To see which channels a layer reads takes values. A large network of transformers is built narrow, with as many layers; its groups are then given the
    sizes that the weights of the wide one have.

    Raises:
        ModelError: a large network cannot be made narrow.
    """
    wide = sum(p.numel() for p in network.parameters()) > TRACED
    try:
        with torch.random.fork_rng(devices=[]):
            made = adapter.outline(narrow(config) if wide else config, TOKENS if "max_length" in adapter.settings else None)
            index = adapter.index(made.loaded, made.batch(2))
    except RuntimeError as error:
        raise ModelError(f"the neurons of {type(network).__name__} cannot be found without its weights: {first_line(error)}") from error
    return NeuronIndex(tuple(widened(g, network) for g in index)) if wide else index
