"""What `hf-purify estimate` predicts, beside what a small Llama takes on this machine; and its table for 7, 13 and 70 billion parameters.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py --output benchmarks/results/estimate-cpu.json

The small Llama is real: a step of mask tuning and one of fine-tuning are run by the library's methods and loop, and every allocation is
counted. The large ones are predicted: nothing of them is run. Exits with 1 where a prediction is not what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timing import allocations, finish, machine, storages, table
from torch import Tensor, nn

from hf_purify.adapter import Batch
from hf_purify.checkpointing import recomputed
from hf_purify.estimate import Plan, estimate_config
from hf_purify.loop import TrainConfig
from hf_purify.masks import masked
from hf_purify.method import Context, Training
from hf_purify.registry import find, make_method
from hf_purify.task import mode, movable

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000}
SIZES: dict[str, dict[str, int]] = {
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13B": {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
SMALL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
METHODS = ("nft", "fine_tune")
SHARDED = 2.0  # of a step under FSDP2: parts that are not all there at once
BF16 = 1.1  # what is counted computes in bf16 throughout, autocast does not
BATCH, LENGTH = 8, 512  # of the table; of the small Llama a quarter of both


class Texts:
    """Texts of an outline, made when they are asked for."""

    lengths = None

    def __init__(self, batch: Callable[[int], Batch], size: int) -> None:
        self.make, self.labels = batch, torch.zeros(size, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Batch:
        return self.make(len(indices))


def predicted() -> dict[str, list[dict[str, Any]]]:
    """The rows of the table, by size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        for method in METHODS:
            given = estimate_config({**LLAMA, **size, "max_position_embeddings": 4096}, Plan(method, batch_size=BATCH, length=LENGTH), name)
            whole = {
                "method": method,
                "parameters": given.parameters,
                "neurons": given.neurons,
                "forward": given.forward,
                "backward": given.backward,
            }
            found.setdefault(name, []).extend(whole | row for row in given.to_dict()["rows"])
        print(f"{name}: {given.parameters:,} parameters", flush=True)
    return found


@contextlib.contextmanager
def accelerated(precision: str) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


def peak(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at once."""
    return max(itertools.accumulate(allocations(call), initial=0))


def bytes_of(tensors: Any) -> int:
    return sum(storages(tensors).values())


def kept_bytes(ctx: Context, training: Training, batch: Batch, again: bool) -> int:
    """What one forward pass leaves behind, its inputs included."""
    learned = list(movable(ctx.model).values())
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode(ctx.model, training.train.mode))
        for p in learned:
            p.requires_grad_(training.mask is None)
        if training.mask is not None:
            stack.enter_context(masked(ctx.model, training.mask, nn.Parameter(torch.ones(len(training.mask))), training.level))
        stack.enter_context(recomputed(ctx.model) if again else contextlib.nullcontext())

        def forward() -> Tensor:
            given = {k: v.clone() for k, v in batch.items()}
            if training.train.mixup:
                given = ctx.adapter.mix(given, torch.arange(len(given["labels"])).roll(1), torch.tensor(0.5))
            with ctx.accelerator.autocast():
                return ctx.adapter.loss(ctx.model, given).mean()

        forward()
        return sum(allocations(forward))


def state_bytes(params: list[nn.Parameter], train: TrainConfig) -> tuple[int, int]:
    """Bytes of gradients and of the optimizer's state after a step."""
    for p in params:
        p.requires_grad_(True).grad = torch.zeros_like(p)
    gradients = bytes_of(p.grad for p in params)
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay)
    optimizer.step()
    state = bytes_of(v for s in optimizer.state.values() for v in s.values())
    for p in params:
        p.grad = None
    return gradients, state


def compare(method: str, stored: str, precision: str, again: bool) -> dict[str, Any]:
    """One method on the small Llama: what is predicted and what is measured, and ratios."""
    config = {**LLAMA, **SMALL, "dtype": stored}
    samples, length = BATCH // 4, LENGTH // 4
    given = estimate_config(config, Plan(method, (1,), precision, samples, length, steps=2), "small")
    memory = next(row.memory for row in given.rows if row.checkpointing == again)
    adapter = find("adapter", "text")()
    torch.manual_seed(0)
    outline = adapter.outline(config, length)
    model = outline.loaded.model.to(getattr(torch, stored))
    with accelerated(precision) as accelerator:
        index = adapter.index(outline.loaded, outline.batch(2))
        data = Texts(outline.batch, 4 * samples)
        options = {"steps": 2} if method == "nft" else {"epochs": 1}
        built = make_method(method, batch_size=samples, **options)
        ctx = Context(model, adapter, data, torch.Generator().manual_seed(0), accelerator, index=index, classes=2, recompute=again)  # type: ignore[arg-type]
        training = built.plan(ctx)
        kept = kept_bytes(ctx, training, outline.batch(samples), again)
        learned = list(movable(model).values()) if training.mask is None else [nn.Parameter(torch.ones(len(training.mask)))]
        gradients, optimizer = state_bytes(learned, training.train)
        weights = bytes_of([*model.parameters(), *model.buffers()])
        total = weights + peak(lambda: built(ctx))
    measured = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "kept": kept, "total": total}
    mask = 0 if training.mask is None else 4 * len(training.mask)  # not among the weights that are measured
    cast = 0 if again else memory.gathered  # the graph keeps weights as autocast has made them; of layers that run again it keeps none
    host = weights  # on a CPU, the host's copy that a method puts back when it fails is in the same memory
    expected = dataclasses.asdict(memory) | {"weights": memory.weights - mask, "kept": memory.kept + cast, "total": memory.total + host}
    return {
        "method": method,
        "stored": stored,
        "precision": precision,
        "layers run again": again,
        "parameters": given.parameters,
        "measured": measured,
        "predicted": {k: expected[k] for k in measured},
        "ratios": {k: round(expected[k] / measured[k], 4) for k in measured},
    }


