"""What a step costs, in time and memory, under each mechanism that can scale neurons: ratios taken in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/masks.py --output benchmarks/results/masks-cpu.json

Every step is forward, backward and optimizer. The lower bound is a frozen network with one scalar mask at its first
layer: gradients must flow through all of the network, and nothing else is done. Exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timing import context, finish, flops, interleaved, machine, ratio, saved_bytes, step_bytes, summary, table
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.masks import masked
from hf_purify.neurons import NeuronIndex, get_tensor, shaped
from hf_purify.salience import benign_salience

CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """A network, its options, its batch, and what a mask-tuning step may cost against the lower bound and fine-tuning."""

    network: str
    batch: int
    over_bound: float
    over_fine_tuning: float
    options: tuple[tuple[str, Any], ...] = ()


SHAPES = {
    "resnet18": Shape("resnet18", 16, 1.10, 0.75),
    "convnext_tiny": Shape("convnext_tiny", 16, 1.10, 0.75),
    "vit_small": Shape("vit_small_patch16_224", 8, 1.20, 0.85, (("patch_size", 8),)),
}


@dataclass
class Variant:
    """One mechanism: its own model, its optimizer, and its forward pass."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Callable[[Tensor], Tensor]


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights, frozen."""
    memo = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


def fine_tuning(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """All weights are learned."""
    own = free_twin(model)
    return Variant(own, sgd(list(own.parameters())), own)


def lower_bound(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """Weights frozen; one scalar scales the output of the first layer."""
    own, scalar = scaled_twin(model, lambda m: next(c for c in m.modules() if isinstance(c, nn.Conv2d)))
    return Variant(own, sgd([scalar]), own)


def scaled_twin(model: nn.Module, place: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Parameter]:
    """A frozen copy in which a scalar, which is learned, scales what one module says."""
    own = twin(model)
    scalar = nn.Parameter(next(own.parameters()).new_ones(()))
    place(own).register_forward_hook(lambda _, __, out: out * scalar.to(out.dtype))
    return own, scalar


def free_twin(model: nn.Module) -> nn.Module:
    """A copy with weights of its own, all of which are learned."""
    return copy.deepcopy(model).requires_grad_(True)


def masked_twin(
    model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack, level: str = "activation"
) -> tuple[nn.Module, nn.Parameter]:
    """A frozen copy under a mask of hf-purify that is learned, while the stack is open."""
    own = twin(model)
    mask = nn.Parameter(torch.ones(len(index), device=next(own.parameters()).device))
    stack.enter_context(masked(own, index, mask, level=level))
    return own, mask


def library(level: str) -> Callable[..., Variant]:
    """The masks of hf-purify, at one of their two levels."""

    def make(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
        own, mask = masked_twin(model, index, stack, level)
        return Variant(own, sgd([mask]), own)

    return make


def plain_hooks(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """A forward hook that multiplies activations, differentiated by autograd: a norm's output, or a layer's input."""
    own, masks = twin(model), []
    for group in index:
        module = own.get_submodule(group.module)
        mask = nn.Parameter(next(own.parameters()).new_ones(group.size))
        masks.append(mask)
        axis = 1 if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else -1
        if get_tensor(own, group.gate.param).dim() == 1:
            module.register_forward_hook(lambda _, __, out, m=mask, a=axis: out * shaped(m.to(out.dtype), out.dim(), a))
        else:
            module.register_forward_pre_hook(lambda _, xs, m=mask, a=axis: (xs[0] * shaped(m.to(xs[0].dtype), xs[0].dim(), a), *xs[1:]))
    return Variant(own, sgd(masks), own)


def ia3(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """PEFT's IA3: the input of the gate's layer, or the output of the filter in front of a norm."""
    import peft

    norms = [g for g in index if get_tensor(model, g.gate.param).dim() == 1]
    inputs = [g.module for g in index if g not in norms]
    filters = [g.params[2].param.rpartition(".")[0] for g in norms]  # weight and bias of the norm, then the filter
    config = peft.IA3Config(target_modules=inputs + filters, feedforward_modules=inputs)
    own = peft.get_peft_model(twin(model), config)
    return Variant(own, sgd([p for p in own.parameters() if p.requires_grad]), own)


def functional(model: nn.Module, index: NeuronIndex, stack: contextlib.ExitStack) -> Variant:
    """`torch.func.functional_call` with the gates' weights replaced by products."""
    own = twin(model)
    mask = nn.Parameter(torch.ones(len(index), device=next(own.parameters()).device))

    def forward(x: Tensor) -> Tensor:
        parts, new = index.split(mask), {}
        for group in index:
            weight = get_tensor(own, group.gate.param)
            new[group.gate.param] = weight * shaped(parts[group.name].to(weight.dtype), weight.dim(), group.gate.axis)
        return torch.func.functional_call(own, new, (x,))

    return Variant(own, sgd([mask]), forward)


MECHANISMS: dict[str, Callable[..., Variant]] = {
    "full fine-tuning": fine_tuning,
    "frozen lower bound": lower_bound,
    "masked, activation level": library("activation"),
    "masked, weight level": library("weight"),
    "plain hooks": plain_hooks,
    "PEFT IA3": ia3,
    "functional_call": functional,
}


def build(shape: Shape, size: int, device: torch.device) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    options = dict(shape.options) | ({"img_size": size} if "vit" in shape.network else {})
    return timm.create_model(shape.network, num_classes=CLASSES, **options).to(device).train()


