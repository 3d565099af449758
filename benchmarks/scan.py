"""A scan of a ResNet-18 on 500 images beside a repair of it by RNP.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/scan.py --output benchmarks/results/scan-cpu.json

The network is trained for some epochs on the handwritten digits of the demo, so that there is a task to unlearn; the stem of ImageNet on 32 pixels unless told
otherwise. A scan that finds nothing is signals of every kind for ten classes; one that finds something sharpens a trigger, ranks the neurons and looks at the clean
samples as well. Runs are taken in turns.
Exits with 1 where the scan costs more than the repair.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from timing import CLASSES, context, finish, interleaved, machine, network, ratio, summary, table
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from hf_purify.inspection import odd_samples
from hf_purify.methods.rnp import RNP
from hf_purify.ranking import Ranker
from hf_purify.recipe import ScanRecipe
from hf_purify.recovery import recover_for
from hf_purify.scanner import Looked, look
from hf_purify.suspicion import neuron_signals
from hf_purify.task import put_back, snapshot
from hf_purify_adapters.vision.demo import digits
from hf_purify_adapters.vision.examples import ImageExamples

BOUND = 1.0
EPOCHS, BATCH = 6, 50
STEPS = ScanRecipe(model="any", clean="any").trigger_steps


def examples(count: int) -> tuple[ImageExamples, ImageExamples]:
    """Digits to learn from and to judge on."""
    rows = digits()[0].select(range(count))
    raws = [pil_to_tensor(image) for image in rows["image"]]
    labels, cut = torch.tensor(rows["label"]), count * 4 // 5

    def prepare(images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images).float() / 127.5 - 1

    return ImageExamples(raws[:cut], labels[:cut], prepare), ImageExamples(raws[cut:], labels[cut:], prepare)


def fit(model: nn.Module, data: ImageExamples) -> None:
    """Train the network on the digits."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data)).split(BATCH):
            batch = data.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()
    model.eval().requires_grad_(True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="imagenet")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, device = network(given.stem), torch.device("cpu")
    data, held_out = examples(given.images)
    fit(model, data)
    ctx = context(model, torch.randn(2, 3, 32, 32), CLASSES, data, held_out)
    start = copy.deepcopy(snapshot(model))
    seconds: dict[str, float] = {}

    def signals() -> Looked:
        put_back(model, start)
        ctx.generator.manual_seed(0)
        looked = look(ctx)
        seconds.update(looked.seconds)
        return looked

    def suspicious() -> None:
        looked = signals()
        begun = looked.shortcuts["patch"].found
        assert begun is not None
        target = int(begun.classes[0])
        found = recover_for(ctx, "patch", [target], STEPS, begun)
        neuron_signals(ctx, ctx.neurons(), looked.forgotten, found)
        odd_samples(ctx, Ranker(ctx, looked.forgotten, [target], found))

    def rnp() -> None:
        put_back(model, start)
        ctx.generator.manual_seed(0)
        RNP()(ctx)

    times = interleaved({"rnp": rnp, "nothing found": signals, "suspicious": suspicious}, given.repeats, device, warm=0)
    rows = {name: {**summary(t), "over_plain": ratio(t, times["rnp"])} for name, t in times.items()}
    print(table([[n, r["median_s"], r["over_plain"]] for n, r in rows.items()], ["side", "seconds", "/ rnp"]))
    result = {
        "benchmark": "scan",
        "settings": vars(given) | {"output": None},
        "machine": machine(device),
        "sides": rows,
        "parts of the last scan, wall s": seconds,
    }
    bounds = [(f"scan, {name} / rnp", rows[name]["over_plain"], BOUND) for name in ("nothing found", "suspicious")]
    return finish(result, bounds, given.output)


if __name__ == "__main__":
    sys.exit(main())
