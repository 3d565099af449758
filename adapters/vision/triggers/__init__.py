"""Image triggers: BadNets, Blended, SIG, Trojan square, WaNet, low frequency, BPP.

Each is a pure, seeded transform of one uint8 picture `(3, H, W)` or `(1, H, W)`, at any size. What does not depend on the picture
(patches, patterns, warping grids) is made once and cached; a pattern file is read when the trigger is built, not when it is used.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_purify.errors import unknown

from .distortions import BPP, WaNet
from .overlays import SIG, Blended, LowFrequency
from .patches import BadNets, TrojanSquare
from .picture import PictureTrigger

TRIGGERS = {cls.name: cls for cls in (BadNets, Blended, SIG, TrojanSquare, WaNet, LowFrequency, BPP)}


def make_trigger(name: str, **options: Any) -> PictureTrigger:
    """Build an image trigger by name.

    Args:
        name: one of `TRIGGERS`.
        options: fields of that trigger.

    Raises:
        UnknownName: no such trigger, or no such option.
        ConfigError: an option outside its range.

    >>> make_trigger("badnets", size=4, pattern="grid").size
    4
    """
    if name not in TRIGGERS:
        raise unknown("image trigger", name, TRIGGERS)
    cls = TRIGGERS[name]
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            raise unknown(f"option of trigger '{name}'", option, known)
    return cls(**options)
