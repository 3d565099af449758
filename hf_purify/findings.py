"""A diagnosis for people to read: the verdict in a sentence, Markdown, the terminal, the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_purify.diagnosis import Diagnosis


def verdict(found: Diagnosis) -> str:
    """The outcome in a sentence or two."""
    if math.isnan(found.score):
        return "This model could not be judged; the warnings say why."
    chance = f"{100 * (1 - found.score):.1f} %" if found.score < 0.999 else "under 0.1 %"
    of = f"an estimated {chance} of clean models look as odd as this"
    if not found.suspicious:
        return f"No backdoor was found: {of}. A scan can miss one."
    names = " and ".join(f"'{found.name_of(t)}'" for t in found.targets)
    what = {
        "single-target": f"towards the class {names}",
        "multi-target": f"towards the classes {names}",
        "all-to-all": "that leads each class to another one",
    }.get(found.kind, "whose target is not clear")
    return f"Suspicious of a backdoor {what}: {of}."
