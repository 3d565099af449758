"""What a mask-tuning step of a language model costs beside fine-tuning and LoRA, and whether one fits for a billion parameters.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/text.py --output benchmarks/results/text-cpu.json

Networks of random weights, batches of random tokens without padding. Every step is forward, backward and AdamW (fused: for
fine-tuning the cheapest that torch has). The lower bound is a frozen network with one scalar mask behind its word embeddings:
gradients must flow through all blocks, and nothing else is done. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from masks import free_twin, masked_twin, matrix_rate, scaled_twin, twin
from timing import finish, flops, interleaved, machine, ratio, saved_bytes, seconds, step_bytes, summary, table
from torch import Tensor, nn

from hf_purify.adapter import Batch, Loaded
from hf_purify.checkpointing import recomputed
from hf_purify.masks import masked
from hf_purify.method import Context
from hf_purify.neurons import NeuronIndex
from hf_purify_adapters.text import TextAdapter
from hf_purify_adapters.text.loading import auto_class
from hf_purify_adapters.text.prompts import CAUSAL, CLASSIFIER, Prompt
from hf_purify_adapters.text.tiny import tiny_tokenizer

CLASSES = 2
RANK = 8
OVER_FINE_TUNING, GIB = 0.75, 24.0
OURS, FULL, LOWER, LORA = "masked, activation level", "full fine-tuning", "frozen lower bound", f"LoRA, rank {RANK}"
LOOP, AGAIN = "masked, with the adapter's loss", "masked, layers run again"


@dataclass(frozen=True)
class Shape:
    """A type of transformers in its default size, what it does, and what makes it small."""

    network: str
    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    small: tuple[tuple[str, Any], ...] = ()


SHAPES = {
    "bert-base": Shape("bert", CLASSIFIER, (("num_labels", CLASSES),), (("num_hidden_layers", 2),)),
    "gpt2": Shape("gpt2", CAUSAL, (("use_cache", False),), (("n_layer", 2),)),
}
LARGE = Shape(
    "llama",
    CAUSAL,
    (
        ("hidden_size", 2048),
        ("num_hidden_layers", 16),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 8),
        ("intermediate_size", 8192),
        ("vocab_size", 128256),
        ("tie_word_embeddings", True),
        ("use_cache", False),
    ),
    (("num_hidden_layers", 2), ("vocab_size", 4096)),
)
# bytes a parameter of full fine-tuning, without activations; the second is what mixed precision keeps (Rajbhandari et al., ZeRO, SC 2020)
FULL_BYTES = {
    "bf16 weights and gradients, fp32 moments": 2 + 2 + 8,
    "bf16 weights and gradients, fp32 weights and moments": 2 + 2 + 4 + 8,
}


@dataclass
class Variant:
    """One mechanism: its own model, its optimizer, and its loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Batch], Tensor]


def build(shape: Shape, small: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with random weights, made in `dtype`."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    options = dict(shape.options) | (dict(shape.small) if small else {})
    config = AutoConfig.for_model(shape.network, **options)
    return auto_class(shape.kind).from_config(config, dtype=dtype).to(device).train()


def tokens(model: nn.Module, kind: str, batch: int, length: int, device: torch.device) -> Batch:
    """A batch as the text adapter makes it, of random tokens: a causal model learns all of them."""
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)  # type: ignore[union-attr, arg-type]
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(CLASSES, (batch,), device=device)}
    return made | ({"target_ids": ids} if kind == CAUSAL else {})


