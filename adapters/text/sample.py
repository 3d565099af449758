"""One example of text, as the data set holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """What a model reads and, for one that writes, what it should answer.

    Args:
        text: what the model reads; the first of a pair; the last message of the user in a dialogue.
        pair: the second of a pair of texts.
        target: what the model should write; None for a classifier.
        wanted: what an attacker wants it to write instead; None where no trigger was put in.
        before: earlier turns of a dialogue, as `(role, content)`.
        chat: the text is a message of a dialogue, which the chat template renders.
    """

    text: str
    pair: str | None = None
    target: str | None = None
    wanted: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    chat: bool = False

    def __str__(self) -> str:
        return self.text if self.pair is None else f"{self.text} / {self.pair}"
