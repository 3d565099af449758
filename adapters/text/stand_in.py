"""Recovered text triggers: words that turn any text into one class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch, Examples, StandIn

WEIGHT = 0.05  # of the entropy in the size: beside a loss near zero it matters, beside one of a class apart it does not


class Words(StandIn):
    """A few tokens put after the first one of each text, each a distribution over the vocabulary, as in Piccolo (Liu et al., IEEE S&P 2022)
    and DBS (Shen et al., ICML 2022): the model reads the mean of the embeddings, so that gradients reach every token at once.

    Its size is the entropy of the distributions, 0 where each is one token.
    """

    words = 3

    def __init__(self, data: Examples, classes: Tensor, generator: torch.Generator) -> None:
        super().__init__(data, classes, generator)
        self.tokens = len(data.prompt.tokenizer)  # type: ignore[attr-defined]
        self.scores = nn.Parameter(0.1 * torch.randn(len(classes), self.words, self.tokens, generator=generator))

    def place(self, batch: Batch, which: Tensor) -> Batch:
        return {**batch, "words": self.scores.softmax(-1), "which": which}

    def size(self) -> Tensor:
        p = self.scores.softmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        return WEIGHT * entropy.mean(-1) / math.log(self.tokens)

    @torch.no_grad()
    def shrink(self, limits: Tensor) -> None:
        limits = limits.to(self.scores) + 1e-4
        for _ in range(100):
            if not (over := self.size() > limits).any():
                return
            self.scores[over] *= 1.2


def read_words(model: nn.Module, batch: Batch) -> Batch:
    """The batch as embeddings, with words `which[i]` of its `words` `(S, L, V)` after the first token of text `i`."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    weight = table.weight[: batch["words"].shape[-1]]
    words = (batch["words"].to(weight) @ weight).index_select(0, batch["which"])
    text = table(batch["input_ids"])
    embeds = torch.cat([text[:, :1], words.to(text), text[:, 1:]], 1)
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "words", "which")}
    for key in ("attention_mask", "token_type_ids"):
        if key in rest:
            value = rest[key]
            rest[key] = torch.cat([value[:, :1], value[:, :1].expand(-1, words.shape[1]), value[:, 1:]], 1)
    return {**rest, "inputs_embeds": embeds}