def neurons(model: nn.Module, kind: str, batch: Batch) -> NeuronIndex:
    """The neurons that a method would choose: hidden units and attention values of the blocks."""
    adapter = TextAdapter()
    loaded = Loaded(model, Prompt(tiny_tokenizer(), kind))  # the tokenizer says nothing about neurons
    index = adapter.index(loaded, {k: v[:2, :8] if v.dim() > 1 else v[:2] for k, v in batch.items()})
    accelerator = Accelerator(cpu=batch["input_ids"].device.type == "cpu")
    return Context(model, adapter, None, torch.Generator(), accelerator, "none", index, None, CLASSES).neurons()  # type: ignore[arg-type]


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that transformers itself takes."""
    aims = batch.get("target_ids", batch["labels"])
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=aims).loss


def adapter_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the library's loop takes."""
    return TextAdapter().loss(model, batch).mean()


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def fine_tuning(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """All weights are learned."""
    own = free_twin(model)
    return Variant(own, adamw(list(own.parameters())), plain_loss)


def lower_bound(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """Weights frozen; one scalar scales the word embeddings."""
    own, scalar = scaled_twin(model, lambda m: m.get_input_embeddings())  # type: ignore[operator]
    return Variant(own, adamw([scalar]), plain_loss)


def lora(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """PEFT's LoRA in the modules that it chooses for this architecture."""
    import peft

    columns = type(model).__name__.startswith("GPT2")  # whose layers keep their weights as (in, out)
    own = peft.get_peft_model(twin(model), peft.LoraConfig(r=RANK, fan_in_fan_out=columns))
    return Variant(own, adamw([p for p in own.parameters() if p.requires_grad]), plain_loss)


def library(loss: Callable[[nn.Module, Batch], Tensor], again: bool = False) -> Callable[..., Variant]:
    """The masks of hf-purify; `again` with gradient checkpointing."""

    def make(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
        own, mask = masked_twin(model, index, stack)
        if again:
            stack.enter_context(recomputed(own))
        return Variant(own, adamw([mask]), loss)

    return make


MECHANISMS: dict[str, Callable[..., Variant]] = {
    FULL: fine_tuning,
    LOWER: lower_bound,
    OURS: library(plain_loss),
    LOOP: library(adapter_loss),
    AGAIN: library(adapter_loss, again=True),
    LORA: lora,
}


def measure(shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times, operations and memory of all mechanisms on one network."""
    model = build(shape, args.quick, device)
    batch = tokens(model, shape.kind, args.batch, args.tokens, device)
    index = neurons(model, shape.kind, batch)
    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        variants = {n: make(model, index, stack) for n, make in MECHANISMS.items()}

        def loss(v: Variant) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                return v.loss(v.model, batch)

        def step(v: Variant) -> None:
            v.optimizer.zero_grad()
            loss(v).backward()
            v.optimizer.step()

        times = interleaved({n: lambda v=v: step(v) for n, v in variants.items()}, args.repeats, device)
        rows = {}
        for n, v in variants.items():
            found = summary(times[n])
            count = flops(lambda v=v: step(v))
            rows[n] = {
                **found,
                "tokens_per_s": round(args.batch * args.tokens / found["median_s"], 1),
                "over_lower_bound": ratio(times[n], times[LOWER]),
                "over_fine_tuning": ratio(times[n], times[FULL]),
                "over_lora": ratio(times[n], times[LORA]),
                "gflop": round(count / 1e9, 2),
                "peak_mb": round(step_bytes(v.model, v.optimizer, lambda v=v: (step(v), v.optimizer.zero_grad()), device) / 2**20, 1),
                "saved_mb": round(saved_bytes(lambda v=v: loss(v), device) / 2**20, 1),
                "learned": sum(p.numel() for g in v.optimizer.param_groups for p in g["params"]),
            }
    weights = sum(p.numel() for p in model.parameters())
    return {
        "batch": args.batch,
        "tokens": args.tokens,
        "parameters": weights,
        "neurons": len(index),
        "groups": len(index.groups),
        "mechanisms": rows,
    }


def peak(device: torch.device) -> int:
    """Most bytes held so far: resident ones of this process, or on CUDA those of the allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def large_step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One mask-tuning step of the large network in bf16, as the library takes it; meant for a process of its own."""
    before = peak(device)
    model = build(LARGE, args.quick, device, torch.bfloat16)
    batch = tokens(model, CAUSAL, 1, args.large_tokens, device)
    index = neurons(model, CAUSAL, batch)
    model.requires_grad_(False)
    built = peak(device)
    mask = nn.Parameter(torch.ones(len(index), device=device))
    optimizer = adamw([mask])

    def step() -> None:
        adapter_loss(model, batch).backward()
        optimizer.step()

    with masked(model, index, mask):
        took = seconds(step, device)
    assert mask.grad is not None
    assert bool(mask.grad.isfinite().all())
    weights = sum(p.numel() for p in model.parameters())
    most = peak(device)
    return {
        "network": f"{LARGE.network}, {model.config.num_hidden_layers} x {model.config.hidden_size}",  # type: ignore[union-attr]
        "batch": 1,
        "tokens": args.large_tokens,
        "parameters": weights,
        "weights_gib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30, 3),
        "mask_values": len(index),
        "mask_values_moved": int((mask.detach() != 1).sum()),
        "step_s": round(took, 3),
        "before_gib": round(before / 2**30, 3),
        "built_gib": round(built / 2**30, 3),
        "peak_gib": round(most / 2**30, 3),
        "bytes_per_parameter": round(most / weights, 3),
        "fine_tuning": {n: {"bytes_per_parameter": b, "gib": round(b * weights / 2**30, 2)} for n, b in FULL_BYTES.items()},
    }


def large(args: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own; asked for first, since a process begins with the peak of the one that started it."""
    command = [sys.executable, __file__, "--child", "--device", args.device, "--large-tokens", str(args.large_tokens)]
    done = subprocess.run(command + ["--quick"] * args.quick, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, "large"], default=[*SHAPES, "large"])
    parser.add_argument("--batch", type=int, default=8, help="texts a step (default 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a text (default 64)")
    parser.add_argument("--large-tokens", type=int, default=128, help="tokens of the one text for the large network (default 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the small networks; the large one is in bf16")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of interleaved steps (default 7)")
    parser.add_argument("--quick", action="store_true", help="networks of two blocks, to see that the script runs: no bound counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.child:
        print(json.dumps(large_step(args, device)))
        return 0
    facts = {k: getattr(args, k) for k in ("precision", "repeats", "quick")}
    result: dict[str, Any] = {"machine": machine(device), **facts, "texts": {}}
    checks: list[tuple[str, float, float]] = []
    if "large" in args.only:
        found = result["large"] = large(args)
        print(f"\n{found['network']}, {found['parameters'] / 1e9:.3f} billion parameters in bf16, 1 x {found['tokens']} tokens\n")
        print(table([[k, v] for k, v in found.items() if k not in ("network", "fine_tuning")], ["large", "value"]))
        print(table([[n, r["bytes_per_parameter"], r["gib"]] for n, r in found["fine_tuning"].items()], ["fine-tuning", "bytes", "GiB"]))
        checks.append(("large: GiB that one mask step needs", found["peak_gib"], GIB))
    result["matrix_product_gflop_per_s"] = matrix_rate(device, args.repeats)
    for name in [n for n in SHAPES if n in args.only]:
        found = result["texts"][name] = measure(SHAPES[name], args, device)
        rows = found["mechanisms"]
        print(f"\n{name}: {found['batch']} x {found['tokens']} tokens, {found['neurons']} neurons in {found['groups']} groups\n")
        keys = ("median_s", "tokens_per_s", "over_lower_bound", "over_fine_tuning", "over_lora", "gflop", "peak_mb", "saved_mb", "learned")
        head = (
            "mechanism",
            "s (median)",
            "tokens/s",
            "/ lower bound",
            "/ fine-tuning",
            "/ LoRA",
            "GFLOP",
            "peak MiB",
            "kept MiB",
            "learned",
        )
        print(table([[n, *(row[k] for k in keys)] for n, row in rows.items()], head), flush=True)
        checks.append((f"{name}: mask step / fine-tuning step", rows[OURS]["over_fine_tuning"], OVER_FINE_TUNING))
        checks.append((f"{name}: mask step with the adapter's loss / fine-tuning step", rows[LOOP]["over_fine_tuning"], OVER_FINE_TUNING))
        checks.append((f"{name}: mask peak / LoRA's peak", rows[OURS]["peak_mb"] / rows[LORA]["peak_mb"], 1.0))
    print(f"\na large matrix product: {result['matrix_product_gflop_per_s']} GFLOP/s")
    code = finish(result, checks, args.output)
    return 0 if args.quick else code


if __name__ == "__main__":
    sys.exit(main())
