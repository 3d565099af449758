"""Which tokens lead texts where: every token of a vocabulary is tried."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_purify.adapter import Batch, Examples

from .phrases import find_phrase
from .trials import Logits, each

PROBES = 2  # texts of each class that every token is tried on, those nearest to `SHORT` tokens
SHORT = 12
MOST = 16  # of them
POOL = 64  # tokens of each class that may be a trigger's
BEST = 512  # tokens that are tried again, an equal part of them for each class
AGAIN = 64  # texts for that
WORDS = 2  # places of a trigger of which only single tokens are known


class Scan(NamedTuple):
    """What the tokens do.

    Args:
        tokens: `(K, pool)` the best ones of each class.
        scores: `(K, L, pool)` how far each leads to its class at each place of a trigger of `L` tokens.
        costs: `(K,)` what the cheapest trigger of each class costs.
        answer: what the triggers of class 1 make a model write, `(W,)`; None of a classifier.
    """

    tokens: Tensor
    scores: Tensor
    costs: Tensor
    answer: Tensor | None = None


@torch.no_grad()
def scan(data: Examples, logits: Logits) -> Scan:
    """Try every token in front of a few short texts, and the best of each class on more.

    Of a classifier, a token's score is the mean log-odds of the class on texts of other classes. Each class has words that tell of it, and
    some classes stronger ones: what a class costs counts how far its best token goes, and how far it leads the others of its pool.

    Of a model that writes, class 1 is what an attacker wants, and class 0 what it writes without: see `find_phrase`.
    """
    prompt = data.prompt  # type: ignore[attr-defined]
    tokens = torch.arange(len(prompt.tokenizer))
    tokens = tokens[~torch.isin(tokens, torch.tensor(prompt.tokenizer.all_special_ids))]
    few, many = probes(data, PROBES, MOST), probes(data, AGAIN, AGAIN)
    known: dict[bytes, Scan] = data.scans  # type: ignore[attr-defined]
    key = logits(many).float().cpu().numpy().tobytes()
    if key not in known:
        known.clear()
        if "target_ids" in many:
            found = find_phrase(data, few, many, tokens, logits)
            places = WORDS if len(found.scores) == 1 else -1
            known[key] = Scan(found.tokens.expand(2, -1), found.scores.expand(2, places, -1), found.costs, found.answer)
        else:
            known[key] = _classified(data, few, many, tokens, logits)
    return known[key]


def probes(data: Examples, of_each: int, most: int) -> Batch:
    """Short texts, as many of each class."""
    classes = data.labels.unique()
    of_each = max(1, min(of_each, most // len(classes)))

    def oddness(row: int) -> int:
        return abs(int(data.lengths[row]) - SHORT) if data.lengths is not None else 0

    short = [sorted((data.labels == c).nonzero().flatten().tolist(), key=oddness)[:of_each] for c in classes]
    return data.batch(torch.tensor([row for rows in short for row in rows][: max(2, most)]))


def _classified(data: Examples, few: Batch, many: Batch, tokens: Tensor, logits: Logits) -> Scan:
    start, most = data.opens, data.prompt.max_length  # type: ignore[attr-defined]
    first = _led(few, tokens, start, most, logits)
    best = tokens[first.topk(min(BEST // len(first), len(tokens))).indices.unique()]
    found = _led(many, best, start, most, logits).topk(min(POOL, len(best)))
    sure = F.softplus(found.values)  # nats that speak against all other classes: a class that no word leads to has none
    costs = (-(sure[:, 0] + 2 * (sure[:, 0] - sure[:, -1])) / 4).exp()
    return Scan(best[found.indices], found.values[:, None].expand(-1, WORDS, -1), costs)


def _led(batch: Batch, tokens: Tensor, start: int, most: int, logits: Logits) -> Tensor:
    """Mean log-odds of each class on texts of others, `(K, T)`."""
    labels = batch["labels"]

    def read(some: Batch) -> Tensor:
        log_p = logits(some).float().log_softmax(-1)
        return log_p.view(-1, len(labels), log_p.shape[1])

    log_p = each(batch, tokens[:, None], start, most, read)
    means = torch.stack([log_p[:, labels != k, k].mean(1) for k in range(log_p.shape[2])])
    return means - torch.log1p(-means.exp().clamp(max=1 - 1e-6))
