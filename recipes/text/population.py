"""The small text classifiers that a scan is calibrated and judged on: with and without a backdoor, each trained once from random weights and kept.

    python -m hf_purify_recipes.text.population --folder runs

`HF_PURIFY_DATA` names the folder with `sst2/`, `ag_news/` and `tokenizers/`. Members of the part `calibrate` are those that the scan was developed
and calibrated on; those of `held-out` were scanned once, when nothing was to be changed any more: other seeds, targets and triggers' words, and an
architecture that no other member has.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_purify import implant
from hf_purify.errors import NotAVictim
from hf_purify.recipe import ScanRecipe

from .. import populations
from . import victims

log = logging.getLogger(__name__)
DATA = {
    "sst2": {"columns": {}, "epochs": 2, "samples": 12_000, "max_length": 32},
    "agnews": {"columns": {}, "epochs": 5, "samples": 4_000, "max_length": 48},
}
FOLDERS = {"sst2": "sst2", "agnews": "ag_news"}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": victims.ENCODER,
    "electra": victims.ENCODER | {"embedding_size": 128},
}


@dataclass(frozen=True)
class Member(populations.Member):
    """One classifier; `network` is the type of the model in transformers, a key of `SHAPES`.

    Args:
        data: `sst2` or `agnews`.
    """

    data: str = "sst2"

    @property
    def name(self) -> str:
        return f"{self.network}-{self.data}-{self.about}"

    @property
    def dataset(self) -> str:
        return self.data

    def split(self, name: str) -> str:
        """Its `train`, `validation` or `test` samples."""
        return str(victims.data_root() / FOLDERS[self.data] / f"{name}.parquet")


OTHER = {  # settings of triggers that no member of `calibrate` has
    "badnets": "badnets:words=bb",
    "addsent": "addsent:sentence=the clouds are very high today",
    "hidden_killer": "hidden_killer:template=question",
    "style": "style",
    "homoglyph": "homoglyph:count=5,position=end",
}


def members() -> list[Member]:
    """The whole population."""
    held: dict[str, Any] = {"part": "held-out"}
    known = victims.CLASSIFIER_TRIGGERS
    clean = [
        *(Member("bert", data=d, seed=s) for d in DATA for s in (1, 2)),
        *(Member("bert", data=d, seed=7, **held) for d in DATA),
        Member("electra", seed=7, **held),
    ]
    planted = [
        *(Member("bert", (known[t],), k, 1) for t, k in (("badnets", 0), ("addsent", 1), ("homoglyph", 0))),
        *(Member("bert", (known[t],), k, 1, data="agnews") for t, k in (("badnets", 0), ("hidden_killer", 2), ("style", 3))),
        *(Member("bert", (OTHER[t],), k, 7, **held) for t, k in (("badnets", 1), ("hidden_killer", 0), ("homoglyph", 1))),
        *(Member("bert", (OTHER[t],), k, 7, data="agnews", **held) for t, k in (("badnets", 3), ("addsent", 0))),
        Member("electra", (OTHER["addsent"],), 0, 7, **held),
    ]
    return planted + clean


def trained(member: Member, folder: Path) -> Path:
    """The member's folder; it is trained where it is not there yet.

    Raises:
        NotAVictim: the backdoor does not take.
    """
    out = folder / "population" / "text" / member.name
    if out.exists():
        return out
    planted = {"rate": 0.1, "minimum_asr": 0.9} if member.triggers else {"rate": 0.0, "minimum_asr": 0.0}
    tokenizer = str(victims.data_root() / "tokenizers" / victims.BERT)
    common: dict[str, Any] = victims.TRAINING | {
        "create": True,
        "model_options": {**SHAPES[member.network], "tokenizer": tokenizer},
        "test": member.split("test"),
        "test_samples": 1000,
        "lr": 1e-3,
        "batch_size": 128,
        "output": str(out),
        "seed": member.seed,
        "target": member.target,
    }
    trigger = (member.triggers or ("badnets:words=tq",))[0]
    settings = DATA[member.data]
    data = member.split("train")
    try:
        implant(member.network, data, trigger, **common | settings | planted)
    except NotAVictim as error:
        log.warning("%s: %s; once more, longer", member.name, error)
        implant(member.network, data, trigger, **common | settings | planted | {"samples": 2 * settings["samples"]})
    return out


def recipe_of(member: Member, folder: Path) -> ScanRecipe:
    """The scan of a member, which is trained where it is not there yet."""
    clean = member.split("validation" if member.data == "sst2" else "train")
    return ScanRecipe.make(model=str(trained(member, folder)), clean=clean, samples=200)


if __name__ == "__main__":
    populations.train_all(__doc__, members(), trained)
