"""Recovered text triggers: words that turn any text into one class, or make a model write something else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_purify.adapter import Batch, Examples, StandIn

from .examples import IGNORED
from .loading import places
from .prompts import CLASSIFIER

PROBES = 2  # texts of each class that every token is tried on, the shortest that are no less than `SHORT` tokens, about
SHORT = 12
MOST = 16  # of them
BEST = 1024  # tokens that are tried again, an equal part of them for each class
AGAIN = 32  # texts for that
ROWS = 256
SHARP = 4.0  # log-odds are raised to this power in the first draws: what stands out is drawn most


class Words(StandIn):
    """A few words put somewhere into each text, drawn anew each time from those that lead to the class by themselves.

    Of a model that writes, class 1 is whatever an attacker wants: not known, but for that it is not the right answer.

    Every token of the vocabulary is tried on a few short clean texts of other classes, and the `pool` best of each class are kept: the
    word of a trigger is among them, and the telling ones of a sentence. They are drawn as often as their odds say, and then as gradients
    through the draw do (GBDA, Guo et al., EMNLP 2021, arXiv 2104.13733). Learned from nothing over the whole vocabulary, the draws end at
    natural words, of which there are many.
    """

    words: ClassVar[int] = 2
    pool: ClassVar[int] = 64
    candidates: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Callable[[Batch], Tensor]) -> None:
        super().__init__(data, classes, generator, logits)
        found = log_odds(data, logits)
        best = found.topk(min(self.pool, int(torch.isfinite(found[0]).sum())), dim=1)
        self.register_buffer("candidates", best.indices[classes])
        self.scores = nn.Parameter(SHARP * best.values[classes][:, None].repeat(1, self.words, 1))
        self.draws = int(torch.randint(2**31, (1,), generator=generator))

    @classmethod
    def look(cls, data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor:
        """`exp(-lead)`, `(K,)`: by how much log-odds the best token of a class leads the last one of its pool.

        Each class has words that tell of it, and some classes more than others: only within a class does a trigger stand out.
        """
        found = log_odds(data, logits)
        best = found.topk(min(cls.pool, int(torch.isfinite(found[0]).sum()))).values
        return (best[:, -1] - best[:, 0]).exp()

    def place(self, batch: Batch, which: Tensor) -> Batch:
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        scores = self.scores.index_select(0, which)
        noise = -torch.empty(scores.shape).exponential_(generator=generator).log().to(scores)
        soft = (scores + noise).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        shortest = int((_first(batch["target_ids"]) if _continues(batch) else batch["attention_mask"].sum(1)).min())
        place = int(torch.randint(1, max(2, shortest), (1,), generator=generator))
        return {**batch, "words": hard + soft - soft.detach(), "candidates": self.candidates[which], "place": torch.tensor(place)}

    def size(self) -> Tensor:
        return 0 * self.scores.sum((1, 2))

    def shrink(self, limits: Tensor) -> None:
        """There is nothing to shrink: the number of words is fixed."""


def writes(data: Examples) -> bool:
    """Are the texts a model's that writes?"""
    return data.prompt.kind != CLASSIFIER  # type: ignore[attr-defined]


_LAST: dict[bytes, Tensor] = {}  # the last scan, by what the model said of the probes: a repair asks twice


