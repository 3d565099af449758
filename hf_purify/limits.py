"""Counts and sizes in configs, before a library makes lists, layers or tensors of them.

The limits lie far above every model that there is. They only keep a library from counting to a billion: how much a model may hold is
measured against its file when it is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from hf_purify.errors import ModelError, shown

# Keys, and the most that they may say: the first that fits counts. For layers and their like a library makes something one by one, so
# that their limits are low; a size that is too large for the file's weights is found when the model is made (`room`).
LIMITS = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"(?:\w+_)?(?:layers|depths?|blocks|stages|repeats)|n_layer", 4096),
        (r"(?:num|n)_(?:labels|classes)", 1_000_000),
        (r"(?:num|n)_(?:\w+_)?(?:embeddings?|embeds|embd|buckets|positions|ctx|vocab|patches|points|latents|bins)", 2**28),
        (r"(?:num|n)_(?:\w+_)?(?:heads?|experts|groups|channels|queries|levels|codebooks|frames|filters|convs?|features|feats)", 2**16),
        (r"(?:\w+_)?(?:heads?|channels|groups|strides?|rank)|r", 2**16),
        (r"(?:\w+_)?(?:size|sizes|dim|dims|embeddings|positions|width|height|features)|d_\w+|shortest_edge|longest_edge", 2**28),
    )
)
UNLIMITED = {"chunk_size", "num_images", "max_relative_positions"}  # where a negative number is a word for `no limit`
# Of which a model has at least one.
POSITIVE = re.compile(
    r"(?:\w+_)?(?:hidden_size|patch_size|embed_dim)|intermediate_size|embedding_size|vocab_size|image_size|num_channels"
    r"|d_model|d_ff|n_embd|n_heads?|in_channels|in_chans|height|width|shortest_edge|longest_edge|r"
)
COUNTED = re.compile(r"(?:num|n)_\w+|depths?")  # and the former; under other names there are switches, as `fixed_input_size`
# Nothing is made of the numbers in these.
UNSIZED = {"tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "hf_purify.json"}
STAGES = re.compile(r"(?:\w+_)?(?:depths?|blocks|repeats)|layers")  # whose lists say how many layers each stage has
LONGEST_LIST = 4096
NAMED = {"id2label", "label2id"}  # whose keys are anything


def check_sizes(config: dict[str, Any], name: str, source: str) -> None:
    """Refuse counts and sizes that no model has.

    Args:
        name: of the config's file.

    Raises:
        ModelError: names the first key whose value is negative, zero, no number, or huge.
    """
    if name in UNSIZED:
        return
    for path, key, value in _sizes(config, ()):
        limit = next((most for pattern, most in LIMITS if pattern.fullmatch(key)), None)
        if limit is None or key in UNLIMITED:
            continue
        lowest = 1 if POSITIVE.fullmatch(key) else 0
        if problem := _problem(key, value, lowest, limit):
            raise ModelError(
                f"'{name}' of '{source}' says {path} = {shown(value)}: {problem}; expected a whole number from {lowest} to {limit}"
            )


def _problem(key: str, value: Any, lowest: int, most: int) -> str:
    """What is wrong with a size, or with the first bad one of a list of sizes."""
    match value:
        case list():
            if len(value) > LONGEST_LIST:
                return f"those are {len(value)} values"
            found = next((p for v in value if (p := _problem(key, v, 0, most))), "")
            together = sum(v for v in value if type(v) is int) if STAGES.fullmatch(key) else 0
            return found or (f"those are {together} together" if together > most else "")
        case bool() | str():
            return "it is no number" if COUNTED.fullmatch(key) or POSITIVE.fullmatch(key) else ""
        case float() if not math.isfinite(value):
            return "it is no finite number"
        case int() | float():
            return "it is too small" if value < lowest else "it is too large" if value > most else ""
    return ""


def _sizes(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str, Any]]:
    """All values of mappings, with the path and the key of each."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key in NAMED or key.startswith("hf_purify"):
            continue
        yield ".".join((*keys, key)), key, inner
        yield from _sizes(inner, (*keys, key))
    for inner in value if isinstance(value, list) else ():
        if isinstance(inner, (dict, list)):
            yield from _sizes(inner, keys)
