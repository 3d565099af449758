"""A repair that begins with what a scan found."""

from __future__ import annotations

import torch

from hf_purify.diagnosis import Diagnosis, read_diagnosis
from hf_purify.errors import ConfigError, IndexMismatch, shown
from hf_purify.method import Context, Finding, Method
from hf_purify.neurons import NeuronIndex
from hf_purify.registry import find, names
from hf_purify.states import fingerprint


def weights_of(context: Context) -> str:
    """A digest of a model's weights, which a scan records, and a repair that begins with it checks."""
    return fingerprint(context.model.state_dict())[:32]


def read_finding(path: str, context: Context, method: Method) -> Finding:
    """What a scan found of this model.

    Args:
        path: output folder of a scan, or its `scan.json`.

    Raises:
        ConfigError: there is no scan, it found nothing, or the method makes no use of one.
        IndexMismatch: it is of another model, or of other weights.
    """
    used = [part for part in getattr(method, "methods", [method]) if part.begins]
    if not used:
        known = ", ".join(name for name in names("method") if find("method", name).begins)
        raise ConfigError(f"{method.name} makes no use of a scan: leave from_scan (--from-scan) out, or choose one that does ({known})")
    found = read_diagnosis(path)
    recorded = found.checkpoint.get("weights")
    if recorded != weights_of(context):
        raise IndexMismatch(
            f"the scan in '{path}' is of other weights, those of '{found.checkpoint.get('source')}': scan this model itself (hf-purify scan)"
        )
    if not found.suspicious or not found.triggers:
        raise ConfigError(
            f"the scan in '{path}' found nothing to begin with ({found.verdict}): leave from_scan (--from-scan) out to repair the model all the same"
        )
    kind, kinds = found.triggers[0].kind, context.adapter.stand_ins(context.model)
    if kind not in kinds or not all(0 <= target < context.classes for target in found.targets):
        raise IndexMismatch(
            f"the scan in '{path}' names {shown(kind)} towards {found.targets}, and this model has {context.classes} classes and triggers of the kinds {', '.join(kinds)}"
        )
    return Finding(tuple(found.targets), kind, _flags(found, context.index))


def _flags(found: Diagnosis, index: NeuronIndex) -> torch.Tensor:
    """Which neurons the scan suspects, `(N,)` of bool over the whole index."""
    suspects = {layer.name: layer.neurons for layer in found.layers}
    flags = []
    for group in index:
        flag = torch.zeros(group.size, dtype=torch.bool)
        chosen = suspects.get(group.name, [])
        if any(not isinstance(i, int) or not 0 <= i < group.size for i in chosen):
            raise IndexMismatch(f"the scan names neurons of '{group.name}' that this model has not: it has {group.size} there")
        flag[chosen] = True
        flags.append(flag)
    return torch.cat(flags)
