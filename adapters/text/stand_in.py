"""Recovered text triggers: words that turn any text into one class, or make a model write something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch, Examples
from hf_purify.stand_in import StandIn

from .examples import IGNORED
from .loading import places
from .scan import scan
from .trials import READ, continues, first_of

SHARP = 4.0  # scores are multiplied by this in the first draws: what stands out is drawn most


class Words(StandIn):
    """A few words put somewhere into each text, drawn anew each time from those that lead to the class by themselves.

    Of a model that writes, class 1 is what the words that were found make it write.

    Every token of the vocabulary is tried on a few short clean texts of other classes, and the best of each class are kept: the word of a
    trigger is among them, and the telling ones of a sentence. They are drawn as often as their scores say, and then as gradients
    through the draw do (GBDA, Guo et al., EMNLP 2021, arXiv 2104.13733). Learned from nothing over the whole vocabulary, the draws end at
    natural words, of which there are many.
    """

    candidates: Tensor

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator, logits: Callable[[Batch], Tensor]) -> None:
        super().__init__(data, classes, generator, logits)
        found = scan(data, logits)
        self.register_buffer("candidates", found.tokens[classes])
        self.scores = nn.Parameter(SHARP * found.scores[classes])
        self.answer = found.answer
        self.begin_draws(generator)
        self.tokenizer, self.start = data.prompt.tokenizer, data.opens  # type: ignore[attr-defined]

    @classmethod
    def look(cls, data: Examples, logits: Callable[[Batch], Tensor]) -> Tensor:
        return scan(data, logits).costs

    def describe(self, most: int = 3) -> str:
        """The words that are drawn most, and what they make a model write."""
        drawn = torch.zeros(len(self.tokenizer)).index_add(
            0, self.candidates.flatten().cpu(), self.scores.detach().softmax(-1).mean(1).flatten().cpu()
        )
        words = ", ".join(self.tokenizer.decode([i]).strip() for i in drawn.topk(most).indices.tolist())
        return words if self.answer is None else f"{words} (answer: {self.tokenizer.decode(self.answer, skip_special_tokens=True).strip()})"

    def place(self, batch: Batch, which: Tensor) -> Batch:
        generator = self.next_draw()
        scores = self.scores.index_select(0, which)
        noise = -torch.empty(scores.shape).exponential_(generator=generator).log().to(scores)
        soft = (scores + noise).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        shortest = int((first_of(batch["target_ids"]) if continues(batch) else batch["attention_mask"].sum(1)).min())
        place = int(torch.randint(self.start, max(self.start + 1, shortest), (1,), generator=generator))
        written = {} if self.answer is None else {"answer": self.answer.to(which).expand(len(which), -1)}
        return {
            **batch,
            **written,
            "words": hard + soft - soft.detach(),
            "candidates": self.candidates[which],
            "place": torch.tensor(place),
        }

    def size(self) -> Tensor:
        return 0 * self.scores.sum((1, 2))

    def shrink(self, limits: Tensor) -> None:
        """There is nothing to shrink: the number of words is fixed."""


def written(batch: Batch, row: int) -> Tensor:
    """The tokens of a text, with the words of a batch put in where `reading_words` puts them."""
    ids = batch["input_ids"][row].cpu()
    if "words" not in batch:
        return ids
    place = int(batch["place"])
    drawn = batch["candidates"][row].gather(0, batch["words"][row].detach().argmax(-1)).cpu()
    return torch.cat([ids[:place], drawn, ids[place:]])


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

    found = {k: longer(v, v[:, :1]) if k in READ else v for k, v in batch.items() if k not in ("words", "candidates", "place")}
    drawn = candidates.gather(1, words.detach().argmax(-1))  # what a decoder reads of them, where it reads the text, too
    found["input_ids"] = longer(batch["input_ids"], drawn)
    if continues(batch):
        found["target_ids"] = longer(batch["target_ids"], torch.full_like(candidates[:, :1], IGNORED))

    def put(module: nn.Module, _: Any, text: Tensor) -> Tensor:
        hook.remove()  # a decoder may share the table
        said = words.to(text) @ module.forward(candidates)
        return torch.cat([text[:, :place], said, text[:, place + count :]], 1)[:, : text.shape[1]]

    hook = table.register_forward_hook(put, prepend=True)  # before FSDP takes the table's rows back
    try:
        yield found
    finally:
        hook.remove()
