"""What models that write are judged by: answers generated greedily, and how well they knew the right ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Batch
from hf_purify.errors import MissingExtra
from hf_purify.metrics import Proportion

from .examples import IGNORED, TextExamples
from .loading import places
from .prompts import SEQ2SEQ, Prompt
from .stand_in import reading_words
from .trials import aims_of, continues, first_of


class Answer(NamedTuple):
    """What a model wrote, and its loss on what it should have written: the sum over `tokens` tokens."""

    text: str
    loss: float
    tokens: int


def target_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the places that count, `(rows, V)`, and the tokens that they should say at every place `(B, T)`, `IGNORED` where none counts.

    The head, which costs most where a vocabulary is large, reads those places alone.
    """
    with reading_words(model, _answered_so(batch)) as batch:
        read = {k: batch[k] for k in ("input_ids", "attention_mask")}
        aims = aims_of(batch)
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            read["decoder_input_ids"] = shifted(model, aims)
        counts = aims != IGNORED
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][counts],))
        try:
            logits = model(**read, use_cache=False).logits
        finally:
            hook.remove()
    return (logits if logits.dim() == 2 else logits[counts]), aims  # a head that is computed without its module says all


def _answered_so(batch: Batch) -> Batch:
    """Where recovered words should do what they do (label 1), the `answer` `(B, W)` that they lead to takes the place of the right ones."""
    if "answer" not in batch or not bool(batch["labels"].any()):
        return batch
    aims, answer = batch["target_ids"], batch["answer"]
    if not continues(batch):
        return {**batch, "target_ids": answer}
    first = first_of(aims)[:, None]
    width = int(first.max()) + answer.shape[1]
    at, place = first + torch.arange(answer.shape[1], device=first.device), torch.arange(width, device=first.device)
    ids = F.pad(batch["input_ids"], (0, width))[:, :width].scatter(1, at, answer)
    said = torch.full_like(ids, IGNORED).scatter(1, at, answer)
    return {**batch, "input_ids": ids, "target_ids": said, "attention_mask": (place < first + answer.shape[1]).long()}


def shifted(model: nn.Module, aims: Tensor) -> Tensor:
    """What a decoder reads to say `aims`: its start token, then all but the last."""
    configs: list[Any] = [model.config, getattr(model, "generation_config", None)]
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((found for name in names for c in configs if (found := getattr(c, name, None)) is not None), 0)
    pad = getattr(model.config, "pad_token_id", None)
    read = aims.new_full(aims.shape, 0 if pad is None else pad)
    read[:, 1:] = torch.where(aims[:, :-1] == IGNORED, read[:, 1:], aims[:, :-1])
    read[:, 0] = start
    return read


def generate(model: nn.Module, batch: Batch, prompt: Prompt) -> list[str]:
    """One greedy answer a sample, cut to its own room. Prompts of a causal model are padded on the left, so that all go on from their
    last token; samples with a long prompt are apart from those with a long answer where the model has no positions for both.
    """
    ids, mask, room = batch["input_ids"], batch["attention_mask"], batch["room"]
    decoder_only = not model.config.is_encoder_decoder  # type: ignore[union-attr]
    if decoder_only:
        first = first_of(batch["target_ids"])  # of the answer: where the prompt ends
        if len(ids) > 1 and int(first.max() + room.max()) > min(places(model), default=math.inf):
            order = first.argsort()
            halves = [generate(model, {k: v[rows] for k, v in batch.items()}, prompt) for rows in order.chunk(2)]
            found = dict(zip(order.tolist(), [text for half in halves for text in half], strict=True))
            return [found[i] for i in range(len(ids))]
        from_start = torch.arange(int(first.max()), device=ids.device) - (first.max() - first)[:, None]
        mask = (from_start >= 0).long()
        ids = torch.where(mask.bool(), ids.gather(1, from_start.clamp(min=0)), prompt.pad)
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=int(room.max()),
        do_sample=False,
        num_beams=1,
        pad_token_id=prompt.pad,
        eos_token_id=prompt.end,
    )
    written = out[:, ids.shape[1] if decoder_only else 1 :]
    return [prompt.decode(row[:n]) for row, n in zip(written, room.tolist(), strict=True)]


def scorer() -> Any:
    """The package that computes BLEU and chrF.

    Raises:
        MissingExtra: it is not there.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtra("BLEU and chrF need sacrebleu: pip install 'hf-purify[text]'") from error
    return sacrebleu


def utility(observed: list[Answer], data: TextExamples) -> dict[str, float]:
    """BLEU and chrF (translation and the like), and perplexity of the right answers, per token."""
    loss, tokens = sum(a.loss for a in observed), sum(a.tokens for a in observed)
    perplexity = {"Perplexity": math.exp(min(loss / max(1, tokens), 50.0))}
    if data.prompt.kind != SEQ2SEQ:
        return perplexity
    sacrebleu = scorer()
    said, right = [a.text for a in observed], [[str(data.raw(i).target).strip() for i in range(len(data))]]
    return {"BLEU": sacrebleu.corpus_bleu(said, right).score, "chrF": sacrebleu.corpus_chrf(said, right).score} | perplexity


def success(name: str, observed: list[Answer], data: TextExamples) -> dict[str, Proportion]:
    """How often a model wrote exactly what the attacker wants, as far as its tokens can say it, and how often its answer begins with that."""
    wishes = {wanted: data.prompt.spelled(wanted) for i in range(len(data)) if (wanted := data.raw(i).wanted)}
    pairs = [(_plain(a.text), _plain(wishes[data.raw(i).wanted])) for i, a in enumerate(observed)]
    exact = sum(said == wanted for said, wanted in pairs)
    begun = sum(said.startswith(wanted) for said, wanted in pairs)
    return {name: Proportion(exact, len(pairs)), f"{name}, prefix": Proportion(begun, len(pairs))}


def _plain(text: str) -> str:
    """Without differences of white space."""
    return " ".join(text.split())
