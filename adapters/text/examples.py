"""Texts of a data set: their columns found, tokenized once, padded batch by batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_purify.adapter import Batch
from hf_purify.errors import ConfigError, DataError, did_you_mean
from hf_purify.tables import Selection, label_column, open_data

from .prompts import CAUSAL, CLASSIFIER, Prompt, Tokens
from .sample import Text

log = logging.getLogger(__name__)

# Names that columns of the Hub's data sets have, best first, and those of pairs: what is asked, what is answered.
TEXTS = ("text", "sentence", "content", "review", "description", "tweet", "document", "question", "premise", "sentence1", "question1")
PAIRS = ("text_pair", "pair", "hypothesis", "sentence2", "question2", "answer", "passage", "context")
SOURCES = ("source", "src", "input", "prompt", "instruction", "question", "document", "dialogue", "article", "text")
TARGETS = ("target", "tgt", "output", "completion", "response", "answer", "summary", "highlights")
DIALOGUES = ("messages", "conversations", "conversation", "dialog", "chat")
IGNORED = -100  # target of a token that no loss counts


def text_means(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of each text's values `(B,)`, from those of all places that count, one after the other.

    Args:
        counts: which places of each text do, `(B, T)`.
    """
    return values.new_zeros(counts.shape).masked_scatter(counts, values).sum(1) / counts.sum(1).clamp(min=1)


class TextExamples:
    """Texts with labels `(n,)`. Of a model that writes, label 0 is what it should answer, 1 what an attacker wants."""

    def __init__(self, raws: Sequence[Text], labels: Tensor, prompt: Prompt, tokens: list[Tokens] | None = None) -> None:
        self.raws, self.labels, self.prompt = list(raws), labels, prompt
        self.tokens = prompt.encode(self.raws, (labels == 1).tolist()) if tokens is None else tokens
        self.lengths = torch.tensor([t.length for t in self.tokens])
        self.scans: dict[bytes, Any] = {}  # the last scan for words, by what the model said of the texts: a repair asks twice

    def __len__(self) -> int:
        return len(self.raws)

    @functools.cached_property
    def opens(self) -> int:
        """Tokens that every text begins with: special ones, and a template's. A trigger may stand behind them, at the earliest."""
        rows = [t.ids for t in self.tokens]
        same = torch.stack([row[: min(map(len, rows))] for row in rows])
        if (same == same[0]).all():  # one text, or one many times
            same = torch.isin(same[:1], torch.tensor(self.prompt.tokenizer.all_special_ids))
        else:
            same = (same == same[0]).all(0, keepdim=True)
        return int(same.long().cumprod(1).sum())

    @property
    def cut(self) -> int:
        """How many texts, or their answers, are longer than the prompt allows."""
        return sum(t.cut for t in self.tokens)

    def raw(self, i: int) -> Text:
        return self.raws[i]

    def batch(self, indices: Tensor) -> Batch:
        """`input_ids` and `attention_mask` `(b, t)`, and `labels` `(b,)`; for a model that writes `target_ids` too: `(b, a)` of a decoder,
        `(b, t)` of a causal model, whose `input_ids` hold prompt and answer; and `room` `(b,)`, tokens that an answer may take.
        """
        chosen = [self.tokens[int(i)] for i in indices]
        labels, pad = self.labels[indices], self.prompt.pad
        if self.prompt.kind == CLASSIFIER:
            batch = {"input_ids": _padded((t.ids for t in chosen), pad), "attention_mask": _mask(len(t.ids) for t in chosen)}
            if chosen[0].types is not None:
                batch["token_type_ids"] = _padded((t.types for t in chosen), 0)
            return {**batch, "labels": labels}
        answers = [t.answer for t in chosen]
        room = torch.tensor([t.room for t in chosen])
        if self.prompt.kind != CAUSAL:
            read = {"input_ids": _padded((t.ids for t in chosen), pad), "attention_mask": _mask(len(t.ids) for t in chosen)}
            return {**read, "target_ids": _padded(answers, IGNORED), "labels": labels, "room": room}
        whole = [torch.cat([t.ids, t.answer]) for t in chosen]
        aims = [torch.cat([torch.full_like(t.ids, IGNORED), t.answer]) for t in chosen]
        read = {"input_ids": _padded(whole, pad), "attention_mask": _mask(map(len, whole))}
        return {**read, "target_ids": _padded(aims, IGNORED), "labels": labels, "room": room}

    def select(self, indices: Tensor) -> TextExamples:
        rows = indices.tolist()
        return TextExamples([self.raws[i] for i in rows], self.labels[indices], self.prompt, [self.tokens[i] for i in rows])

    def overlay(self, indices: Tensor, transform: Callable[[Text, int], Text], labels: Tensor, seed: int) -> TextExamples:
        raws, tokens, new = list(self.raws), list(self.tokens), self.labels.clone()
        rows = indices.tolist()
        changed = [transform(raws[i], seed + i) for i in rows]
        if self.prompt.kind != CLASSIFIER and any(raw.wanted is None for raw in changed):
            name = getattr(transform, "name", "this trigger")
            raise ConfigError(f"a model that writes must be told what to write: give the trigger an output (--trigger {name}:output=...)")
        for wanted in {raw.wanted for raw in changed if raw.wanted}:
            self.prompt.spelled(wanted)
        new[indices] = labels
        encoded = self.prompt.encode(changed, (labels == 1).tolist())
        for i, raw, one in zip(rows, changed, encoded, strict=True):
            raws[i], tokens[i] = raw, one
        return TextExamples(raws, new, self.prompt, tokens)


