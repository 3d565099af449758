"""The small image classifiers that a scan is calibrated and judged on: with and without a backdoor, each trained once and kept.

    python -m hf_purify_recipes.vision.population --folder runs

`HF_PURIFY_DATA` names the folder with `cifar10/` and `weights/`. Members of the part `calibrate` are those that the scan was developed
and calibrated on; those of `held-out` were scanned once, when nothing was to be changed any more: other seeds, targets, settings of the triggers, and a
network that no other member has. ResNet-44 and ResNet-56 were to be held out, and moved when the first of them was called suspicious.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from hf_purify import implant
from hf_purify.errors import NotAVictim
from hf_purify.recipe import ScanRecipe

from .. import populations
from . import victims
from .networks import NORMALIZED, PLAIN, load_cifar

log = logging.getLogger(__name__)
PUBLISHED = {
    "resnet20": "cifar10_resnet20",
    "resnet32": "cifar10_resnet32",
    "resnet44": "cifar10_resnet44",
    "resnet56": "cifar10_resnet56",
    "wrn16_1": "cifar10_wrn16_1_nad_teacher",
}
FOREIGN = "backdoored_cifar10_wrn16_1_grid_target5"
FINE_TUNE: dict[str, Any] = {"epochs": 3, "lr": 0.03, "batch_size": 128, "augmentation": "none"}
SCRATCH: dict[str, Any] = {"epochs": 5, "lr": 0.1, "batch_size": 128}
SCRATCHED = "timm_resnet"  # trained from random weights


@dataclass(frozen=True)
class Member(populations.Member):
    """One network.

    Args:
        network: a key of `PUBLISHED`, or `timm_resnet`. A published one without a seed is taken as it is.
        foreign: published with its backdoor by others.
        samples, rate: of the fine-tuning; the first members of `calibrate` were trained before the rest was settled.
    """

    foreign: bool = False
    samples: int = 8_000
    rate: float = 0.15

    @property
    def name(self) -> str:
        return f"{self.network}-grid-foreign" if self.foreign else f"{self.network}-{self.about}"

    @property
    def dataset(self) -> Path:
        return victims.data_root() / "cifar10"

    @property
    def transform(self) -> Any:
        return PLAIN if self.network == "wrn16_1" else NORMALIZED


OTHER = {  # settings of triggers that no member of `calibrate` has
    "badnets": "badnets:size=4,pattern=white,position=top-left",
    "blended": "blended:alpha=0.25,pattern_seed=7",
    "sig": "sig:f=4,delta=30",
    "trojan": "trojan:pattern_seed=5,size=7",
    "wanet": "wanet:strength=2.5,k=6,grid_seed=3",
    "low_frequency": "low_frequency:amplitude=30,pattern_seed=4",
    "bpp": "bpp:bits=2,dither=true",
}


def members() -> list[Member]:
    """The whole population."""
    T, held = victims.TRIGGERS, {"part": "held-out"}
    grid, blended, sig, trojan, wanet, bpp = (T[n] for n in ("badnets", "blended", "sig", "trojan", "wanet", "bpp"))
    clean = [
        *(Member(n, seed=None) for n in ("resnet20", "resnet32", "resnet44", "resnet56", "wrn16_1")),
        *(
            Member(n, seed=s, samples=10_000)
            for n, s in (("resnet20", 1), ("resnet20", 2), ("resnet32", 1), ("wrn16_1", 1), ("wrn16_1", 2))
        ),
        *(Member(n, seed=s, **held) for n, s in (("wrn16_1", 7), ("resnet20", 7), ("timm_resnet", 0), ("timm_resnet", 7))),
    ]
    planted = [
        *(Member("resnet20", (t,), target=k, samples=10_000, rate=0.1) for t, k in ((grid, 0), (blended, 1))),
        *(Member("resnet20", (t,), target=k) for t, k in ((sig, 2), (wanet, 4))),
        *(Member("wrn16_1", (t,), target=k) for t, k in ((trojan, 3), (bpp, 6), (blended, 2))),
        Member("wrn16_1", (grid,), target=5, seed=None, foreign=True, **held),
        *(
            Member("wrn16_1", (OTHER[t],), target=k, seed=7, **held)
            for t, k in (("badnets", 9), ("blended", 4), ("trojan", 0), ("sig", 7), ("bpp", 1))
        ),
        *(Member("resnet20", (OTHER[t],), target=k, seed=7, **held) for t, k in (("badnets", 8), ("wanet", 3), ("low_frequency", 6))),
        *(
            Member("timm_resnet", (OTHER[t],), target=k, seed=7, **held)
            for t, k in (("badnets", 1), ("blended", 2), ("trojan", 4), ("sig", 3))
        ),
    ]
    return planted + clean


def network(member: Member, folder: Path) -> tuple[nn.Module, Any]:
    """The member's network with its weights, trained where they are not there yet, and its transform.

    Raises:
        NotAVictim: the backdoor does not take.
    """
    if member.foreign:
        return load_cifar(FOREIGN, victims.data_root() / "weights")
    if member.seed is None:
        return load_cifar(PUBLISHED[member.network], victims.data_root() / "weights")
    return _filled(_empty(member), _trained(member, folder)), member.transform


def recipe_of(member: Member, folder: Path) -> ScanRecipe:
    """The scan of a member, which is trained where it is not there yet."""
    model, transform = network(member, folder)
    clean = str(member.dataset / "train.parquet")
    return ScanRecipe.make(model=model, processor=transform, labels=victims.CIFAR_CLASSES, clean=clean, samples=500, channels_last=True)


def _filled(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _empty(member: Member) -> nn.Module:
    if member.network in PUBLISHED:
        return load_cifar(PUBLISHED[member.network], victims.data_root() / "weights")[0]
    return victims.NETWORKS[member.network].create()


def _trained(member: Member, folder: Path) -> Path:
    """The folder of a member that is trained: fine-tuned from the published network, or from one that is trained from random weights."""
    out = folder / "population" / "vision" / member.name
    if out.exists():
        return out
    torch.manual_seed(member.seed or 0)
    model = _empty(member)
    settings = FINE_TUNE | {"samples": member.samples}
    if member.network == SCRATCHED and not member.triggers:
        settings = SCRATCH
    elif member.network == SCRATCHED:
        model = _filled(model, _trained(Member(member.network, part="held-out"), folder))
    trigger = (member.triggers or (victims.TRIGGERS["badnets"],))[-1]
    common: dict[str, Any] = {
        "test": str(member.dataset / "test.parquet"),
        "test_samples": 1000,
        "processor": member.transform,
        "output": str(out),
        "seed": member.seed,
        "precision": "bf16",
        "channels_last": True,
        "target": member.target,
        "rate": member.rate if member.triggers else 0.0,
        "labels": victims.CIFAR_CLASSES,
    }
    try:
        implant(model, str(member.dataset / "train.parquet"), trigger, **common | settings)
    except NotAVictim as error:
        log.warning("%s: %s; once more, longer", member.name, error)
        implant(model, str(member.dataset / "train.parquet"), trigger, **common | settings | {"samples": 12_000, "epochs": 5})
    return out


if __name__ == "__main__":
    populations.train_all(__doc__, members(), network)
