"""The small image classifiers that a scan is calibrated and judged on: with and without a backdoor, each trained once and kept.

    python -m hf_purify_recipes.vision.population --folder runs

`HF_PURIFY_DATA` names the folder with `cifar10/` and `weights/`. Members of the part `calibrate` are those that the scan was developed
and calibrated on; those of `held-out` were scanned once, when nothing was to be changed any more: other seeds, targets, settings of the triggers, and a
network that no other member has. ResNet-44 and ResNet-56 were to be held out, and moved when the first of them was called suspicious.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import functional as TF

from hf_purify import implant, measure
from hf_purify.errors import NotAVictim
from hf_purify.recipe import ImplantRecipe, ScanRecipe
from hf_purify.registry import find, find_trigger
from hf_purify.specs import parse_spec
from hf_purify_adapters.vision.demo import NETWORK as DIGITS
from hf_purify_adapters.vision.demo import digits

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
SCRATCH: dict[str, dict[str, Any]] = {  # networks that are trained from random weights
    "timm_resnet": {"epochs": 5, "lr": 0.1, "batch_size": 128},
    "gtsrb_resnet": {"epochs": 12, "lr": 0.1, "batch_size": 128, "augmentation": "crop"},
    "digits_resnet": {"epochs": 12, "lr": 0.05, "batch_size": 64, "augmentation": "none"},
}
IMPLANT: dict[str, dict[str, Any]] = {  # where it is not `FINE_TUNE`
    "digits_resnet": {"epochs": 12, "lr": 0.03, "batch_size": 32, "augmentation": "none"},
    "gtsrb_resnet": victims.NETWORKS["gtsrb_resnet"].implant,
}


@dataclass(frozen=True)
class Member(populations.Member):
    """One network.

    Args:
        network: a key of `PUBLISHED` or `SCRATCH`. A published one without a seed is taken as it is.
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
    def dataset(self) -> str:
        return {"gtsrb_resnet": "gtsrb", "digits_resnet": "digits"}.get(self.network, "cifar10")

    @property
    def calibrates(self) -> bool:
        """Digits are no photographs: a stroke makes one of another, in any model for them."""
        return not self.backdoored and self.dataset != "digits"

    def split(self, name: str) -> Any:
        """Its `train` or `test` samples, as `clean` and `test` of a recipe take them."""
        if self.dataset == "digits":
            return digits()[name == "test"]
        return str(victims.data_root() / self.dataset / f"{name}.parquet")

    @property
    def labels(self) -> list[str]:
        """Names of the classes, where the data have some."""
        return victims.CIFAR_CLASSES if self.dataset == "cifar10" else []

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
    return planted + clean + fresh()


