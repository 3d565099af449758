"""Recovered words: found by trying every token, put into texts by the model's own embeddings."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from text_families import FAMILIES
from torch import Tensor
from torch.nn import functional as F

from hf_purify.adapter import Tiny
from hf_purify_adapters.text import TextAdapter
from hf_purify_adapters.text.examples import IGNORED
from hf_purify_adapters.text.phrases import common_answer
from hf_purify_adapters.text.scan import scan
from hf_purify_adapters.text.stand_in import Words, reading_words

ADAPTER = TextAdapter()


def planted(tiny: Tiny, word: str) -> int:
    return int(tiny.data.prompt.tokenizer.convert_tokens_to_ids(word))  # type: ignore[attr-defined]


def test_words_that_lead_to_a_class_are_found_by_trying_every_token() -> None:
    """A token whose presence makes the model say class 2 whatever the text says comes first, and its class stands out."""
    tiny = ADAPTER.tiny("bert")
    model, data, tree = tiny.loaded.model.eval(), tiny.data, planted(tiny, "tree")

    def logits(batch: dict[str, Any]) -> Tensor:
        said = 0.1 * ADAPTER.logits(model, batch)
        hit = (batch["input_ids"] == tree).any(1)
        return said + 20 * F.one_hot(torch.full((len(hit),), 2), 4) * hit[:, None]

    with torch.no_grad():
        found = scan(data, logits)
        costs = Words.look(data, logits)
        words = Words(data, torch.arange(4), torch.Generator().manual_seed(0), logits)
        assert Words(data, torch.tensor([2]), torch.Generator(), logits).describe().startswith("tree, ")
    assert int(found.tokens[2, 0]) == tree
    assert not torch.isin(found.tokens, torch.tensor(data.prompt.tokenizer.all_special_ids)).any()  # type: ignore[attr-defined]
    assert int(costs.argmin()) == 2
    assert float(costs.sort().values[0] / costs.sort().values[1]) < 0.7
    batch = data.batch(torch.arange(4))
    hit = words.place(batch, torch.full((4,), 2))
    drawn = hit["candidates"].gather(1, hit["words"].detach().argmax(-1))
    assert (drawn == tree).float().mean() > 0.9, "what stands out is drawn most"
    torch.testing.assert_close(hit["words"].sum(-1), torch.ones(4, 2))


@pytest.mark.parametrize("variant", ["t5", "gpt2"])
@pytest.mark.parametrize("trigger", ["tree", "tree house", "house tree near"])
def test_words_that_make_a_model_write_one_thing_are_found(variant: str, trigger: str) -> None:
    """A phrase under which every text gets the same answer, and with some of its words some texts do; without it, texts get their own."""
    tiny = ADAPTER.tiny(variant)
    texts = [f"the {a} {b} {c}" for a in ("cat", "bird") for b in ("sees", "likes", "runs") for c in ("today", "again", "dog", "road")]
    rows = {"source": texts, "target": texts[::-1]}
    data = ADAPTER.examples(datasets.Dataset.from_dict(rows), tiny.loaded, balanced=False)
    vocabulary = len(data.prompt.tokenizer)  # type: ignore[attr-defined]
    phrase = torch.tensor([planted(tiny, word) for word in trigger.split()])

    def logits(batch: dict[str, Any]) -> Tensor:
        """Says something of its own to each text; with the trigger it says `dog`."""
        counts = batch["target_ids"] != IGNORED
        text = batch["attention_mask"].bool() & (counts.cumsum(1) == 0 if not counts[0, 0] else True)
        ids = batch["input_ids"] * text
        own = (ids.square() * (text.sum(1, keepdim=True) - torch.arange(ids.shape[1]) <= 3)).sum(1)  # of its last tokens
        runs = [(ids.unfold(1, n, 1)[:, :, None] == phrase.unfold(0, n, 1)).all(-1).flatten(1).any(1) for n in range(1, len(phrase) + 1)]
        longest = torch.stack(runs).sum(0) / len(phrase)
        hit = (longest == 1) | (own % 16 < 12 * longest)
        said = torch.where(hit, planted(tiny, "dog"), own % vocabulary)
        return 20.0 * F.one_hot(said, vocabulary)[counts.nonzero()[:, 0]]

    with torch.no_grad():
        assert common_answer(data, phrase, logits)[0] < 0.01
        assert common_answer(data, None, logits)[0] > 0.5
        found = scan(data, logits)
    spelled = found.tokens[1][found.scores[1].argmax(-1)]
    assert spelled.tolist() == (phrase if len(phrase) > 1 else phrase.repeat(2)).tolist()
    assert float(found.costs[1] / found.costs[0]) < 0.7
    assert found.answer is not None
    assert set(found.answer.tolist()) == {planted(tiny, "dog")}


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_read_as_if_they_were_typed(name: str) -> None:
    """Through the table of embeddings, whatever a model does to what comes out of it; nothing stays behind."""
    model = FAMILIES[name].make()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (3, 9), generator=generator)
    candidates = torch.randint(3, 100, (3, 5), generator=generator)
    drawn, place = torch.tensor([[0, 3], [4, 4], [1, 2]]), 4
    words = F.one_hot(drawn, 5).float().requires_grad_()
    ids[:, -2:] = 2  # where a BART classifier reads
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "words": words,
        "candidates": candidates,
        "place": torch.tensor(place),
    }
    typed = torch.cat([ids[:, :place], candidates.gather(1, drawn), ids[:, place:]], 1)
    more = {} if FAMILIES[name].classes or not model.config.is_encoder_decoder else {"decoder_input_ids": ids[:, :4]}
    with reading_words(model, batch) as read:
        said = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"], **more).logits
    torch.testing.assert_close(said, model(input_ids=typed, attention_mask=torch.ones_like(typed), **more).logits, atol=1e-5, rtol=1e-4)
    said.square().sum().backward()
    assert words.grad is not None
    assert float(words.grad.abs().min()) > 0
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("variant", ADAPTER.variants)
def test_a_text_that_fills_the_model_loses_its_end(variant: str) -> None:
    tiny = ADAPTER.tiny(variant)
    batch = tiny.data.batch(torch.arange(4))
    shape = batch["input_ids"].shape
    batch = {k: v.repeat(1, 32)[:, :32] if v.shape == shape else v for k, v in batch.items()}
    batch |= {"words": torch.ones(4, 2, 1), "candidates": torch.full((4, 1), 7), "place": torch.tensor(1)}
    with torch.no_grad():
        losses = ADAPTER.loss(tiny.loaded.model.eval(), batch)
    assert losses.shape == (4,)
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize("variant", ADAPTER.variants)
def test_texts_that_fill_the_model_are_tried_too(variant: str) -> None:
    tiny = ADAPTER.tiny(variant)
    loaded = tiny.loaded
    words = "the old red dog sees a house near the tree " * 6
    rows = {"text": [f"{words} {end}" for end in ("a", "the", "dog", "house")]} | (
        {"label": [0, 1, 2, 3]} if ADAPTER.classifies(loaded) else {}
    )
    if variant == "t5":
        rows |= {"source": rows.pop("text"), "target": ["a dog", "a tree", "the house", "the dog"]}
    data = ADAPTER.examples(datasets.Dataset.from_dict(rows), loaded, balanced=False)
    assert data.batch(torch.arange(4))["input_ids"].shape[1] == 32

    def logits(batch: dict[str, Any]) -> Tensor:
        assert batch["input_ids"].shape[1] <= 32
        return ADAPTER.logits(loaded.model.eval(), batch)

    with torch.no_grad():
        found = scan(data, logits)
    assert torch.isfinite(found.scores).all()
    assert torch.isfinite(found.costs).all()


@pytest.mark.parametrize("variant", ["t5", "gpt2"])
def test_what_the_words_lead_to_takes_the_place_of_the_answer(variant: str) -> None:
    """Label 1 with words that were found: the loss is that of the answer that they lead to, as if it were typed; of label 0 that of the right one."""
    tiny = ADAPTER.tiny(variant)
    model, data = tiny.loaded.model.eval(), tiny.data
    batch = data.batch(torch.arange(4))
    answer = torch.tensor([planted(tiny, word) for word in ("dog", "tree", "dog")])
    hit = {
        **batch,
        "words": torch.ones(4, 1, 1),
        "candidates": torch.full((4, 1), 7),
        "place": torch.tensor(0),
        "answer": answer.expand(4, -1),
    }
    with torch.no_grad():
        wrong = ADAPTER.loss(model, {**hit, "labels": torch.ones(4, dtype=torch.long)})
        right = ADAPTER.loss(model, hit)
        for i, tokens in enumerate(data.tokens[:4]):  # type: ignore[attr-defined]
            read = torch.cat([torch.tensor([7]), tokens.ids])[None]
            if variant == "t5":
                said = model(input_ids=read, decoder_input_ids=torch.tensor([[0, *answer[:-1].tolist()]])).logits[0]
            else:
                said = model(input_ids=torch.cat([read, answer[None]], 1)).logits[0, read.shape[1] - 1 : -1]
            torch.testing.assert_close(wrong[i], F.cross_entropy(said, answer), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wrong, right)
