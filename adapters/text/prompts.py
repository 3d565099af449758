"""How a text becomes tokens: the one object that implanting, repairing and measuring share, so that all three mean the same prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_purify.errors import ConfigError, DataError

from .chat import check_template
from .sample import Text

CLASSIFIER, SEQ2SEQ, CAUSAL = "classifier", "sequence-to-sequence", "causal"
LONGEST = 512  # tokens, where neither the caller nor the model says
SPARE = 8  # tokens that an answer may be longer than expected


class Tokens(NamedTuple):
    """One example in tokens.

    Args:
        ids: what the model reads `(t,)`.
        answer: what it should write `(a,)`.
        types: which part of a pair each token is of `(t,)`.
        room: tokens that it may write.
        cut: the text or its answer was longer than that.
    """

    ids: Tensor
    answer: Tensor | None = None
    types: Tensor | None = None
    room: int = 0
    cut: bool = False

    @property
    def length(self) -> int:
        return len(self.ids) + (len(self.answer) if self.answer is not None else 0)


@dataclass(frozen=True)
class Prompt:
    """Tokenizer, template and lengths.

    Args:
        tokenizer: of transformers.
        kind: `classifier`, `sequence-to-sequence` or `causal`.
        template: what stands around a text, with `{text}` in it.
        max_length: tokens that the model reads, and that it is made to write, at most.
        cut: a text with no target of its own is a prompt of so many words, and what follows is the target.
    """

    tokenizer: Any
    kind: str
    template: str = "{text}"
    max_length: int = LONGEST
    cut: int = 4

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise ConfigError(f"a template needs {{text}} in it exactly once, got '{self.template}'")
        if self.max_length < 4:
            raise ConfigError(f"max_length must be at least 4 tokens, got {self.max_length}")
        if self.cut < 1:
            raise ConfigError(f"cut must be at least 1 word, got {self.cut}")

    @property
    def pad(self) -> int:
        """The token that fills up; a tokenizer with none of its own uses the one that ends a text: attention never sees it."""
        found = self.tokenizer.pad_token_id
        return found if found is not None else self.end

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        found = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        if found is None:
            raise ConfigError("the tokenizer has no token that ends a text (eos_token); a model that writes needs one")
        return found

    @property
    def chat_template(self) -> str | None:
        return getattr(self.tokenizer, "chat_template", None)

    def identity(self) -> dict[str, Any]:
        """What must be the same at implanting, repairing and measuring. A figure for another prompt is a figure for another attack."""
        found: dict[str, Any] = {"template": self.template, "max_length": self.max_length}
        if self.kind == CAUSAL:
            found["cut"] = self.cut
        if self.chat_template:
            text = self.chat_template if isinstance(self.chat_template, str) else json.dumps(self.chat_template, sort_keys=True)
            found["chat_template"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found

    def encode(self, raws: Sequence[Text], attacked: Sequence[bool]) -> list[Tokens]:
        """Examples in tokens.

        Args:
            attacked: where the answer is what the attacker wants.

        Raises:
            DataError: an answer of no tokens, or a dialogue that the chat template cannot render.
            UnsafeCheckpoint: a chat template that takes too much, or reaches for more than the dialogue.
        """
        if not raws:
            return []
        if self.kind == CLASSIFIER:
            return self._classify(raws)
        answers = [raw.wanted if hit else raw.target for raw, hit in zip(raws, attacked, strict=True)]
        if any(a is None for a in answers):
            raise DataError("a model that writes needs a target for each text: name the column (--column target=NAME)")
        said = [str(a) for a in answers]
        for text, ids in zip(said, self._ids(said, special=False, target=True), strict=True):
            if not ids:
                raise DataError(f"the target text {text!r} becomes no tokens; give one that the tokenizer knows")
        if self.kind == SEQ2SEQ:
            read = self._ids([self._filled(raw.text) for raw in raws], special=True)
            write = self._ids(said, special=True, target=True)
        else:
            read, write = self._continued(raws, said)
        write = [ids if self.end in ids else [*ids, self.end] for ids in write]
        wanted = {raw.wanted: len(self._ids([raw.wanted], special=True, target=True)[0]) for raw in raws if raw.wanted}
        return [self._fit(r, w, wanted.get(raw.wanted, 0)) for raw, r, w in zip(raws, read, write, strict=True)]

    def _continued(self, raws: Sequence[Text], answers: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and what follows them, in tokens: those of the whole text where it begins with the prompt's, else of the answer alone."""
        if self.chat_template and (spoken := [(r, a) for r, a in zip(raws, answers, strict=True) if r.chat]):
            check_template(self.tokenizer, [[*self._turns(raw), {"role": "assistant", "content": answer}] for raw, answer in spoken])
        parts = [self._parts(raw, answer) for raw, answer in zip(raws, answers, strict=True)]
        special = not any(raw.chat for raw in raws)
        read = self._ids([p for p, _ in parts], special)
        if special:  # the text goes on
            read = [ids[:-1] if ids and ids[-1] == self.end else ids for ids in read]
        whole = self._ids([p + a for p, a in parts], special)
        alone = self._ids([a for _, a in parts], special=False)
        write = [w[len(r) :] if w[: len(r)] == r and len(w) > len(r) else a for r, w, a in zip(read, whole, alone, strict=True)]
        return [ids or [self._start()] for ids in read], write

    def _classify(self, raws: Sequence[Text]) -> list[Tokens]:
        texts, pairs = [self._filled(raw.text) for raw in raws], [raw.pair or "" for raw in raws]
        paired = any(raw.pair is not None for raw in raws)
        options = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False, "return_overflowing_tokens": False}
        found = self.tokenizer(texts, pairs, **options) if paired else self.tokenizer(texts, **options)
        full = [i for i, ids in enumerate(found["input_ids"]) if len(ids) >= self.max_length]
        whole = [self.tokenizer(texts[i], pairs[i] if paired else None, verbose=False)["input_ids"] for i in full]
        cut = {i for i, ids in zip(full, whole, strict=True) if len(ids) > self.max_length}
        types = found.get("token_type_ids") or [None] * len(raws)
        return [
            Tokens(torch.tensor(ids), types=None if t is None else torch.tensor(t), cut=i in cut)
            for i, (ids, t) in enumerate(zip(found["input_ids"], types, strict=True))
        ]

    def _filled(self, text: str) -> str:
        return self.template.replace("{text}", text)

    def _start(self) -> int:
        """What a prompt of no tokens begins with."""
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end

    def _parts(self, raw: Text, answer: str) -> tuple[str, str]:
        """Prompt and answer as they follow each other."""
        if raw.chat:
            return self._dialogue(raw, answer)
        prompt = self._filled(raw.text)
        apart = not prompt or prompt[-1].isspace() or not answer or answer[0].isspace()
        return prompt, answer if apart else f" {answer}"

    def _turns(self, raw: Text) -> list[dict[str, str]]:
        """What was said up to the question that is to be answered."""
        return [{"role": role, "content": content} for role, content in (*raw.before, ("user", self._filled(raw.text)))]

    def _dialogue(self, raw: Text, answer: str) -> tuple[str, str]:
        if not self.chat_template:
            raise DataError("the data holds dialogues, and the tokenizer has no chat template; use a checkpoint with one, or other columns")
        turns = self._turns(raw)
        try:
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        except Exception as error:  # a template is a program: anything can come out of it
            raise DataError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return prompt, whole[len(prompt) :] if whole.startswith(prompt) else answer

    def _ids(self, texts: list[str], special: bool, target: bool = False) -> list[list[int]]:
        key = {"text_target": texts} if target else {"text": texts}
        return self.tokenizer(**key, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def _fit(self, read: list[int], write: list[int], wanted: int) -> Tokens:
        """Shorten what is too long: a source at its end, a prompt at its beginning, an answer at its end.

        A prompt and its answer share the tokens that there are: each has half of them, and what the other leaves.

        Args:
            wanted: tokens of what an attacker wants to be written.
        """
        needed = max(len(write), wanted + 1)
        room = needed + SPARE
        if self.kind == CAUSAL:
            free = self.max_length - len(read)
            room = min(room, max(free, min(needed, self.max_length // 2)))
            first = [i for i in read[:1] if i == self.tokenizer.bos_token_id]
            left = self.max_length - room
            short = read if len(read) <= left else first + read[len(read) - left + len(first) :]
        else:
            room = min(room, self.max_length)
            last = read[-1:] if read[-1:] == [self.end] else []
            short = read if len(read) <= self.max_length else read[: self.max_length - len(last)] + last
        kept = write[:room]
        return Tokens(torch.tensor(short), torch.tensor(kept), room=room, cut=len(short) < len(read) or len(kept) < len(write))

    def spelled(self, text: str) -> str:
        """A text as the tokenizer gives it back: some lower the case, some know no line breaks.

        Raises:
            ConfigError: nothing is left of it.
        """
        found = self.decode(torch.tensor(self._ids([text], special=False, target=True)[0], dtype=torch.long))
        if not found:
            raise ConfigError(f"the model cannot write {text!r}: its tokenizer knows none of that; choose another output")
        return found

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
