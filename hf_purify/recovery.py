"""Triggers recovered for suspected classes, and how often they reach them on clean samples that took no part in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_purify.adapter import Batch, Examples, Loaded
from hf_purify.diagnosis import FoundTrigger, Shown
from hf_purify.inversion import copied, invert, recover
from hf_purify.method import Context
from hf_purify.metrics import Proportion
from hf_purify.stand_in import StandIn
from hf_purify.task import fetch, mode

BATCH = 50
FIRST = 25  # steps more for triggers that begin with nothing
SHOWN = 6


def recover_for(ctx: Context, kind: str, targets: Sequence[int], steps: int, begun: StandIn | None = None) -> StandIn:
    """Triggers of a kind for the suspected classes, one for each, from the model as it came: what they reach is measured on that one.

    Args:
        begun: triggers of the kind for these classes and others, to go on from; without them there are more steps.
    """
    ctx.generator.manual_seed(ctx.generator.initial_seed() + 1)
    at = begun.classes.tolist() if begun is not None else []
    if begun is not None and set(targets) <= set(at):
        found = copied(ctx, kind, [(begun, at.index(k), k) for k in targets])
    else:
        found, steps = recover(ctx, kind, torch.tensor(targets), 0), steps + FIRST
    invert(ctx, found, steps * len(targets), batch_size=BATCH)
    return found


def describe(ctx: Context, loaded: Loaded, kind: str, found: StandIn, position: int) -> FoundTrigger:
    """One recovered trigger: how often it reaches its class on held-out clean samples, and what it looks like."""
    target = int(found.classes[position])
    data = ctx.judged
    others = (data.labels != target).nonzero().flatten()
    hits = 0
    for rows in others.split(ctx.adapter.at_once):
        hits += int((say(ctx, placed(ctx, found, data, rows, position)) == target).sum())
    return FoundTrigger(
        target=target,
        label=ctx.adapter.say(target, loaded),
        kind=kind,
        asr=Proportion(hits, len(others)),
        size=float(found.size()[position].detach()),
        words=found.describe() if len(found.classes) == 1 else "",
        picture=_alone(ctx, found, data, position),
        samples=[_shown(ctx, loaded, found, data, int(row), position) for row in _various(data, others)],
    )


def placed(ctx: Context, found: StandIn, data: Examples, rows: Tensor, position: int) -> Batch:
    """Samples with one of the recovered triggers on them."""
    batch = {k: v.to(ctx.device) for k, v in data.batch(rows).items()}
    which = torch.full((len(rows),), position, device=ctx.device)
    with torch.no_grad():
        return found.place(batch, which)


def say(ctx: Context, batch: Batch) -> Tensor:
    """The model's classes `(B,)` of a batch."""
    with mode(ctx.model, "eval"), torch.no_grad(), ctx.accelerator.autocast():
        return ctx.logits(batch).argmax(-1).cpu()


def _various(data: Examples, rows: Tensor) -> list[int]:
    """A few samples, of different classes first."""
    firsts = [int(rows[data.labels[rows] == c][0]) for c in data.labels[rows].unique()]
    return [*firsts, *(int(r) for r in rows if int(r) not in firsts)][:SHOWN]


def _shown(ctx: Context, loaded: Loaded, found: StandIn, data: Examples, row: int, position: int) -> Shown:
    adapter, rows = ctx.adapter, torch.tensor([row])
    clean = {k: v.to(ctx.device) for k, v in data.batch(rows).items()}
    triggered = placed(ctx, found, data, rows, position)
    before, after = (adapter.unprepare(batch, 0, data) for batch in (clean, triggered))
    return Shown(
        label=adapter.say(int(data.labels[row]), loaded),
        said=adapter.say(int(say(ctx, clean)[0]), loaded),
        said_triggered=adapter.say(int(say(ctx, triggered)[0]), loaded),
        clean=None if before is None else adapter.picture(before),
        triggered=None if after is None else adapter.picture(after, before),
        clean_text="" if before is None else adapter.words(before),
        triggered_text="" if after is None else adapter.words(after),
    )


def _alone(ctx: Context, found: StandIn, data: Examples, position: int) -> Any:
    """The trigger by itself: on an input of one middle value, crossed by lines, so that a warp is to be seen too; None of texts and clouds."""
    batch = fetch(ctx, torch.arange(1))
    values = batch.get("pixel_values")
    if values is None:
        return None
    low, high = float(values.min()), float(values.max())
    sheet = torch.full_like(values, (low + high) / 2)
    step = max(4, values.shape[-1] // 8)
    sheet[..., ::step, :] = sheet[..., :, ::step] = low + 0.35 * (high - low)
    with torch.no_grad():
        shown = found.place({**batch, "pixel_values": sheet}, torch.tensor([position], device=ctx.device))
    raw = ctx.adapter.unprepare(shown, 0, data)
    return None if raw is None else ctx.adapter.picture(raw)
