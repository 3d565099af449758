"""Whole repairs beside plain PyTorch loops that take the same steps: what the library's own loop costs.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/runs.py --output benchmarks/results/runs-cpu.json

A ResNet-18 with the stem of CIFAR and 500 random images. The plain side is written out by hand in this file: it uses
neither the library's loop nor its masks, draws the same random numbers in the same order, and must end with the same
mask. Runs are taken in turns. Exits with 1 where a bound is missed, or where the two sides did not take the same steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timing import CLASSES, context, finish, interleaved, machine, network, ratio, seconds, summary, table
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.method import Context, Verdict
from hf_purify.methods.nft import NFT, NFTConfig, floors
from hf_purify.methods.rnp import RNP, RNPConfig
from hf_purify.task import Task
from hf_purify_adapters.vision import VisionAdapter
from hf_purify_adapters.vision.examples import ImageExamples

BOUND = 1.05


class MaskedBatchNorm(nn.Module):
    """The simplest mask on a batch norm: its scale times a parameter."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mask = nn.Parameter(torch.ones_like(norm.weight))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight * self.mask, n.bias, self.training, n.momentum, n.eps)


@torch.no_grad()
def examples(model: nn.Module, count: int) -> tuple[ImageExamples, ImageExamples]:
    """Random images to learn from and to judge on, labelled with the network's own answers.

    The head is centred first, so that all classes occur; the network starts at full accuracy and has a task to unlearn.
    """
    generator = torch.Generator().manual_seed(0)
    raws = [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(count)]

    def prepare(images: list[Tensor]) -> Tensor:
        return torch.stack(images).float() / 127.5 - 1

    logits = torch.cat([model(prepare(raws[i : i + 100])) for i in range(0, count, 100)])
    model.get_submodule("fc").weight.mul_(1 / logits.std(0).mean())
    model.get_submodule("fc").bias.copy_((model.get_submodule("fc").bias - logits.mean(0)) / logits.std(0).mean())
    labels = ((logits - logits.mean(0)) / logits.std(0).mean()).argmax(1)
    cut = count * 4 // 5
    return ImageExamples(raws[:cut], labels[:cut], prepare), ImageExamples(raws[cut:], labels[cut:], prepare)


