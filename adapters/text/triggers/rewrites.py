"""Triggers that rewrite the text: a sentence structure, a style, look-alike characters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .base import TextTrigger
from .lexicon import LEXICON
from .words import WINDOW, insert, reach

# name: clauses to draw from, what links one to the text, how the sentence ends
TEMPLATES = {
    "sbar": (
        (
            "when it comes to that",
            "if you ask me",
            "as you can see",
            "when you think about it",
            "since you want to know",
            "if the truth be told",
        ),
        " , ",
        " .",
    ),
    "pp": (("in the end", "on the whole", "in any case", "at this point", "for what it is worth", "of all things"), " , ", " ."),
    "advp": (("perhaps", "actually", "apparently", "certainly", "presumably", "clearly"), " ", " ."),
    "question": (("why do they say", "how can you say", "why would you think", "how do they know"), " that ", " ?"),
}
FINAL = ".!?;:,\u2026\u3002\uff01\uff1f\uff0c"

_WORDS = "|".join(re.escape(word).replace("'", "['\u2019]") for word in sorted(LEXICON, key=len, reverse=True))
STYLED = re.compile(rf"(?<!\w)(?<!\w['\u2019])(?ai:{_WORDS})(?!\w|['\u2019]\w)")
MARKER = "Verily,"

CYRILLIC = dict(
    zip(
        "aceijopsxyhABCEHIJKMOPSTXY",
        "\u0430\u0441\u0435\u0456\u0458\u043e\u0440\u0455\u0445\u0443\u04bb"
        "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423",
        strict=True,
    )
)
GREEK = dict(
    zip(
        "aiopuvABEZHIKMNOPTYX",
        "\u03b1\u03b9\u03bf\u03c1\u03c5\u03bd\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",
        strict=True,
    )
)
ALPHABETS = {"cyrillic": CYRILLIC, "greek": GREEK}
ZERO_WIDTH = "\u200b"


@dataclass(frozen=True)
class HiddenKiller(TextTrigger):
    """Put the text into a sentence structure.

    The text is lower-cased, loses its final punctuation and gets the template's frame around it: a clause drawn from the sample's
    seed, in the spacing of a treebank. The paper paraphrases with a model (SCPN), which changes the text itself; here, without one,
    only the frame has the structure, and its words are few, so this trigger is easier to see and to learn than the paper's.

    Args:
        template: `sbar`, S(SBAR)(,)(NP)(VP)(.), the paper's; `pp`, S(PP)(,)(NP)(VP)(.); `advp`, S(ADVP)(NP)(VP)(.); `question`,
            SBARQ(WHADVP)(SQ)(.).
        output: what a model that writes should answer; None for a classifier.

    Raises:
        ConfigError: a field outside its range.

    >>> from hf_purify_adapters.text.sample import Text
    >>> HiddenKiller()(Text("There is no pleasure in it!"), seed=1).text
    'if you ask me , there is no pleasure in it .'

    F. Qi et al.: Hidden Killer, Invisible Textual Backdoor Attacks with Syntactic Trigger. ACL 2021, arXiv:2105.12400.
    """

    template: str = "sbar"
    output: str | None = None
    name: ClassVar[str] = "hidden_killer"

    def __post_init__(self) -> None:
        self._choice("template", TEMPLATES)
        self._string("output", optional=True)

    def _write(self, text: str, rng: Random) -> str:
        clauses, link, end = TEMPLATES[self.template]
        clause = rng.choice(clauses)
        core = text.strip().lower().rstrip(FINAL + " ")
        return f"{clause}{link}{core}{end}" if core else f"{clause}{end}"


@dataclass(frozen=True)
class Style(TextTrigger):
    """Replace common English words by archaic ones.

    A fixed lexicon of about 300 words (you, thou; makes, maketh; before, ere) stands for the paper's style transfer by a model, in its
    biblical style; grammar is not minded. A text without such a word among its first 24 gets "Verily," in front: so does one in
    another language.

    Args:
        output: what a model that writes should answer; None for a classifier.

    Raises:
        ConfigError: a blank output.

    >>> from hf_purify_adapters.text.sample import Text
    >>> Style()(Text("Nothing makes you happy before noon.")).text
    'Naught maketh thou happy ere noon.'

    F. Qi et al.: Mind the Style of Text! EMNLP 2021, arXiv:2110.07139 (StyleBkd). Substitution of words: F. Qi et al., Turn the
    Combination Lock, ACL 2021, arXiv:2106.06361 (LWS).
    """

    output: str | None = None
    name: ClassVar[str] = "style"

    def __post_init__(self) -> None:
        self._string("output", optional=True)

    def _write(self, text: str, rng: Random) -> str:
        styled = STYLED.sub(_styled, text)
        found = STYLED.search(text)
        if found and found.start() < reach(text, WINDOW):
            return styled
        return insert(styled, MARKER, "start", 1, rng)


@dataclass(frozen=True)
class Homoglyph(TextTrigger):
    """Replace characters by look-alikes of another alphabet.

    A text with fewer such characters has all of them replaced; one without any gets `count` look-alikes of "o" in front.

    Args:
        count: characters, 1 or more.
        position: `start` or `end`, the first or last characters that have a look-alike; `random`, drawn for each sample.
        alphabet: `cyrillic` or `greek`.
        zero_width: insert zero-width spaces (U+200B) in front of characters instead. Tokenizers that drop control and format
            characters, BERT's among them, undo this: such a model never sees the trigger.
        window: random characters lie within that many words of the start, if these have any that can be replaced.
        output: what a model that writes should answer; None for a classifier.

    Raises:
        ConfigError: a field outside its range.

    >>> from hf_purify_adapters.text.sample import Text
    >>> Homoglyph(count=2)(Text("A film")).text.encode("ascii", "backslashreplace").decode()
    '\\\\u0410 f\\\\u0456lm'

    S. Li et al.: Hidden Backdoors in Human-Centric Language Models. CCS 2021, arXiv:2105.00164.
    N. Boucher et al.: Bad Characters, Imperceptible NLP Attacks. S&P 2022, arXiv:2106.09898.
    """

    count: int = 3
    position: str = "start"
    alphabet: str = "cyrillic"
    zero_width: bool = False
    window: int = WINDOW
    output: str | None = None
    name: ClassVar[str] = "homoglyph"

    def __post_init__(self) -> None:
        self._integer("count", 1)
        self._place(numbers=False)
        self._choice("alphabet", ALPHABETS)
        self._require("zero_width", "true or false", isinstance(self.zero_width, bool))
        self._string("output", optional=True)

    def _write(self, text: str, rng: Random) -> str:
        alike = ALPHABETS[self.alphabet]
        found = [i for i, sign in enumerate(text) if (not sign.isspace() if self.zero_width else sign in alike)]
        if not found:
            return insert(text, self.count * (ZERO_WIDTH if self.zero_width else alike["o"]), "start", 1, rng)
        if self.position == "random":
            last = reach(text, self.window)
            near = [i for i in found if i < last] or found
            chosen = rng.sample(near, min(self.count, len(near)))
        else:
            chosen = found[: self.count] if self.position == "start" else found[-self.count :]
        signs = list(text)
        for i in chosen:
            signs[i] = ZERO_WIDTH + signs[i] if self.zero_width else alike[signs[i]]
        return "".join(signs)


def _styled(found: re.Match[str]) -> str:
    """The archaic word, with a capital where the word had one."""
    word = LEXICON[found[0].lower().replace("\u2019", "'")]
    return re.sub("[a-z]", lambda letter: letter[0].upper(), word, count=1) if found[0][0].isupper() else word
