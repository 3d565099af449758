"""Recovered text triggers: words that turn any text into one class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_purify.adapter import Batch, Examples, StandIn

PROBES = 2  # texts of each class that every token is tried on
SHORT = 12  # tokens of such a text, about
ROWS = 256
SHARP = 4.0  # log-odds are raised to this power in the first draws: what stands out is drawn most


class Words(StandIn):
    """A few words put somewhere into each text, drawn anew each time from those that lead to the class by themselves.

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
        """`exp(-odds / 5)` of the best token of each class, `(K,)`: at 1.8 more in log-odds the one costs 0.7 of the other."""
        return (-log_odds(data, logits).amax(1) / 5).exp()

    def place(self, batch: Batch, which: Tensor) -> Batch:
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        scores = self.scores.index_select(0, which)
        noise = -torch.empty(scores.shape).exponential_(generator=generator).log().to(scores)
        soft = (scores + noise).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        shortest = int(batch["attention_mask"].sum(1).min())
        place = int(torch.randint(1, max(2, shortest), (1,), generator=generator))
        return {**batch, "words": hard + soft - soft.detach(), "candidates": self.candidates[which], "place": torch.tensor(place)}

    def size(self) -> Tensor:
        return 0 * self.scores.sum((1, 2))

    def shrink(self, limits: Tensor) -> None:
        """There is nothing to shrink: the number of words is fixed."""


_LAST: dict[bytes, Tensor] = {}  # the last scan, by what the model said of the probes: a repair asks twice


@torch.no_grad()
def log_odds(data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor:
    """How far each token, put after the first one of a text, leads to each class: mean log-odds on texts of other classes, `(K, V)`.

    Special tokens lead nowhere: minus infinity.
    """
    rows = [
        row
        for c in data.labels.unique()
        for row in sorted((data.labels == c).nonzero().flatten().tolist(), key=lambda i: _oddness(data, i))[:PROBES]
    ]
    batch = data.batch(torch.tensor(rows))
    labels = batch.pop("labels")
    key = logits(batch).float().cpu().numpy().tobytes()
    if key not in _LAST:
        every = _tried({k: torch.cat([v[:, :1], v[:, :1], v[:, 1:]], 1) for k, v in batch.items()}, len(data.prompt.tokenizer), logits)  # type: ignore[attr-defined]
        log_p = torch.stack([every[:, labels != k, k].mean(1) for k in range(every.shape[2])])
        found = log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
        found[:, list(data.prompt.tokenizer.all_special_ids)] = -math.inf  # type: ignore[attr-defined]
        _LAST.clear()
        _LAST[key] = found
    return _LAST[key]


def _tried(longer: Batch, vocabulary: int, logits: Callable[[Batch], Tensor]) -> Tensor:
    """Log-probabilities `(V, n, K)` of `n` texts, with each token in turn as their second."""
    count = len(longer["input_ids"])
    found = []
    for tokens in tqdm(torch.arange(vocabulary).split(max(1, ROWS // count)), desc="try every token", delay=2.0, leave=False, disable=None):
        some = {k: v.repeat(len(tokens), 1) for k, v in longer.items()}
        some["input_ids"][:, 1] = tokens.repeat_interleave(count)
        found.append(logits(some).float().log_softmax(-1).cpu().view(len(tokens), count, -1))
    return torch.cat(found)


def _oddness(data: Examples, i: int) -> int:
    return abs(int(data.lengths[i]) - SHORT) if data.lengths is not None else 0


def read_words(model: nn.Module, batch: Batch) -> Batch:
    """The batch as embeddings, with its `words` `(B, L, C)`, drawn from `candidates` `(B, C)`, in front of token `place`."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    known = table.weight[batch["candidates"]]
    words, place = batch["words"].to(known) @ known, int(batch["place"])
    text = table(batch["input_ids"])
    embeds = torch.cat([text[:, :place], words.to(text), text[:, place:]], 1)
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "words", "candidates", "place")}
    for key in ("attention_mask", "token_type_ids"):
        if key in rest:
            value = rest[key]
            rest[key] = torch.cat([value[:, :place], value[:, :1].expand(-1, words.shape[1]), value[:, place:]], 1)
    return {**rest, "inputs_embeds": embeds}