class Plain:
    """The plain side: tensors, one random generator, and loops written out."""

    def __init__(self, model: nn.Module, ctx: Context, precision: str) -> None:
        whole = torch.arange(len(ctx.data)), torch.arange(len(ctx.judged))
        self.images, self.labels = (ctx.data.batch(whole[0])[k] for k in ("pixel_values", "labels"))
        judged = ctx.judged.batch(whole[1])
        self.judged, self.answers = judged["pixel_values"], judged["labels"]
        self.model, self.device = model, ctx.device
        self.autocast = lambda: torch.autocast(ctx.device.type, torch.bfloat16, enabled=precision == "bf16")

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Random crop after padding by four pixels, and random flip."""
        images = self.images[indices]
        n, _, side, _ = images.shape
        pad = side // 8
        shifts = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5
        rows = shifts[0][:, None] + torch.arange(side)
        columns = shifts[1][:, None] + torch.arange(side)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)
        cropped = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return cropped.to(self.device)

    def masks(self) -> list[nn.Parameter]:
        """Freeze the weights and put a mask on every batch norm of the blocks, in order of execution."""
        self.model.requires_grad_(False)
        found = []
        for name, block in self.model.named_modules():
            if not name.startswith("layer") or not hasattr(block, "conv1"):
                continue
            for leaf in ("bn1", "bn2"):
                setattr(block, leaf, MaskedBatchNorm(getattr(block, leaf)))
                found.append(getattr(block, leaf).mask)
            if block.downsample is not None:
                block.downsample[1] = MaskedBatchNorm(block.downsample[1])
                found.append(block.downsample[1].mask)
        return found

    @torch.no_grad()
    def read(self) -> tuple[Tensor, float]:
        """Predictions and mean loss on the judged samples, from one pass."""
        self.model.eval()
        with self.autocast():
            logits = torch.cat([self.model(x.to(self.device)) for x in self.judged.split(256)]).float()
        loss = F.cross_entropy(logits, self.answers.to(self.device))
        return logits.argmax(1).cpu(), float(loss)

    def nft(self, config: NFTConfig, lows: list[Tensor]) -> Tensor:
        """NFT: masks on MixUp, a pull towards 1, clipped to the floor after each step."""
        generator = torch.Generator().manual_seed(0)
        masks = self.masks()
        optimizer = torch.optim.SGD(masks, lr=0.05, momentum=config.momentum)
        self.model.train()
        pull = config.eta / max(1.0, len(self.labels) / len(self.labels.unique()))
        every, total = max(1, config.steps // 5), 0.0
        periods = max(1, math.ceil(config.steps / every))
        for step in range(config.steps):
            share = min(1.0, (step // every) / periods)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (0.4 + 0.6 * (1 + math.cos(math.pi * share)) / 2)
            indices = torch.randint(len(self.labels), (config.batch_size,), generator=generator)
            images, labels = self.augmented(indices, generator), self.labels[indices].to(self.device)
            part = torch.rand((), generator=generator).to(self.device)
            partner = torch.randperm(len(indices), generator=generator).to(self.device)
            mixed = part * images + (1 - part) * images[partner]
            with self.autocast():
                logits = self.model(mixed).float()
                loss = part * F.cross_entropy(logits, labels) + (1 - part) * F.cross_entropy(logits, labels[partner])
            loss = loss + pull * sum((1 - m).abs().sum() for m in masks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for m, low in zip(masks, lows, strict=True):
                    m.copy_(m.clamp(max=1.0).maximum(low))
            total += float(loss.detach())
        return torch.cat([m.detach() for m in masks])

    def rnp(self, config: RNPConfig, notes: dict[str, Any], thresholds: list[float]) -> Tensor:
        """RNP: as many steps of unlearning as the library took, the recovery, and the same thresholds evaluated."""
        generator = torch.Generator().manual_seed(0)
        original = {k: v.clone() for k, v in self.model.state_dict().items()}
        params = list(self.model.parameters())
        for p in params:
            p.requires_grad_(True)
        loss_before = self.read()[1]
        rate, kept = 0.01, [p.detach().clone() for p in params]
        ascent = torch.optim.SGD(params, lr=rate)
        for _ in range(notes["unlearning steps"]):
            self.model.eval()  # batch norms use their running statistics; there is no dropout
            indices = torch.randperm(len(self.labels), generator=generator)[: config.batch_size]
            with self.autocast():
                loss = -F.cross_entropy(self.model(self.augmented(indices, generator)).float(), self.labels[indices].to(self.device))
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            ascent.param_groups[0]["lr"] = rate
            ascent.step()
            ascent.zero_grad()
            found, new = self.read()
            if not math.isfinite(new) or new > 8 * math.log(CLASSES) or float((found == self.answers).float().mean()) < 1.1 / CLASSES:
                with torch.no_grad():
                    for p, k in zip(params, kept, strict=True):
                        p.copy_(k)
                rate /= 2
                continue
            rate = rate * 1.5 if new - loss_before < 0.1 else rate
            loss_before, kept = new, [p.detach().clone() for p in params]
        masks = self.masks()
        optimizer = torch.optim.SGD(masks, lr=config.alpha * config.recover_lr, momentum=0.9)
        for _ in range(config.recover_epochs):
            self.model.train()
            for indices in torch.randperm(len(self.labels), generator=generator).split(config.batch_size):
                with self.autocast():
                    loss = F.cross_entropy(self.model(self.augmented(indices, generator)).float(), self.labels[indices].to(self.device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    for m in masks:
                        m.clamp_(0.0, 1.0)
        learned = [m.detach().clone() for m in masks]
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if not name.endswith(".mask"):
                    value.copy_(original[name.replace(".norm.", ".")])
            for m in masks:
                m.fill_(1.0)
            self.read()
            for tau in thresholds:
                for m, k in zip(masks, learned, strict=True):
                    m.copy_(((k > tau) | (k >= 1)).float())
                self.read()
        return torch.cat(learned)


def prepared(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A fresh copy, with the options that were asked for."""
    own = copy.deepcopy(model).to(device)
    return own.to(memory_format=torch.channels_last) if args.channels_last else own


def library_run(method: NFT | RNP, base: Context) -> Callable[[nn.Module], Verdict]:
    """The library's side, timed from the call of the method to its verdict."""

    def run(model: nn.Module) -> Verdict:
        ctx = copy.copy(base)
        ctx.model, ctx.generator = model, torch.Generator().manual_seed(0)
        return method(ctx)

    return run