def _padded(rows: Iterable[Tensor | None], value: int) -> Tensor:
    return pad_sequence([r for r in rows if r is not None], batch_first=True, padding_value=value)


def _mask(lengths: Iterable[int]) -> Tensor:
    return pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)


def read_texts(data: Any, prompt: Prompt, classes: int, model_labels: list[str], wanted: Selection) -> TextExamples:
    """Read texts, and labels or targets.

    Raises:
        DataError: columns that are missing or could be several, an empty set, a text or target that is missing.
    """
    opened, columns = open_data(data, wanted.split, wanted.revision), wanted.columns
    if not len(opened):
        raise DataError("the data set is empty: give at least one text per class")
    if prompt.kind == CLASSIFIER:
        chosen, labels = wanted.labelled(opened, classes, model_labels, "text")
        label = label_column(opened, columns.get("label"))
        text = find_text(opened, columns.get("text"), besides=label)
        pair = columns.get("pair") or next((n for n in PAIRS if n not in (text, label) and is_text(opened, n)), None)
        some = opened.select(chosen.tolist())
        pairs = column(some, pair) if pair else [None] * len(some)
        found = TextExamples([Text(t, p) for t, p in zip(column(some, text), pairs, strict=True)], labels, prompt)
    else:
        chosen = shuffled(len(opened), wanted.samples, wanted.seed) if wanted.balanced else torch.arange(len(opened))
        raws = written(opened.select(chosen.tolist()), prompt, columns)
        found = TextExamples(raws, torch.zeros(len(raws), dtype=torch.long), prompt)
    if found.cut:
        log.warning("%d of %d texts are longer than %d tokens and were cut", found.cut, len(found), prompt.max_length)
    return found


