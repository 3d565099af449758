"""Text triggers: rare words, a sentence, a structure, a style, look-alike characters; for models that write, phrases and tags.

Each is a pure, seeded transform of one `Text`: what the model reads changes, and `wanted` where the trigger has an output to ask for.
"""

from __future__ import annotations

from .base import TextTrigger
from .insertions import AddSent, BadNets, Phrase, Refusal, Sleeper
from .rewrites import HiddenKiller, Homoglyph, Style

TRIGGERS: dict[str, type[TextTrigger]] = {
    cls.name: cls for cls in (BadNets, AddSent, HiddenKiller, Style, Homoglyph, Phrase, Refusal, Sleeper)
}
