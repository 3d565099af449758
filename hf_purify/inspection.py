"""The parts of a scan that look at single things: the clean samples themselves, samples under suspicion, layers of neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_purify.adapter import Examples, Loaded
from hf_purify.diagnosis import Shown, SuspectLayer, Suspects
from hf_purify.method import Context
from hf_purify.neurons import NeuronIndex
from hf_purify.ranking import Ranker, auroc
from hf_purify.report import QUANTILES
from hf_purify.salience import mad_scores
from hf_purify.task import reading

TOP = 8  # samples that are shown
ODD = 2.5  # MAD score among clean samples of its class, from which one looks as if it carried a trigger
FEWEST = 0.005  # share of the samples, for a warning: one or two may be odd by nature
RIGHT = 0.7  # share of clean samples that a model of its own data gets right at least, as a rule


def look_at_clean(ctx: Context, clean: Examples, classes: int, names: Sequence[str]) -> list[str]:
    """What a reader must know of the clean samples: classes that are missing, a model that is often wrong on them."""
    found = []
    missing = sorted(set(range(classes)) - set(clean.labels.tolist()))
    if missing:
        shown = ", ".join(names[k] if names else str(k) for k in missing[:5]) + (
            "" if len(missing) <= 5 else f" and {len(missing) - 5} more"
        )
        found.append(
            f"the clean samples hold none of {len(missing)} of {classes} classes ({shown}): a backdoor towards these is looked for, too, but its samples are "
            "not compared with any of the class"
        )
    said, right, _ = reading(ctx, clean)
    accuracy = float((said == right).float().mean())
    if accuracy < RIGHT:
        found.append(
            f"the model is right on only {100 * accuracy:.0f} % of the clean samples: they may be of another distribution than it was made for, or wrongly "
            "labelled; the score was calibrated on models that know their data, and says little here"
        )
    return found


def odd_samples(ctx: Context, ranker: Ranker) -> list[str]:
    """A warning where some of the clean samples look as if they carried the trigger themselves."""
    labels = torch.cat([ctx.data.labels, ctx.judged.labels])
    odd = 0
    for k in ranker.triggered:  # planted samples have the attacker's label, and are few beside its genuine ones
        own = ranker.of_clean(k)[labels == k]
        odd += int(((own > 0) & (mad_scores(own) > ODD)).sum()) if len(own) else 0
    if odd < max(2, FEWEST * len(labels)):
        return []
    return [
        f"{odd} of the {len(labels)} clean samples look as if they carried the trigger: a clean set that is poisoned teaches a repair what it should remove. "
        "Rank them with suspects=... (--suspects) and look at the first ones"
    ]


def rank_suspects(ctx: Context, loaded: Loaded, ranker: Ranker, samples: Examples, source: str, poisoned: Tensor | None) -> Suspects:
    """All samples by suspicion, the first ones to look at."""
    scores = ranker(samples)
    order = scores.argsort(descending=True, stable=True)
    area, interval = auroc(scores, poisoned) if poisoned is not None else (math.nan, [])
    return Suspects(
        source=source,
        scores=[round(float(s), 5) for s in scores],
        order=order.tolist(),
        about=ranker.about,
        auroc=None if math.isnan(area) else round(area, 5),
        interval=[round(x, 5) for x in interval],
        poisoned=None if poisoned is None else int(poisoned.sum()),
        top=[_shown(ctx, loaded, samples, int(i)) for i in order[:TOP]],
    )


def _shown(ctx: Context, loaded: Loaded, samples: Examples, row: int) -> Shown:
    adapter, raw = ctx.adapter, samples.raw(row)
    said, _, _ = reading(ctx, samples.select(torch.tensor([row])))
    return Shown(
        label=adapter.say(int(samples.labels[row]), loaded),
        said=adapter.say(int(said[0]), loaded),
        said_triggered="",
        clean=adapter.picture(raw),
        clean_text=adapter.words(raw),
    )


def shown_layers(index: NeuronIndex, scores: Tensor, flags: Tensor) -> list[SuspectLayer]:
    """Suspected neurons by layer, most suspicious first."""
    found = []
    for group, score, flag in zip(index, scores.split(index.sizes), flags.split(index.sizes), strict=True):
        order = score.argsort(descending=True)
        quantiles = np.quantile(score.numpy(), QUANTILES)
        found.append(
            SuspectLayer(group.name, group.role, group.size, [int(i) for i in order if flag[i]], [float(f"{q:.5g}") for q in quantiles])
        )
    return found
