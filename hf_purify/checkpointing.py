"""Gradient checkpointing: less memory for more time, in training and in mask tuning alike."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_purify.errors import ConfigError

_OPEN = "_hf_purify_recomputed"


def check_layers(model: nn.Module) -> None:
    """Raises ConfigError where a model has no layers that can be run again."""
    if not _layers(model) and not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"{type(model).__name__} has no layers for gradient checkpointing: leave it (--gradient-checkpointing) out")


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Keep only what enters each layer, and run the layer again in the backward pass, as long as the context is open.

    transformers does so in train mode alone, and masks are tuned in eval mode: here the mode does not matter.
    """
    if getattr(model, _OPEN, False):  # within another such context
        yield
        return
    setattr(model, _OPEN, True)
    layers = _layers(model)
    for layer in layers:
        layer.forward = functools.partial(_again, layer.forward)
    if not layers:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    try:
        yield
    finally:
        delattr(model, _OPEN)
        for layer in layers:
            del layer.forward  # the class's own is there again
        if not layers:
            model.set_grad_checkpointing(False)  # type: ignore[operator]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those that transformers would run again; timm's networks have a switch of their own."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward pass, which is to be run again; a cache would then be written twice, so that there is none."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    from transformers.cache_utils import Cache

    given = [None if isinstance(a, Cache) else a for a in args]
    named = {k: False if k == "use_cache" else None if isinstance(v, Cache) else v for k, v in kwargs.items()}
    return checkpoint(functools.partial(forward, **named), *given, use_reentrant=False)
