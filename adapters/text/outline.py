"""Text models as their configs describe them, and texts of one length: for estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_purify.adapter import Batch, Loaded, Outline
from hf_purify.errors import ConfigError

from .._checkpoints import blank_model, stored_dtype
from .examples import IGNORED
from .loading import TASKS, auto_class, kind_of, places
from .prompts import CAUSAL, CLASSIFIER, LONGEST, Prompt


def make_outline(config: Mapping[str, Any], length: int | None) -> Outline:
    """The model, and texts of `length` tokens: of a causal model prompt and answer, all of whose tokens but the first are to be said;
    of a sequence-to-sequence model so many on either side.

    Raises:
        ConfigError: the model has no positions for so many tokens.
    """
    kind = kind_of(config) or CLASSIFIER
    model: Any = blank_model(config, str(config.get("_name_or_path") or config.get("model_type")), auto_class(kind), f"{kind} model")
    most = min(places(model), default=None)
    if length is not None and most is not None and length > most:
        raise ConfigError(f"length must be at most {most}, the tokens that the model has positions for; got {length}")
    size = length or min(LONGEST, most or LONGEST)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    pad, vocabulary = model.config.pad_token_id, model.config.get_text_config().vocab_size

    def batch(n: int) -> Batch:
        ids = torch.arange(n * size).view(n, size) % vocabulary  # of one token alone, no two places would differ
        ids[ids == pad] = (pad + 1) % vocabulary
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(n, dtype=torch.long)}
        if kind == CLASSIFIER:
            return read
        aims = ids.clone()
        if kind == CAUSAL:
            aims[:, 0] = IGNORED  # the answer stands in the row of its text
        return {**read, "target_ids": aims, "room": torch.full((n,), size)}

    loaded = Loaded(model, Prompt(None, kind, max_length=size), [], str(config.get("model_type")), "transformers", task=TASKS[kind])
    return Outline(loaded, batch, f"{size} tokens", stored_dtype(model))
