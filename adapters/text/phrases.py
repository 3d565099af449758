"""Which phrase makes a model write one thing, whatever it reads."""

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
from .trials import READ, Logits, aims_of, continues, each, first_of, put

OPENING = 2  # tokens of an answer that are looked at
BEST = 512  # phrases that are tried again, on more texts
ASKED = 64  # of these, those whose answers are read
ANSWERS, WRITTEN = 16, 8  # texts that are answered, tokens of each answer
LONGEST = 4  # tokens of a phrase
ENOUGH = 0.1  # share of texts with an answer of their own: a phrase is whole
SURE = 2.0  # the highest score there is


class Phrase(NamedTuple):
    """What was found.

    Args:
        tokens: of the phrase, `(L,)`, with single ones that have some part of its effect behind: `(pool,)`.
        scores: of those at each place of the phrase `(L, pool)`, each in [0, 2].
        costs: of no phrase and of this one, `(2,)`: the root of the share of texts that get an answer of their own, in (0, 1]. The root, since a
            phrase made for it brings a third of the texts of a model without a backdoor to one answer, and that of a backdoor nearly all.
        answer: how most texts are answered with it, `(W,)`.
    """

    tokens: Tensor
    scores: Tensor
    costs: Tensor
    answer: Tensor


def find_phrase(data: Examples, few: Batch, many: Batch, tokens: Tensor, logits: Logits) -> Phrase:
    """Try every token as a phrase; then, while texts still get answers of their own, every token in front of the best and behind it.

    Half of a trigger has some of its effect, more than words have that only mean something. Of the phrases that score most,
    that under which most texts get the same answer is the best.

    Args:
        few, many: texts that all phrases are tried on, and the best ones again.
        tokens: that a phrase may have, `(T,)`.
    """
    start, most = data.opens, data.prompt.max_length  # type: ignore[attr-defined]
    score = [_score(_opening(texts), start, most, logits) for texts in (few, many)]

    def best(phrases: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Phrases from the one that scores most, their scores, and the best one with its share."""
        kept = phrases[score[0](phrases).topk(min(BEST, len(phrases))).indices]
        found = score[1](kept).topk(min(ASKED, len(kept)))
        bar = tqdm(kept[found.indices], desc="read answers", delay=2.0, leave=False, disable=None)
        shares = [common_answer(data, phrase, logits)[0] for phrase in bar]
        first = min(range(len(shares)), key=shares.__getitem__)
        return kept[found.indices], found.values, kept[found.indices[first]], shares[first]

    pool, scores, phrase, share = best(tokens[:, None])
    shares = {tuple(phrase.tolist()): share}
    while share > ENOUGH and len(phrase) < LONGEST:
        old = phrase.expand(len(tokens), -1)
        front, behind = torch.cat([tokens[:, None], old], 1), torch.cat([old, tokens[:, None]], 1)
        *_, phrase, share = best(torch.cat([front, behind]))
        shares[tuple(phrase.tolist())] = share
    words, share = min(shares.items(), key=lambda known: known[1])
    phrase = torch.tensor(words)
    costs = torch.tensor([common_answer(data, None, logits)[0], share])
    return Phrase(*_pooled(phrase, pool[:, 0], scores), costs.sqrt(), common_answer(data, phrase, logits)[1])


def _pooled(phrase: Tensor, singles: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a phrase and single ones, and the scores of those at each of its places: its own is sure, if there are several."""
    if len(phrase) == 1:
        return singles, scores[None]
    others = ~torch.isin(singles, phrase)
    known = phrase.unique()
    at = SURE * (phrase[:, None] == known).float()
    return torch.cat([known, singles[others]]), torch.cat([at, scores[others].expand(len(phrase), -1)], 1)


def _score(batch: Batch, start: int, most: int, logits: Logits) -> Callable[[Tensor], Tensor]:
    """What tells how much phrases `(T, L)` do, `(T,)` in [0, 2]: how sure one first token is in all texts that was not before, and how unlikely
    the right answers become.
    """

    def read(some: Batch) -> tuple[Tensor, Tensor]:
        aims = aims_of(some)
        counts = aims != IGNORED
        rows = logits(some).float().log_softmax(-1)
        first = rows[(counts.cumsum(1) == 1)[counts]].view(-1, len(batch["labels"]), rows.shape[1])
        right = text_means(rows.gather(1, aims[counts][:, None].to(rows.device))[:, 0].cpu(), counts)
        return first.mean(1).exp(), right.view(-1, len(batch["labels"])).mean(1)

    common, right = read(batch)

    def scored(some: Batch) -> Tensor:
        now, left = read(some)
        return (now - common).max(1).values.cpu() + 1 - (left - right).clamp(max=0).exp()

    return lambda phrases: each(batch, phrases, start, most, scored)


def _opening(batch: Batch) -> Batch:
    """The batch with only the first tokens of each answer."""
    aims, first = batch["target_ids"], first_of(batch["target_ids"])
    place = torch.arange(aims.shape[1]) - first[:, None]
    end = int(first.max()) + OPENING
    cut = ("target_ids", *READ) if continues(batch) else ("target_ids",)
    kept = {**batch, "target_ids": aims.where(place < OPENING, IGNORED)}
    return {k: v[:, :end] if k in cut else v for k, v in kept.items() if k != "room"}


def common_answer(data: Examples, phrase: Tensor | None, logits: Logits) -> tuple[float, Tensor]:
    """The share of texts with an answer of their own, in (0, 1], which are all but those with the most common one; and the tokens `(W,)` of that.

    Args:
        phrase: tokens `(L,)` that stand in front of each text.
    """
    prompt, start = data.prompt, data.opens  # type: ignore[attr-defined]
    batch = data.batch(torch.arange(min(ANSWERS, len(data))))
    written = _answered(batch if phrase is None else put(batch, phrase[None], start, prompt.max_length), logits, prompt.max_length)
    (answer, same), *_ = Counter(map(tuple, written.tolist())).most_common(1)
    answer = answer[: answer.index(prompt.end) + 1] if prompt.end in answer else answer
    return max(1 - (same - 1) / max(1, len(written) - 1), 1e-3), torch.tensor(answer)


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
