"""Repair neural networks that carry a backdoor, with a handful of clean samples, and prove what the repair did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_purify.diagnosis import Diagnosis as Diagnosis
    from hf_purify.errors import PurifyError as PurifyError
    from hf_purify.masks import bake as bake
    from hf_purify.masks import load_mask as load_mask
    from hf_purify.masks import masked as masked
    from hf_purify.masks import save_mask as save_mask
    from hf_purify.method import Context as Context
    from hf_purify.method import Method as Method
    from hf_purify.method import MethodConfig as MethodConfig
    from hf_purify.method import Verdict as Verdict
    from hf_purify.neurons import NeuronGroup as NeuronGroup
    from hf_purify.neurons import NeuronIndex as NeuronIndex
    from hf_purify.output import apply_mask as apply_mask
    from hf_purify.publishing import push as push
    from hf_purify.purifier import implant as implant
    from hf_purify.purifier import measure as measure
    from hf_purify.purifier import purify as purify
    from hf_purify.recipe import ImplantRecipe as ImplantRecipe
    from hf_purify.recipe import MeasureRecipe as MeasureRecipe
    from hf_purify.recipe import PurifyRecipe as PurifyRecipe
    from hf_purify.recipe import ScanRecipe as ScanRecipe
    from hf_purify.report import Report as Report
    from hf_purify.scanner import scan as scan
    from hf_purify.verification import Verification as Verification
    from hf_purify.verification import apply as apply
    from hf_purify.verification import verify as verify

__version__ = "0.1.0"

_PUBLIC = {
    "Diagnosis": "diagnosis",
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
    "push": "publishing",
    "implant": "purifier",
    "measure": "purifier",
    "purify": "purifier",
    "ImplantRecipe": "recipe",
    "MeasureRecipe": "recipe",
    "PurifyRecipe": "recipe",
    "ScanRecipe": "recipe",
    "Report": "report",
    "scan": "scanner",
    "Verification": "verification",
    "apply": "verification",
    "verify": "verification",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `import hf_purify` alone loads neither torch nor transformers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_purify' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_purify.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
