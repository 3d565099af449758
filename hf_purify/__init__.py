"""Repair neural networks that carry a backdoor, with a handful of clean samples, and prove what the repair did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_purify.errors import PurifyError
    from hf_purify.masks import bake, load_mask, masked, save_mask
    from hf_purify.method import Context, Method, MethodConfig, Verdict
    from hf_purify.neurons import NeuronGroup, NeuronIndex
    from hf_purify.output import apply_mask
    from hf_purify.purifier import implant, measure, purify
    from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe
    from hf_purify.report import Report

__version__ = "0.1.0"

_PUBLIC = {
    "PurifyError": "errors",
    "bake": "masks",
    "load_mask": "masks",
    "masked": "masks",
    "save_mask": "masks",
    "Context": "method",
    "Method": "method",
    "MethodConfig": "method",
    "Verdict": "method",
    "NeuronGroup": "neurons",
    "NeuronIndex": "neurons",
    "apply_mask": "output",
    "implant": "purifier",
    "measure": "purifier",
    "purify": "purifier",
    "ImplantRecipe": "recipe",
    "MeasureRecipe": "recipe",
    "PurifyRecipe": "recipe",
    "Report": "report",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `import hf_purify` alone loads neither torch nor transformers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_purify' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_purify.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