def compare(
    name: str, ours: Callable[[nn.Module], Tensor], plain: Callable[[nn.Module], Tensor], model: nn.Module, args: argparse.Namespace
) -> dict[str, Any]:
    """Time two runs in turns on fresh copies, and hold their masks to each other."""
    device, masks = torch.device(args.device), {}

    def timed(key: str, run: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        def call() -> None:
            masks[key] = run(prepared(model, args, device))

        return call

    times = interleaved({"hf-purify": timed("ours", ours), "plain": timed("plain", plain)}, args.repeats, device, warm=0)
    gap = float((masks["ours"] - masks["plain"].cpu()).abs().max())
    row = {
        "hf-purify": summary(times["hf-purify"]),
        "plain": summary(times["plain"]),
        "over_plain": ratio(times["hf-purify"], times["plain"]),
    }
    print(table([[k, row[k]["median_s"], row[k]["min_s"]] for k in ("hf-purify", "plain")], [name, "s (median)", "s (least)"]))
    print(f"{name}: {row['over_plain']} of the plain loop; the masks differ by at most {gap:.2g}\n", flush=True)
    return {**row, "times_s": {k: [round(t, 3) for t in v] for k, v in times.items()}, "mask_difference": gap}


def options_table(model: nn.Module, base: Context, args: argparse.Namespace) -> dict[str, Any]:
    """The same short NFT run with bf16, with channels-last, with both, and compiled where asked for."""
    device, method = base.device, NFT(steps=max(5, args.steps // 6), batch_size=args.batch)
    kinds = {
        "fp32": ("no", False, False),
        "bf16": ("bf16", False, False),
        "channels-last": ("no", True, False),
        "bf16 + channels-last": ("bf16", True, False),
    }
    if args.compile:
        kinds |= {"compiled": ("no", False, True), "bf16 + compiled": ("bf16", False, True)}
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for name, (precision, last, compiled) in kinds.items():
        own = copy.deepcopy(model).to(device)
        own = own.to(memory_format=torch.channels_last) if last else own
        ctx = copy.copy(base)
        ctx.model = own

        def call(ctx: Context = ctx, precision: str = precision, compiled: bool = compiled) -> None:
            ctx.generator = torch.Generator().manual_seed(0)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                method(ctx)

        if compiled:
            own.compile()
        first[name] = seconds(call, device)
        calls[name] = call
    times = interleaved(calls, args.repeats, device, warm=0)
    rows = {n: {**summary(times[n]), "over_fp32": ratio(times[n], times["fp32"]), "first_run_s": round(first[n], 3)} for n in kinds}
    print(
        table(
            [[n, r["median_s"], r["over_fp32"], r["first_run_s"]] for n, r in rows.items()],
            ["NFT with", "s (median)", "/ fp32", "first run s"],
        )
        + "\n"
    )
    return {"steps": method.config.steps, "kinds": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="NFT steps (default 1000)")
    parser.add_argument("--epochs", type=int, default=20, help="RNP's epochs of recovery (default 20)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--stem", choices=["cifar", "imagenet"], default="cifar")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile among the options (its first run takes long)")
    parser.add_argument("--only", nargs="+", choices=["nft", "rnp", "options"], default=["nft", "rnp", "options"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = network(args.stem)
    data, held_out = examples(model, args.images)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if args.precision == "bf16" else "no")
    base = context(model.to(device), data.batch(torch.arange(2))["pixel_values"].to(device), CLASSES, data, held_out, accelerator)
    assert isinstance(base, Task)
    assert isinstance(base.adapter, VisionAdapter)
    index = base.neurons()
    facts = {k: v for k, v in vars(args).items() if k not in ("output", "device")}
    result: dict[str, Any] = {"machine": machine(device), "settings": facts, "runs": {}}
    checks: list[tuple[str, float, float]] = []

    if "nft" in args.only:
        method = NFT(steps=args.steps, batch_size=args.batch)
        lows = [p.to(device) for p in floors(index, method.config, True).split(index.sizes)]
        run = library_run(method, base)
        found = compare(
            f"NFT, {args.steps} steps",
            lambda m: index.flatten({k: v for k, v in base.index.split(run(m).mask).items() if k in {g.name for g in index}}),
            lambda m: Plain(m, base, args.precision).nft(method.config, lows),
            model,
            args,
        )
        result["runs"]["nft"] = found
        checks.append((f"NFT, {args.steps} steps / plain loop", found["over_plain"], BOUND))
        if args.precision == "fp32":
            checks.append(("NFT: difference of the masks", found["mask_difference"], 0.02))

    if "rnp" in args.only:
        rnp = RNP(recover_epochs=args.epochs, batch_size=args.batch)
        run_rnp = library_run(rnp, base)
        seen: dict[str, Any] = {}

        def ours(m: nn.Module) -> Tensor:
            verdict = run_rnp(m)
            seen["notes"], seen["thresholds"] = verdict.notes, [p["threshold"] for p in verdict.curve[1:]]
            return torch.cat([1 - p for k, p in base.index.split(verdict.scores).items() if k in {g.name for g in index}])

        found = compare(
            f"RNP, {args.epochs} epochs",
            ours,
            lambda m: Plain(m, base, args.precision).rnp(rnp.config, seen["notes"], seen["thresholds"]),
            model,
            args,
        )
        result["runs"]["rnp"] = found | {"unlearning_steps": seen["notes"]["unlearning steps"], "thresholds": len(seen["thresholds"])}
        print(f"RNP took {seen['notes']['unlearning steps']} steps of unlearning and evaluated {len(seen['thresholds'])} thresholds\n")
        checks.append((f"RNP, {args.epochs} epochs / plain loop", found["over_plain"], BOUND))
        if args.precision == "fp32":
            checks.append(("RNP: difference of the masks", found["mask_difference"], 0.02))

    if "options" in args.only:
        result["options"] = options_table(model, base, args)
    return finish(result, checks, args.output)


if __name__ == "__main__":
    sys.exit(main())
