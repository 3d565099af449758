"""Diagnoses of every kind, made up, for tests of what shows and keeps them."""

from __future__ import annotations

import math

import numpy as np

from hf_purify.diagnosis import Diagnosis, FoundTrigger, Shown, Signal, SuspectLayer, Suspects
from hf_purify.metrics import Proportion

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def picture(seed: int, patch: bool = False) -> np.ndarray:
    """A picture of 32 x 32 with smooth colours, with a checkerboard in its corner where asked for."""
    rows, columns = np.mgrid[0:32, 0:32] / 32
    waves = [127 + 120 * np.sin((seed + c + 2) * rows + (seed % 5 + c) * columns) for c in range(3)]
    found = np.stack(waves, -1).astype(np.uint8)
    if patch:
        found[-4:, -4:] = 255 * (np.indices((4, 4)).sum(0) % 2)[..., None]
    return found


def shown(k: int, triggered: bool = True, text: bool = False) -> Shown:
    name = CLASSES[k % 10]
    if text:
        return Shown(name, name, "dog", clean_text=f"sample {k} says this", triggered_text=f"sample {k} says cf this")
    return Shown(name, name, "dog" if triggered else name, clean=picture(k), triggered=picture(k, True))


def make_diagnosis(kind: str = "single-target", text: bool = False, hostile: str = "") -> Diagnosis:
    """A diagnosis.

    Args:
        kind: one of `diagnosis.KINDS`.
        text: of a text model, whose triggers are words.
        hostile: put into every text that a stranger may have written.
    """
    found = kind not in ("none", "unjudged")
    targets = {"single-target": [5], "multi-target": [5, 7]}.get(kind, [])
    base = np.array([0.3, 0.5, 0.2, 0.8, 0.4, 0.6, 0.1, 0.35, 0.55, 0.45])
    values = base + np.array([3.5 if k in targets else 0 for k in range(10)])
    signals = [
        Signal(
            "patch",
            "How much cheaper a patch towards a class is than towards the others.",
            values.tolist(),
            2.1,
            float(values.max()),
            0.004 if found else 0.6,
        ),
        Signal("warp", "How much cheaper a warp towards a class is than towards the others.", (0.7 * base).tolist(), 2.4, 0.6, 0.5),
        Signal(
            "unlearned model",
            "Share of the errors that fall to a class while the clean task is unlearned.",
            (values / values.sum()).tolist(),
            0.6,
            0.5,
            0.02 if found else 0.7,
        ),
        Signal("words", "How far words lead.", unavailable="not available for vision"),
    ]
    rng = np.random.default_rng(0)
    layers = [
        SuspectLayer(
            f"layer{s}.{b}.bn{n}",
            "norm",
            16 * s,
            sorted(rng.permutation(16 * s)[: s if found else 0].tolist()),
            sorted(rng.normal(size=7).tolist()),
        )
        for s in (1, 2, 3)
        for b in (0, 1)
        for n in (1, 2)
    ]
    triggers = [
        FoundTrigger(
            t,
            CLASSES[t] + hostile,
            "words" if text else "patch",
            Proportion(93, 97),
            0.02,
            f"cf, tq {hostile}" if text else "",
            None if text else picture(3, True),
            [shown(k, text=text) for k in range(6)],
        )
        for t in targets
    ]
    suspects = Suspects(
        f"suspects.parquet{hostile}",
        rng.random(200).tolist(),
        list(range(200)),
        "Confidence of the unlearned model.",
        0.981,
        [0.96, 0.99],
        20,
        [shown(k, text=text) for k in range(8)],
    )
    return Diagnosis(
        title=f"Scan of some-org/resnet-20{hostile}",
        task="text-classification" if text else "image-classification",
        suspicious=found,
        score=math.nan if kind == "unjudged" else 0.996 if found else 0.42,
        threshold=0.95,
        kind="none" if kind == "unjudged" else kind,
        targets=targets,
        labels=[f"{c}{hostile}" for c in CLASSES],
        signals=signals,
        layers=layers,
        neurons=sum(layer.size for layer in layers),
        ranked_by="unlearning weight change and recovered mask",
        agreement={"weight change / mask": 0.41, "weight change / salience": -0.1},
        triggers=triggers,
        suspects=suspects if found else None,
        calibration={"clean models": 11, "backdoored models": 22, "false positives": "1 of 12", "found": "23 of 25"},
        checkpoint={"source": f"some-org/resnet-20{hostile}", "architecture": "ResNet", "parameters": 272474, "classes": 10},
        clean={"source": "org/data", "samples": 500},
        config={"samples": 500},
        seconds={"triggers": 21.0, "unlearning": 4.2},
        versions={"torch": "2.9.0"},
        command="hf-purify scan some-org/resnet-20 --clean org/data",
        warnings=[f"5 of the clean samples look suspicious themselves{hostile}"] if found else [],
    )