def measure(name: str, shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times, operations and memory of all mechanisms on one network."""
    model = build(shape, args.size, device)
    batch = args.batch or shape.batch
    images, labels = torch.randn(batch, 3, args.size, args.size, device=device), torch.randint(CLASSES, (batch,), device=device)
    ctx = context(model, images[:2], CLASSES)
    index = ctx.neurons()
    model.requires_grad_(False)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with contextlib.ExitStack() as stack:
        variants = {n: make(model, index, stack) for n, make in MECHANISMS.items()}

        def loss(v: Variant) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=args.precision == "bf16"):
                return F.cross_entropy(v.forward(images).float(), labels)

        def step(v: Variant) -> None:
            v.optimizer.zero_grad()
            loss(v).backward()
            v.optimizer.step()

        times = interleaved({n: lambda v=v: step(v) for n, v in variants.items()}, args.repeats, device)
        rows = {}
        for n, v in variants.items():
            count = flops(lambda v=v: step(v))
            rows[n] = {
                **summary(times[n]),
                "over_lower_bound": ratio(times[n], times["frozen lower bound"]),
                "over_fine_tuning": ratio(times[n], times["full fine-tuning"]),
                "gflop": round(count / 1e9, 2),
                "gflop_per_s": round(count / 1e9 / min(times[n]), 1),
                "peak_mb": round(step_bytes(v.model, v.optimizer, lambda v=v: (step(v), v.optimizer.zero_grad()), device) / 2**20, 1),
                "saved_mb": round(saved_bytes(lambda v=v: loss(v), device) / 2**20, 1),
            }
    return {"batch": batch, "size": args.size, "neurons": len(index), "groups": len(index.groups), "mechanisms": rows}


def measure_salience(shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Benign salience of one group, of half of them and of all, against one plain pass with all weight gradients."""
    model = build(shape, args.size, device).requires_grad_(True)
    batch = args.batch or shape.batch
    images, labels = torch.randn(batch, 3, args.size, args.size, device=device), torch.randint(CLASSES, (batch,), device=device)
    whole = context(model, images[:2], CLASSES).index
    half = NeuronIndex(whole.groups[::2], whole.keys)
    one = NeuronIndex(whole.groups[:1], whole.keys)
    passes = 0

    def losses(_: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return F.cross_entropy(model(images), labels, reduction="none")

    def plain() -> None:
        torch.autograd.grad(losses(None).mean(), list(model.parameters()))

    calls: dict[str, Callable[[], object]] = {"plain": plain}
    for n, index in {"one group": one, "half of the groups": half, "all groups": whole}.items():
        calls[n] = lambda index=index: benign_salience(model, index, losses, [{}])
    times = interleaved(calls, args.repeats, device)
    each = passes / (len(calls) * (args.repeats + 1))
    sizes = {"one group": len(one), "half of the groups": len(half), "all groups": len(whole)}
    rows = {n: {"neurons": sizes[n], **summary(times[n]), "over_plain": ratio(times[n], times["plain"])} for n in sizes}
    return {"plain": summary(times["plain"]), "passes_per_batch": each, "selections": rows}


def matrix_rate(device: torch.device, repeats: int) -> float:
    """GFLOP/s of a large matrix product: what the machine can do at best, measured in the same process."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    times = interleaved({"product": lambda: a @ a}, repeats * 3, device, warm=3)["product"]
    return round(2 * side**3 / min(times) / 1e9, 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batch", type=int, help="images a step; the default is 16, for the ViT 8")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of interleaved steps (default 9)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "machine": machine(device),
        "precision": args.precision,
        "repeats": args.repeats,
        "shapes": {},
        "salience": {},
    }
    result["matrix_product_gflop_per_s"] = matrix_rate(device, args.repeats)
    checks: list[tuple[str, float, float]] = []
    for name in args.shapes:
        shape = SHAPES[name]
        found = result["shapes"][name] = measure(name, shape, args, device)
        rows = found["mechanisms"]
        print(f"\n{name}: batch {found['batch']}, {args.size} px, {found['neurons']} neurons in {found['groups']} groups\n")
        keys = ("median_s", "over_lower_bound", "over_fine_tuning", "gflop", "gflop_per_s", "peak_mb", "saved_mb")
        head = ("mechanism", "s (median)", "/ lower bound", "/ fine-tuning", "GFLOP", "GFLOP/s", "peak MiB", "kept for backward MiB")
        print(table([[n, *(row[k] for k in keys)] for n, row in rows.items()], head), flush=True)
        ours, full = rows["masked, activation level"], rows["full fine-tuning"]
        checks.append((f"{name}: mask step / lower bound", ours["over_lower_bound"], shape.over_bound))
        checks.append((f"{name}: mask step / fine-tuning step", ours["over_fine_tuning"], shape.over_fine_tuning))
        checks.append((f"{name}: mask peak / fine-tuning peak", ours["peak_mb"] / full["peak_mb"], 1.0))
        salience = result["salience"][name] = measure_salience(shape, args, device)
        print()
        print(
            table(
                [[n, r["neurons"], r["median_s"], r["over_plain"]] for n, r in salience["selections"].items()],
                ["salience of", "neurons", "s", "/ plain pass"],
            )
        )
        checks.append((f"{name}: salience of all neurons / plain pass", salience["selections"]["all groups"]["over_plain"], 1.15))
        checks.append((f"{name}: passes per batch for salience", salience["passes_per_batch"], 1.0))
    print(f"\na large matrix product: {result['matrix_product_gflop_per_s']} GFLOP/s")
    return finish(result, checks, args.output)


if __name__ == "__main__":
    sys.exit(main())
