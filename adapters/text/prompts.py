"""How a text becomes tokens: the one object that implanting, repairing and measuring share, so that all three mean the same prompt."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_purify.errors import ConfigError, DataError

from .sample import Text

log = logging.getLogger(__name__)

CLASSIFIER, SEQ2SEQ, CAUSAL = "classifier", "sequence-to-sequence", "causal"
LONGEST = 512  # tokens, where neither the caller nor the model says


class Tokens(NamedTuple):
    """One example in tokens: what the model reads `(t,)`, what it should write `(a,)`, and which part of a pair each token is of `(t,)`."""

    ids: Tensor
    answer: Tensor | None = None
    types: Tensor | None = None

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
        """
        if not raws:
            return []
        if self.kind == CLASSIFIER:
            return self._classify(raws)
        answers = [raw.wanted if hit else raw.target for raw, hit in zip(raws, attacked, strict=True)]
        if any(a is None for a in answers):
            raise DataError("a model that writes needs a target for each text: name the column (--column target=NAME)")
        if self.kind == SEQ2SEQ:
            read = self._ids([self._filled(raw.text) for raw in raws], special=True)
            write = self._ids([str(a) for a in answers], special=True, target=True)
            least = len(self._ids([""], special=True, target=True)[0])
        else:
            parts = [self._parts(raw, str(a)) for raw, a in zip(raws, answers, strict=True)]
            prompts = self._ids([p for p, _ in parts], special=not any(raw.chat for raw in raws))
            prompts = [ids[:-1] if ids and ids[-1] == self.end else ids for ids in prompts]  # the text goes on
            read = [ids or [self._start()] for ids in prompts]
            write = [[*ids, self.end] if not ids or ids[-1] != self.end else ids for ids in self._ids([a for _, a in parts], special=False)]
            least = 1
        for raw, ids in zip(answers, write, strict=True):
            if len(ids) <= least:
                raise DataError(f"the target text {raw!r} becomes no tokens; give one that the tokenizer knows")
        return self._cut(read, write)

    def _classify(self, raws: Sequence[Text]) -> list[Tokens]:
        texts, pairs = [self._filled(raw.text) for raw in raws], [raw.pair or "" for raw in raws]
        paired = any(raw.pair is not None for raw in raws)
        options = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False, "return_overflowing_tokens": False}
        found = self.tokenizer(texts, pairs, **options) if paired else self.tokenizer(texts, **options)
        at_most = sum(len(ids) >= self.max_length for ids in found["input_ids"])
        if at_most:  # exact only if tokenized again; nobody needs that
            log.info("%d of %d texts fill all %d tokens; what is longer was cut", at_most, len(raws), self.max_length)
        types = found.get("token_type_ids") or [None] * len(raws)
        return [
            Tokens(torch.tensor(ids), None, None if t is None else torch.tensor(t))
            for ids, t in zip(found["input_ids"], types, strict=True)
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

    def _dialogue(self, raw: Text, answer: str) -> tuple[str, str]:
        if not self.chat_template:
            raise DataError("the data holds dialogues, and the tokenizer has no chat template; use a checkpoint with one, or other columns")
        turns = [{"role": role, "content": content} for role, content in (*raw.before, ("user", self._filled(raw.text)))]
        try:
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        except Exception as error:  # a template is a program: anything can come out of it
            raise DataError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return prompt, whole[len(prompt) :] if whole.startswith(prompt) else answer

    def _ids(self, texts: list[str], special: bool, target: bool = False) -> list[list[int]]:
        key = {"text_target": texts} if target else {"text": texts}
        return self.tokenizer(**key, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _cut(self, read: list[list[int]], write: list[list[int]]) -> list[Tokens]:
        """Shorten what is too long: a source at its end, a prompt at its beginning, an answer at its end."""
        cut, found = 0, []
        for source, answer in zip(read, write, strict=True):
            kept = answer[: self.max_length - 1] if self.kind == CAUSAL else answer[: self.max_length]
            room = self.max_length - len(kept) if self.kind == CAUSAL else self.max_length
            short = source[-room:] if self.kind == CAUSAL else source[:room]
            cut += len(short) < len(source) or len(kept) < len(answer)
            found.append(Tokens(torch.tensor(short), torch.tensor(kept)))
        if cut:
            log.info("%d of %d texts are longer than %d tokens and were cut", cut, len(found), self.max_length)
        return found

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