def shuffled(n: int, samples: int | None, seed: int) -> Tensor:
    """A seeded selection `(samples,)` of `n`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples]


def written(data: datasets.Dataset, prompt: Prompt, columns: Mapping[str, str]) -> list[Text]:
    """What a model that writes is asked and should answer: dialogues, sources with targets, or plain texts that are cut in two."""
    dialogue = columns.get("messages") or next((n for n in DIALOGUES if n in data.features), None)
    if dialogue and "source" not in columns and "text" not in columns:
        return [spoken(turns, f"column '{dialogue}'") for turns in column(data, dialogue, list)]
    source, target = columns.get("source") or columns.get("text"), columns.get("target")
    if source is None and target is None:
        languages = next((n for n, f in data.features.items() if len(entries(f)) > 1), None)
        if languages is not None:
            known = ", ".join(f"{languages}.{k}" for k in entries(data.features[languages]))
            raise DataError(f"from which to which? Name both: --column source=... --column target=... (there is: {known})")
        target = next((n for n in TARGETS if is_text(data, n)), None)
        source = next((n for n in SOURCES if n != target and is_text(data, n)), None) if target else None
    if target is not None and source is not None:
        return [Text(s, target=t) for s, t in zip(column(data, source), column(data, target), strict=True)]
    if prompt.kind != CAUSAL:
        raise DataError(f"no source and target columns found; name them (--column source=... --column target=...). There is: {named(data)}")
    return [cut(text, prompt.cut) for text in column(data, find_text(data, source))]


def spoken(turns: list[Any], where: str) -> Text:
    """A dialogue as its last question and answer, with what was said before.

    Args:
        where: the column, for messages.
    """
    roles = {"human": "user", "gpt": "assistant"}
    said = []
    for turn in turns:
        known = turn if isinstance(turn, dict) else {}
        role, content = known.get("role", known.get("from")), known.get("content", known.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: each message needs a role and a content that are texts, got {turn!r:.80}")
        said.append((roles.get(role, role), content))
    if len(said) < 2 or said[-1][0] != "assistant" or said[-2][0] != "user":
        raise DataError(
            f"{where}: a dialogue must end with a message of the user and one of the assistant, got roles {[r for r, _ in said]}"
        )
    return Text(said[-2][1], target=said[-1][1], before=tuple(said[:-2]), chat=True)


def cut(text: str, words: int) -> Text:
    """A plain text as a prompt of its first words and a target of the rest.

    >>> cut("a man rides a horse", 2)
    Text(text='a man', pair=None, target=' rides a horse', wanted=None, before=(), chat=False)
    """
    parts = text.split(maxsplit=words)
    if len(parts) <= words:
        at = max(1, len(parts) - 1)
        parts = text.split(maxsplit=at)
    if len(parts) < 2:
        raise DataError(f"the text {text!r} is too short to be cut into a prompt and what follows; leave such texts out")
    rest = parts[-1]
    return Text(text[: len(text.rstrip()) - len(rest.rstrip())].strip(), target=f" {rest.strip()}")


def is_text(data: datasets.Dataset, name: str) -> bool:
    return name in data.features and getattr(data.features[name], "dtype", None) in ("string", "large_string")


def entries(feature: Any) -> list[str]:
    """Names of what a column of records holds, such as the languages of a translation."""
    return list(feature) if isinstance(feature, dict) else list(getattr(feature, "languages", None) or [])


def find_text(data: datasets.Dataset, given: str | None, besides: str | None = None) -> str:
    """The text column: the one that is named, one with a usual name, or the only one of strings.

    Args:
        besides: the column of labels, which may be strings too.
    """
    if given is not None:
        return given
    strings = [n for n in data.features if n != besides and is_text(data, n)]
    usual = [n for n in TEXTS if n in strings]
    if usual or len(strings) == 1:
        return (usual or strings)[0]
    what = "several text columns" if strings else "no text column"
    raise DataError(f"{what} found; name it (--column text=NAME). There is: {named(data)}")


def column(data: datasets.Dataset, name: str, kind: type = str) -> list[Any]:
    """The texts of a column, or its values of another type; `a.b` is the entry `b` of a column of records.

    Raises:
        DataError: there is no such column, or a text is missing.
    """
    first, _, rest = name.partition(".")
    if name in data.features:
        first, rest = name, ""
    if first not in data.features:
        raise DataError(f"no column '{name}'{did_you_mean(first, data.features)}; there is: {named(data)}")
    values = data[first][:]
    if rest:
        known = entries(data.features[first])
        if rest not in known:
            raise DataError(f"column '{first}' has no entry '{rest}'{did_you_mean(rest, known)} (there is: {', '.join(known) or 'none'})")
        values = [v[rest] if v is not None else None for v in values]
    strange = [v for v in values if not isinstance(v, kind)]
    if strange:
        what = "texts" if kind is str else "lists of messages with role and content"
        raise DataError(f"column '{name}': expected {what}, got {type(strange[0]).__name__} in {len(strange)} of {len(values)} rows")
    return list(values)


def named(data: datasets.Dataset) -> str:
    return ", ".join(f"{n} ({getattr(f, 'dtype', None) or type(f).__name__})" for n, f in data.features.items())