def sharded(method: str, folder: Path) -> dict[str, Any]:
    """Bytes of each of two processes that share the small Llama, as transformers spreads it under FSDP2; run by torchrun."""
    from transformers import AutoModelForCausalLM

    from hf_purify_adapters._checkpoints import load_model

    Accelerator(cpu=True)
    adapter, config = find("adapter", "text")(), {**LLAMA, **SMALL, "dtype": "float32"}
    outline = adapter.outline(config, LENGTH // 4)
    model: Any = load_model(folder, "small", AutoModelForCausalLM, "causal model")
    outline.loaded.model = model
    index = adapter.index(outline.loaded, outline.batch(2))
    ctx = Context(model, adapter, None, torch.Generator(), None, index=index)  # type: ignore[arg-type]
    training = make_method(method).plan(ctx)
    model.requires_grad_(training.mask is None)
    with contextlib.ExitStack() as stack:
        learned = list(model.parameters())
        stack.enter_context(mode(model, training.train.mode))
        weights = local_bytes(learned)
        if training.mask is not None:
            learned = [stack.enter_context(masked(model, training.mask, nn.Parameter(torch.ones(len(training.mask)))))]  # type: ignore[list-item]
        optimizer = torch.optim.SGD(learned, lr=0.0, momentum=training.train.momentum)

        def backward() -> None:
            batch = outline.batch(2)
            if training.train.mixup:
                batch = adapter.mix(batch, torch.arange(2).roll(1), torch.tensor(0.5))
            adapter.loss(model, batch).mean().backward()

        backward()
        gradients = local_bytes(p.grad for p in learned)
        optimizer.step()
        state = local_bytes(v for s in optimizer.state.values() for v in s.values())
        optimizer.zero_grad()
        return {"weights": weights, "gradients": gradients, "optimizer": state, "step": peak(backward)}


def local_bytes(tensors: Any) -> int:
    """Bytes of this process's shares."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.nbytes for t in local if isinstance(t, Tensor))


def compare_sharded(method: str) -> dict[str, Any]:
    """The same under FSDP2, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        outline = find("adapter", "text")().outline({**LLAMA, **SMALL, "dtype": "float32"}, LENGTH // 4)
        outline.loaded.model.save_pretrained(folder)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        env = os.environ | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*launch, __file__, "--sharded", method, folder], capture_output=True, text=True, check=True, env=env)
    measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    plan = Plan(method, (2,), batch_size=2 if method == "nft" else 4, length=LENGTH // 4)
    memory = estimate_config({**LLAMA, **SMALL, "dtype": "float32"}, plan, "small").rows[0].memory
    mask = memory.gradients if method == "nft" else 0  # not among the weights that are measured
    found = dataclasses.asdict(memory) | {
        "weights": memory.weights - mask,
        "step": memory.gathered + memory.gradients + memory.kept + memory.passing,
    }
    ratios = {k: round(found[k] / measured[k], 4) for k in measured}
    return {"method": method, "measured": measured, "predicted": {k: found[k] for k in measured}, "ratios": ratios}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="leave the table of large models out")
    parser.add_argument("--sharded", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.sharded:
        found = sharded(args.sharded[0], Path(args.sharded[1]))
        if torch.distributed.get_rank() == 0:
            print(json.dumps(found), flush=True)
        torch.distributed.destroy_process_group()
        return 0
    result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "batch": BATCH, "length": LENGTH, "measured": []}
    checks: list[tuple[str, float, float]] = []
    for stored, precision in (("float32", "no"), ("bfloat16", "no"), ("float32", "bf16")):
        for method, again in itertools.product(METHODS, (False, True)):
            row = compare(method, stored, precision, again)
            result["measured"].append(row)
            what = f"{method}, {stored}, precision {precision}{', layers run again' if again else ''}"
            for part, r in row["ratios"].items():
                if part == "total":  # counted as if all parts were there at once: too much where weights are learned, never too little
                    checks += [(f"{what}: total predicted / measured", r, 1.3), (f"{what}: total measured / predicted", 1 / r, 1.01)]
                elif precision == "no" or not again:  # autocast of float32 weights leaves what passes from layer to layer in float32
                    checks.append((f"{what}: {part}, the larger / the smaller", max(r, 1 / r), 1.01 if precision == "no" else BF16))
    print(
        table(
            [[r["method"], r["stored"], r["precision"], r["layers run again"], *r["ratios"].values()] for r in result["measured"]],
            ["method", "stored", "precision", "layers run again", *result["measured"][0]["ratios"]],
        ),
        flush=True,
    )
    result["sharded"] = [compare_sharded(method) for method in METHODS]
    for row in result["sharded"]:
        print(f"{row['method']}, FSDP2 on two processes: {row['ratios']}", flush=True)
        for part, r in row["ratios"].items():
            bound = SHARDED if part == "step" else 1.01
            checks += [
                (f"{row['method']}, FSDP2: {part} predicted / measured", r, bound),
                (f"{row['method']}, FSDP2: {part} measured / predicted", 1 / r, 1.01),
            ]
    if not args.small:
        result["predicted"] = predicted()
    return finish(result, checks, args.output)


if __name__ == "__main__":
    sys.exit(main())