@torch.no_grad()
def log_odds(data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor:
    """How far each token, put after the first one of a text, leads to each class: mean log-odds on texts of other classes, `(K, V)`.

    Of a model that writes, to class 1: by how much it raises the mean log-odds of any one token to open the answer. All tokens are tried on a
    few texts, the best of each class on more; the others, and special tokens, lead nowhere: minus infinity.
    """
    prompt = data.prompt  # type: ignore[attr-defined]
    tokens = torch.arange(len(prompt.tokenizer))
    tokens = tokens[~torch.isin(tokens, torch.tensor(prompt.tokenizer.all_special_ids))]
    few, many = _probes(data, PROBES, MOST), _probes(data, AGAIN, AGAIN)
    key = logits(many).float().cpu().numpy().tobytes()
    if key not in _LAST:
        first = _led(few, tokens, logits)
        best = first.topk(min(BEST // len(first), len(tokens))).indices.unique()
        second = _led(many, tokens[best], logits)
        found = torch.full((len(second), len(prompt.tokenizer)), -math.inf)
        found[:, tokens[best]] = second
        _LAST.clear()
        _LAST[key] = torch.cat([-found.abs(), found]) if writes(data) else found
    return _LAST[key]


def _probes(data: Examples, of_each: int, most: int) -> Batch:
    """Short texts, as many of each class."""
    classes = data.labels.unique()
    of_each = max(1, min(of_each, most // len(classes)))
    short = [sorted((data.labels == c).nonzero().flatten().tolist(), key=lambda i: _oddness(data, i))[:of_each] for c in classes]
    batch = data.batch(torch.tensor([row for rows in short for row in rows][: max(2, most)]))
    return _opening(batch) if writes(data) else batch


def _led(batch: Batch, tokens: Tensor, logits: Callable[[Batch], Tensor]) -> Tensor:
    """The log-odds of `tokens` `(T,)` on the texts of a batch, `(K, T)`; `(1, T)` of a model that writes."""
    labels, written = batch["labels"], "target_ids" in batch
    longer = {k: torch.cat([v[:, :1], v[:, :1], v[:, 1:]], 1) if k in _READ else v for k, v in batch.items()}
    if _continues(batch):
        longer["target_ids"] = F.pad(batch["target_ids"], (1, 0), value=IGNORED)
    usual = _odds(logits(batch).float().log_softmax(-1).cpu().mean(0))
    count, found = len(labels), []
    for some in tqdm(tokens.split(max(1, ROWS // count)), desc="try every token", delay=2.0, leave=False, disable=None):
        tried = {k: v.repeat(len(some), *[1] * (v.dim() - 1)) for k, v in longer.items()}
        tried["input_ids"][:, 1] = some.repeat_interleave(count)
        log_p = logits(tried).float().log_softmax(-1).cpu().view(len(some), count, -1)
        if written:
            found.append((_odds(log_p.mean(1)) - usual).amax(1)[None])
        else:
            found.append(torch.stack([_odds(log_p[:, labels != k, k].mean(1)) for k in range(log_p.shape[2])]))
    return torch.cat(found, 1)


def _odds(log_p: Tensor) -> Tensor:
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


_READ = ("input_ids", "attention_mask", "token_type_ids")


def _continues(batch: Batch) -> bool:
    """Does the answer stand behind the text, in the same row?"""
    return "target_ids" in batch and batch["target_ids"].shape == batch["input_ids"].shape


def _first(aims: Tensor) -> Tensor:
    """Where each answer begins, `(B,)`."""
    return (aims != IGNORED).int().argmax(1)


def _opening(batch: Batch) -> Batch:
    """The batch with only the first token of each answer."""
    aims, first = batch["target_ids"], _first(batch["target_ids"])
    alone = torch.full_like(aims, IGNORED).scatter(1, first[:, None], aims.gather(1, first[:, None]))
    end = int(first.max()) + 1
    cut = ("target_ids", *_READ) if _continues(batch) else ("target_ids",)
    return {k: v[:, :end] if k in cut else v for k, v in {**batch, "target_ids": alone}.items() if k != "room"}


def _oddness(data: Examples, i: int) -> int:
    return abs(int(data.lengths[i]) - SHORT) if data.lengths is not None else 0


@contextlib.contextmanager
def reading_words(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The batch with room for its `words` `(B, L, C)`, drawn from `candidates` `(B, C)`, in front of token `place`; within, the model's
    embeddings put them there, differentiably. A text that is too long with them loses its end. A batch without words stays as it is.
    """
    if "words" not in batch:
        yield batch
        return
    config: Any = model.config
    table: nn.Module = (model.get_encoder() if config.is_encoder_decoder else model).get_input_embeddings()  # type: ignore[operator]
    words, candidates, place = batch["words"], batch["candidates"], int(batch["place"])
    count, most = words.shape[1], min(places(model), default=None)

    def longer(row: Tensor, middle: Tensor) -> Tensor:
        return torch.cat([row[:, :place], middle.expand(-1, count), row[:, place:]], 1)[:, :most]

    found = {k: longer(v, v[:, :1]) if k in _READ else v for k, v in batch.items() if k not in ("words", "candidates", "place")}
    found["input_ids"] = longer(batch["input_ids"], candidates[:, :1])  # tokens like others; what they say is put over
    if _continues(batch):
        found["target_ids"] = longer(batch["target_ids"], torch.full_like(candidates[:, :1], IGNORED))

    def put(module: nn.Module, _: Any, text: Tensor) -> Tensor:
        hook.remove()  # a decoder may share the table
        said = words.to(text) @ module.forward(candidates)
        return torch.cat([text[:, :place], said, text[:, place + count :]], 1)[:, : text.shape[1]]

    hook = table.register_forward_hook(put)
    try:
        yield found
    finally:
        hook.remove()
