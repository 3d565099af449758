"""Texts with tokens put into them, to see what those do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_purify.adapter import Batch

from .examples import IGNORED

ROWS = 256
READ = ("input_ids", "attention_mask", "token_type_ids")

Logits = Callable[[Batch], Tensor]


def continues(batch: Batch) -> bool:
    """Does the answer stand behind the text, in the same row?"""
    return "target_ids" in batch and int(batch["target_ids"][0, 0]) == IGNORED


def first_of(aims: Tensor) -> Tensor:
    """Where each answer begins, `(B,)`."""
    return (aims != IGNORED).int().argmax(1)


def aims_of(batch: Batch) -> Tensor:
    """What each place should say, `(B, T)`: of an answer in the row of its text, the token behind."""
    aims = batch["target_ids"]
    return F.pad(aims[:, 1:], (0, 1), value=IGNORED) if continues(batch) else aims


def put(batch: Batch, phrases: Tensor, start: int, most: int) -> Batch:
    """Each text of a batch with each of the phrases `(T, L)` in it: `T * B` rows, those of a phrase together.

    Args:
        start: tokens in front of it.
        most: tokens that the model can read. What fits no more takes the place of the text's own.
    """
    texts, width = batch["input_ids"].shape
    room = max(0, min(phrases.shape[1], most - width))
    longer = dict(batch)
    for k in READ:
        if k in batch:
            longer[k] = torch.cat([batch[k][:, :start], batch[k][:, :1].expand(-1, room), batch[k][:, start:]], 1)
    if continues(batch):
        longer["target_ids"] = F.pad(batch["target_ids"], (room, 0), value=IGNORED)
    many = {k: v.repeat(len(phrases), *[1] * (v.dim() - 1)) for k, v in longer.items()}
    place = slice(start, start + phrases.shape[1])
    many["input_ids"][:, place] = phrases.repeat_interleave(texts, 0)[:, : many["input_ids"][:, place].shape[1]]
    return many


def each(batch: Batch, phrases: Tensor, start: int, most: int, read: Callable[[Batch], Tensor]) -> Tensor:
    """What `read` says `(t, ...)` of `t` phrases at a time in all texts, `(T, ...)` of all."""
    parts = phrases.split(max(1, ROWS // len(batch["labels"])))
    bar = tqdm(parts, desc="try every token", delay=2.0, leave=False, disable=None)
    return torch.cat([read(put(batch, some, start, most)).cpu() for some in bar])
