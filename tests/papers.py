"""An output folder as `purify` writes it, made by hand: a base, a repair of it, and a report with figures that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_purify.cards import make_card
from hf_purify.hub import read_metadata
from hf_purify.masks import MASK_FILE, save_mask
from hf_purify.metrics import Proportion
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice
from hf_purify.provenance import Provenance, write_provenance
from hf_purify.report import Report
from hf_purify.rows import Row

INDEX = NeuronIndex((NeuronGroup("fc", 3, (ParamSlice("fc.weight", 1),)),))
SHA = "0123456789abcdef0123456789abcdef01234567"


def base_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"fc.weight": torch.arange(1.0, 7.0).view(2, 3), "fc.bias": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "id2label": {"0": "cat", "1": "dog"}}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [theirs]\n---\n# Theirs\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def report_of(cost: int = 0, **changes: Any) -> Report:
    """A repair that lost `cost` of 200 right answers, and took an ASR from 98 % to 3 %."""
    rows = [
        Row("none", "unrepaired", Proportion(190, 200), {"badnets": Proportion(176, 180)}),
        Row("rnp", "method", Proportion(190 - cost, 200), {"badnets": Proportion(5, 180)}, der={"badnets": 0.97}, seconds=3.2),
        Row("fine_tune", "control", Proportion(189, 200), {"badnets": Proportion(175, 180)}, der={"badnets": 0.5}),
    ]
    facts: dict[str, Any] = {
        "title": "rnp on some-org/model",
        "task": "image-classification",
        "checkpoint": {"source": "some-org/model", "revision": SHA, "kind": "transformers", "architecture": "ResNetForImageClassification"},
        "clean": {
            "source": "some-org/pictures",
            "revision": SHA,
            "split": "train",
            "samples": 100,
            "held_out": 20,
            "fingerprint": "f" * 32,
        },
        "test": {"source": "some-org/pictures", "revision": SHA, "split": "test"},
        "method": {"name": "rnp", "config": {"max_loss": 0.02}},
        "rows": rows,
        "versions": {"torch": "2.14.1"},
        "command": "hf-purify purify some-org/model --clean some-org/pictures --method rnp",
        "warnings": ["look twice"],
    }
    return Report(**facts | changes)


def output_at(folder: Path, report: Report | None = None, kind: str = "checkpoint", complete: bool = True, name: str = "out") -> Provenance:
    """A base in `folder/base`, and its repair in `folder/NAME`."""
    base, out, report = base_at(folder / "base"), folder / name, report or report_of()
    out.mkdir()
    mask = torch.tensor([1.0, 0.0, 0.5])
    save_file(
        {"fc.weight": torch.arange(1.0, 7.0).view(2, 3) * mask, "fc.bias": torch.zeros(2)}, out / "model.safetensors", {"format": "pt"}
    )
    for file in ("config.json", "tokenizer.json"):
        (out / file).write_bytes((base / file).read_bytes())
    save_mask(out / MASK_FILE, INDEX, mask, complete=complete)
    (out / "report.json").write_text(report.to_json())  # without the page, whose pictures take their time
    return write_provenance(out, kind, report, base, lambda found: make_card(report, found, name, read_metadata(base)))