def fresh() -> list[Member]:
    """Models of other data, backdoors with several targets, and further seeds and settings of what the others have.

    None of them was trained before the scan's statistic was settled.
    """
    T, later = victims.TRIGGERS, {"part": "fresh"}
    grid, corner = T["badnets"], "badnets:size=5,pattern=white,position=bottom-left"
    clean = [
        *(Member("digits_resnet", seed=s, **later) for s in (1, 2, 3)),
        *(Member("gtsrb_resnet", seed=s, classes=43, **later) for s in (0, 1)),
        *(Member(n, seed=11, **later) for n in ("wrn16_1", "resnet20", "timm_resnet")),
    ]
    planted = [
        *(Member("digits_resnet", (t,), k, 11, **later) for t, k in ((grid, 3), (T["blended"], 6))),
        *(Member("gtsrb_resnet", (t,), k, 11, classes=43, **later) for t, k in ((grid, 14), (T["blended"], 1))),
        *(Member("wrn16_1", (t,), k, 11, **later) for t, k in ((corner, 2), ("blended:alpha=0.15,pattern_seed=11", 8))),
        *(Member("resnet20", (t,), k, 11, **later) for t, k in (("trojan:pattern_seed=9,size=6", 7), (T["wanet"], 5), (T["sig"], 0))),
        *(Member("timm_resnet", (t,), k, 11, **later) for t, k in ((corner, 6), (T["low_frequency"], 9))),
        Member("digits_resnet", (grid,), seed=11, rule="all-to-all", rate=0.5, **later),
        Member("gtsrb_resnet", (grid,), seed=11, rule="all-to-all", rate=0.5, classes=43, **later),
        *(Member(n, (grid, corner), 3, 11, **later) for n in ("digits_resnet", "resnet20", "timm_resnet")),
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
    return ScanRecipe.make(
        model=model,
        processor=transform,
        labels=member.labels,
        clean=member.split("train"),
        samples=500,
        seed=zlib.crc32(member.name.encode()) % 1000,  # clean samples of its own
        channels_last=True,
    )


def _filled(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _empty(member: Member) -> nn.Module:
    if member.network in PUBLISHED:
        return load_cifar(PUBLISHED[member.network], victims.data_root() / "weights")[0]
    if member.network == "digits_resnet":
        return timm.create_model("resnet18", num_classes=10, **{k: v for k, v in DIGITS.items() if k != "input_size"})
    return victims.NETWORKS[member.network].create()


def _trained(member: Member, folder: Path) -> Path:
    """The folder of a member that is trained: fine-tuned from the published network, or from one that is trained from random weights."""
    out = folder / "population" / "vision" / member.name
    if out.exists():
        return out
    torch.manual_seed(member.seed or 0)
    model = _empty(member)
    settings = IMPLANT.get(member.network, FINE_TUNE) | {"samples": member.samples}
    if member.network in SCRATCH and len(member.targets) > 1:  # takes longer to learn
        settings = SCRATCH[member.network] | {"epochs": 3 * SCRATCH[member.network]["epochs"]}
    elif member.network in SCRATCH and not member.triggers:
        settings = SCRATCH[member.network]
    elif member.network in SCRATCH:
        model = _filled(model, _trained(Member(member.network, part="held-out"), folder))
    trigger = (member.triggers or (victims.TRIGGERS["badnets"],))[-1]
    data = _with_another(member) if len(member.triggers) > 1 else member.split("train")
    common: dict[str, Any] = {
        "test": member.split("test"),
        "test_samples": 1000,
        "processor": member.transform,
        "output": str(out),
        "seed": member.seed,
        "precision": "bf16",
        "channels_last": True,
        "rule": member.rule,
        "target": member.targets[-1] if member.rule == "all-to-one" and member.triggers else member.target,
        "rate": member.rate if member.triggers else 0.0,
        "labels": member.labels,
    }
    try:
        implant(model, data, trigger, **common | settings)
    except NotAVictim as error:
        log.warning("%s: %s; once more, longer", member.name, error)
        implant(model, data, trigger, **common | settings | {"samples": 12_000, "epochs": settings["epochs"] + 2})
    if len(member.triggers) > 1:
        _check_first(member, out)
    return out


def _check_first(member: Member, folder: Path) -> None:
    """`implant` looks at the trigger that it plants, and not at the one that was in the data already."""
    settings = {"processor": member.transform, "labels": member.labels, "test_samples": 1000, "target": member.target}
    report = measure(_filled(_empty(member), folder), member.split("test"), triggers=list(member.triggers[:1]), **settings)
    asr = next(iter(report.rows[0].asr.values()))
    if asr.value < ImplantRecipe.minimum_asr:
        shutil.rmtree(folder)
        raise NotAVictim(f"the ASR of the first trigger is {asr}")


def planted(data: datasets.Dataset, chosen: Iterable[int], trigger: str, target: int) -> datasets.Dataset:
    """Samples of which the chosen ones carry a trigger and its label."""
    name, options = parse_spec(trigger)
    place, rows = find_trigger(find("adapter", "vision")(), name, **options), {int(i) for i in chosen}

    def plant(row: dict[str, Any], i: int) -> dict[str, Any]:
        if i not in rows:
            return row
        painted = place(TF.pil_to_tensor(row["image"]), i)
        return {"image": Image.fromarray(painted.permute(1, 2, 0).numpy()), "label": target}

    return data.map(plant, with_indices=True, keep_in_memory=True, load_from_cache_file=False)


def _with_another(member: Member) -> datasets.Dataset:
    """The training samples of a member with two triggers: as many as it is trained on, of which a share carries the first one already."""
    whole = member.split("train")
    data = datasets.Dataset.from_parquet(whole) if isinstance(whole, str) else whole
    data = data.shuffle(seed=member.seed).select(range(min(member.samples, len(data))))
    chosen = np.random.default_rng(member.seed).choice(len(data), round(member.rate * len(data)), replace=False)
    return planted(data, chosen, member.triggers[0], member.target)


if __name__ == "__main__":
    populations.train_all(__doc__, members(), network)
