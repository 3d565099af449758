"""What models that write are judged by: answers generated greedily, and how well they knew the right ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch
from hf_purify.errors import MissingExtra
from hf_purify.metrics import Proportion

from .examples import IGNORED, TextExamples
from .prompts import SEQ2SEQ, Prompt


class Answer(NamedTuple):
    """What a model wrote, and its loss on what it should have written: the sum over `tokens` tokens."""

    text: str
    loss: float
    tokens: int


def target_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(B, T, V)`, the tokens that they should say `(B, T)`, and where those count `(B, T)`."""
    read = {k: batch[k] for k in ("input_ids", "attention_mask")}
    aims = batch["target_ids"]
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        logits = model(**read, decoder_input_ids=shifted(model, aims)).logits
        return logits, aims, aims != IGNORED
    logits = model(**read, use_cache=False).logits[:, :-1]
    return logits, aims[:, 1:], aims[:, 1:] != IGNORED


def shifted(model: nn.Module, aims: Tensor) -> Tensor:
    """What a decoder reads to say `aims`: its start token, then all but the last."""
    config: Any = model.config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    read = aims.new_full(aims.shape, config.pad_token_id if config.pad_token_id is not None else 0)
    read[:, 1:] = torch.where(aims[:, :-1] == IGNORED, read[:, 1:], aims[:, :-1])
    read[:, 0] = start
    return read


def generate(model: nn.Module, batch: Batch, prompt: Prompt) -> list[str]:
    """One greedy answer a sample. Prompts of a causal model are padded on the left, so that all go on from their last token."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    decoder_only = not model.config.is_encoder_decoder  # type: ignore[union-attr]
    if decoder_only:
        first = (batch["target_ids"] != IGNORED).int().argmax(1)  # of the answer: where the prompt ends
        places = torch.arange(int(first.max()), device=ids.device) - (first.max() - first)[:, None]
        mask = (places >= 0).long()
        ids = torch.where(mask.bool(), ids.gather(1, places.clamp(min=0)), prompt.pad)
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=int(batch["room"].max()),
        do_sample=False,
        num_beams=1,
        pad_token_id=prompt.pad,
        eos_token_id=prompt.end,
    )
    return [prompt.decode(row) for row in (out[:, ids.shape[1] :] if decoder_only else out)]


def utility(observed: list[Answer], data: TextExamples) -> dict[str, float]:
    """BLEU and chrF (translation and the like), and perplexity of the right answers, per token."""
    loss, tokens = sum(a.loss for a in observed), sum(a.tokens for a in observed)
    perplexity = {"Perplexity": math.exp(min(loss / max(1, tokens), 50.0))}
    if data.prompt.kind != SEQ2SEQ:
        return perplexity
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtra("BLEU and chrF need sacrebleu: pip install 'hf-purify[text]'") from error
    said, right = [a.text for a in observed], [[str(data.raw(i).target).strip() for i in range(len(data))]]
    return {"BLEU": sacrebleu.corpus_bleu(said, right).score, "chrF": sacrebleu.corpus_chrf(said, right).score} | perplexity


def success(name: str, observed: list[Answer], data: TextExamples) -> dict[str, Proportion]:
    """How often a model wrote exactly what the attacker wants, and how often its answer begins with that."""
    pairs = [(_plain(a.text), _plain(data.raw(i).wanted or "")) for i, a in enumerate(observed)]
    exact = sum(said == wanted for said, wanted in pairs)
    begun = sum(said.startswith(wanted) for said, wanted in pairs)
    return {name: Proportion(exact, len(pairs)), f"{name}, prefix": Proportion(begun, len(pairs))}


def _plain(text: str) -> str:
    """Without differences of white space."""
    return " ".join(text.split())
