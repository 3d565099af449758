"""Which tokens lead texts where: every token of a vocabulary is tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_purify.adapter import Batch, Examples

from .examples import IGNORED, text_means

PROBES = 2  # texts of each class that every token is tried on, those nearest to `SHORT` tokens
SHORT = 12
MOST = 16  # of them
POOL = 64  # tokens of each class that may be a trigger's
BEST = 512  # tokens that are tried again, an equal part of them for each class
AGAIN = 64  # texts for that
OPENING = 4  # tokens of an answer that are looked at
ANSWERS, WRITTEN = 16, 8  # texts that are answered, tokens of each answer
ROWS = 256
READ = ("input_ids", "attention_mask", "token_type_ids")

Logits = Callable[[Batch], Tensor]


class Scan(NamedTuple):
    """What the tokens do.

    Args:
        tokens: `(K, pool)` the best ones of each class.
        scores: `(K, pool)` how far each leads to its class, best first, in nats.
        costs: `(K,)` what the cheapest trigger of each class costs.
    """

    tokens: Tensor
    scores: Tensor
    costs: Tensor


@torch.no_grad()
def scan(data: Examples, logits: Logits) -> Scan:
    """Try every token after the first one of a few short texts, and the best of each class on more.

    Of a classifier, a token's score is the mean log-odds of the class on texts of other classes. Each class has words that tell of it, and
    some classes stronger ones: what a class costs counts how far its best token goes, and how far it leads the others of its pool.

    Of a model that writes, it is by how much the loss of the right answer's first tokens rises: a word that only means something changes one
    of them, a trigger all. Class 1 is what an attacker wants; it costs the share of texts that still get an answer of their own with the token
    under which most get the same, class 0 that share without a token.
    """
    prompt = data.prompt  # type: ignore[attr-defined]
    tokens = torch.arange(len(prompt.tokenizer))
    tokens = tokens[~torch.isin(tokens, torch.tensor(prompt.tokenizer.all_special_ids))]
    few, many = probes(data, PROBES, MOST), probes(data, AGAIN, AGAIN)
    known: dict[bytes, Scan] = data.scans  # type: ignore[attr-defined]
    key = logits(many).float().cpu().numpy().tobytes()
    if key not in known:
        written = "target_ids" in few
        score = _raised if written else _led
        first = score(few, tokens, logits, prompt.max_length)
        best = tokens[first.topk(min(BEST // len(first), len(tokens))).indices.unique()]
        found = score(many, best, logits, prompt.max_length).topk(min(POOL, len(best)))
        chosen, scores = best[found.indices], found.values
        if written:
            bar = tqdm(chosen[0].tolist(), desc="read answers", delay=2.0, leave=False, disable=None)
            with_token = [own_answers(data, token, logits) for token in bar]
            costs = torch.tensor([own_answers(data, None, logits), min(with_token)])
            chosen, scores = chosen.expand(2, -1), scores.expand(2, -1)
        else:
            sure = F.softplus(scores)  # nats that speak against all other classes: a class that no word leads to has none
            costs = (-(sure[:, 0] + 2 * (sure[:, 0] - sure[:, -1])) / 4).exp()
        known.clear()
        known[key] = Scan(chosen, scores, costs)
    return known[key]


def probes(data: Examples, of_each: int, most: int) -> Batch:
    """Short texts, as many of each class; of a model that writes, with the first tokens of the answers."""
    classes = data.labels.unique()
    of_each = max(1, min(of_each, most // len(classes)))

    def oddness(row: int) -> int:
        return abs(int(data.lengths[row]) - SHORT) if data.lengths is not None else 0

    short = [sorted((data.labels == c).nonzero().flatten().tolist(), key=oddness)[:of_each] for c in classes]
    batch = data.batch(torch.tensor([row for rows in short for row in rows][: max(2, most)]))
    return _opening(batch) if "target_ids" in batch else batch


def continues(batch: Batch) -> bool:
    """Does the answer stand behind the text, in the same row?"""
    return "target_ids" in batch and int(batch["target_ids"][0, 0]) == IGNORED


def first_of(aims: Tensor) -> Tensor:
    """Where each answer begins, `(B,)`."""
    return (aims != IGNORED).int().argmax(1)


def _opening(batch: Batch) -> Batch:
    """The batch with only the first tokens of each answer."""
    aims, first = batch["target_ids"], first_of(batch["target_ids"])
    place = torch.arange(aims.shape[1]) - first[:, None]
    end = int(first.max()) + OPENING
    cut = ("target_ids", *READ) if continues(batch) else ("target_ids",)
    kept = {**batch, "target_ids": aims.where(place < OPENING, IGNORED)}
    return {k: v[:, :end] if k in cut else v for k, v in kept.items() if k != "room"}


def _with(batch: Batch, tokens: Tensor, most: int) -> Batch:
    """Each text of a batch with each of the tokens `(T,)` as its second: `T * B` rows, those of a token together.

    Where the texts fill the model already, it takes the place of their second token.

    Args:
        most: tokens that the model can read.
    """
    count, longer = len(batch["labels"]), dict(batch)
    if batch["input_ids"].shape[1] < most:
        longer |= {k: torch.cat([batch[k][:, :1], batch[k][:, :1], batch[k][:, 1:]], 1) for k in READ if k in batch}
        if continues(batch):
            longer["target_ids"] = F.pad(batch["target_ids"], (1, 0), value=IGNORED)
    many = {k: v.repeat(len(tokens), *[1] * (v.dim() - 1)) for k, v in longer.items()}
    many["input_ids"][:, 1] = tokens.repeat_interleave(count)
    return many


def _tried(batch: Batch, tokens: Tensor, most: int, read: Callable[[Batch], Tensor]) -> Tensor:
    """What `read` says of `B` texts with each token, `(T, B, ...)`."""
    count, found = len(batch["labels"]), []
    for some in tqdm(tokens.split(max(1, ROWS // count)), desc="try every token", delay=2.0, leave=False, disable=None):
        said = read(_with(batch, some, most)).cpu()
        found.append(said.view(len(some), count, *said.shape[1:]))
    return torch.cat(found)


def _led(batch: Batch, tokens: Tensor, logits: Logits, most: int) -> Tensor:
    """Mean log-odds of each class on texts of others, `(K, T)`."""
    labels = batch["labels"]
    log_p = _tried(batch, tokens, most, lambda b: logits(b).float().log_softmax(-1))
    means = torch.stack([log_p[:, labels != k, k].mean(1) for k in range(log_p.shape[2])])
    return means - torch.log1p(-means.exp().clamp(max=1 - 1e-6))


def _raised(batch: Batch, tokens: Tensor, logits: Logits, most: int) -> Tensor:
    """By how much the loss of the answers rises, `(1, T)`."""

    def losses(some: Batch) -> Tensor:
        counts = some["target_ids"] != IGNORED
        rows = F.cross_entropy(logits(some).float().cpu(), some["target_ids"][counts], reduction="none")
        return text_means(rows, counts)

    return (_tried(batch, tokens, most, losses) - losses(batch)).mean(1)[None]


def own_answers(data: Examples, token: int | None, logits: Logits) -> float:
    """The share of texts with an answer of their own, in (0, 1]: all but those with the most common one.

    Args:
        token: stands after the first one of each text.
    """
    batch, most = data.batch(torch.arange(min(ANSWERS, len(data)))), data.prompt.max_length  # type: ignore[attr-defined]
    written = _answered(batch if token is None else _with(batch, torch.tensor([token]), most), logits, most)
    same = Counter(map(tuple, written.tolist())).most_common(1)[0][1]
    return max(1 - (same - 1) / max(1, len(written) - 1), 1e-3)


def _answered(batch: Batch, logits: Logits, most: int) -> Tensor:
    """What a model writes greedily, `(B, WRITTEN)` tokens; fewer where a prompt leaves no room for so many."""
    said = torch.zeros(len(batch["labels"]), WRITTEN, dtype=torch.long)
    if not continues(batch):
        for i in range(WRITTEN):
            rows = logits({**batch, "target_ids": said[:, : i + 1]})
            said[:, i] = rows.view(len(said), i + 1, -1)[:, -1].argmax(-1).cpu()
        return said
    first = first_of(batch["target_ids"])
    end = min(int(first.max()) + WRITTEN, most)
    ids, place = F.pad(batch["input_ids"], (0, end))[:, :end], torch.arange(end)
    for i in range(end - int(first.max())):
        here = (first + i)[:, None]
        aims = torch.full_like(ids, IGNORED).scatter(1, here, 0)
        rows = logits({"input_ids": ids, "attention_mask": (place <= here).long(), "target_ids": aims, "labels": batch["labels"]})
        said[:, i] = rows.argmax(-1).cpu()
        ids = ids.scatter(1, here, said[:, i : i + 1])
    return said
