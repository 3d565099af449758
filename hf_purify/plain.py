"""Plain data: what JSON holds of dataclasses and pictures, and the check of what comes back."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from hf_purify.errors import ConfigError, did_you_mean
from hf_purify.redaction import redacted

if TYPE_CHECKING:
    import numpy as np

# What a terminal or an editor obeys, and JSON may hold as it is: controls beyond ASCII, marks of direction, lone surrogates.
STEERING = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def unique_keys(refuse: Callable[[str], Exception]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For `json.loads`, as `object_pairs_hook`: raises what `refuse` makes of a repeated key, of which readers take one or the other."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise refuse(Counter(k for k, _ in pairs).most_common(1)[0][0])
        return found

    return unique


def as_json(values: Any) -> str:
    """What `plain` gave, as JSON that steers no terminal."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def checked(cls: type, data: Any, where: str, version: str | None = None) -> dict[str, Any]:
    """Return a mapping's entries if they are fields of a dataclass and of the right plain types, else raise `ConfigError`.

    Args:
        version: what its entry `format` must be, where it has one.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    if version is not None and data.get("format") != version:
        raise ConfigError(f"{where}: expected format '{version}', got {data.get('format')!r}; was it written by another version?")
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "list": list, "dict": dict}
    for key, f in known.items():
        if key not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{where}: missing key '{key}'")
            continue
        kind = str(f.type).partition("[")[0].partition(" ")[0]
        nullable = kind == "float"  # NaN is written as null
        if kind in kinds and not (isinstance(data[key], kinds[kind]) or (nullable and data[key] is None)):
            raise ConfigError(f"{where}.{key}: expected {f.type}, got {type(data[key]).__name__}")
        inner = str(f.type).removeprefix("list[").removesuffix("]").partition("[")[0] if kind == "list" else ""
        for item in data[key] if inner in kinds else ():
            if not (isinstance(item, kinds[inner]) or (inner == "float" and item is None)):
                raise ConfigError(f"{where}.{key}: expected {f.type}, got {type(item).__name__} in it")
    return dict(data)


def plain(value: Any) -> Any:
    """Only what JSON knows: tensors and arrays become lists, NaN and infinity None, anything else its text. Texts hold no tokens."""
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {redacted(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return plain(value.tolist()) if hasattr(value, "tolist") else redacted(str(value))


def encoded(picture: np.ndarray) -> str:
    """A picture `(H, W, 3)` uint8 as PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: Any, where: str) -> np.ndarray:
    """The inverse of `encoded`.

    Raises:
        ConfigError: anything but a PNG in base64.
    """
    import numpy as np
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: expected a PNG in base64; {error}") from error
