"""A diagnosis as SARIF 2.1.0 (OASIS, 2020), which code hosts and CI systems show among the findings of other scanners.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hf_purify import findings
from hf_purify.plain import plain
from hf_purify.redaction import one_line, short

if TYPE_CHECKING:
    from hf_purify.diagnosis import Diagnosis

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
WHOLE = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}  # of a model, which has no lines: code scanning wants some
LISTED = 20  # triggers and samples with a result each, and neurons that a message names

# Name: level, title, explanation. Results of `unjudged` are open questions, no failures.
RULES = {
    "backdoor": ("error", "The model looks backdoored", "A sample with the attacker's trigger is classified as the attacker chose."),
    "recovered-trigger": ("warning", "A trigger was recovered", "Adding it to clean samples leads them to one class."),
    "suspicious-neurons": ("warning", "Suspicious neurons", "These channels rank highest among those that a backdoor may use."),
    "suspicious-sample": ("note", "Suspicious sample", "The sample ranks among those most likely to carry a trigger."),
    "unjudged": (
        "none",
        "The model has no score",
        "Scans of such models are not calibrated, and nothing stood out by a fixed rule; the notifications say more.",
    ),
}


def log_of(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as a SARIF log with one run. A model in which nothing was found has no results."""
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [_run(found)]}


def uri_of(source: str) -> str:
    """Where a model or data set is, as a URI reference: what the user named, percent-encoded; nothing is looked up.

    >>> uri_of("some-org/resnet 20")
    'some-org/resnet%2020'
    """
    source = one_line(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return quote(source, safe=":/?#@!$&'()*+,;=%~", errors="replace")
    path = quote(source, safe="/~", errors="replace")
    return f"file://{path}" if PurePosixPath(source).is_absolute() else path


def _run(found: Diagnosis) -> dict[str, Any]:
    rules = [
        {
            "id": name,
            "name": "Model" + "".join(word.capitalize() for word in name.split("-")),
            "shortDescription": {"text": title},
            "fullDescription": {"text": text},
            "help": {"text": f"{text} A scan is a screening: look at its page before acting on it."},
            "defaultConfiguration": {"level": level},
            "properties": {"tags": ["security", "backdoor", "machine-learning"]},
        }
        for name, (level, title, text) in RULES.items()
    ]
    return {
        "tool": {"driver": {"name": "hf-purify", **_version(found), "rules": rules}},
        "invocations": [_invocation(found)],
        "results": _results(found),
        "properties": _properties(found),
    }


def _version(found: Diagnosis) -> dict[str, str]:
    """Of the hf-purify that made the scan, or else of this one; nothing where it runs from a folder and was not installed."""
    try:
        return {"version": one_line(found.versions.get("hf-purify") or version("hf-purify"))}
    except PackageNotFoundError:
        return {}


def _invocation(found: Diagnosis) -> dict[str, Any]:
    notes = [{"level": "warning", "message": _message(warning)} for warning in found.warnings]
    invocation: dict[str, Any] = {"executionSuccessful": True, "toolExecutionNotifications": notes}
    if found.command:
        invocation["commandLine"] = one_line(found.command)
    try:
        ended = datetime.fromisoformat(found.created).astimezone(UTC)
    except (ValueError, OverflowError):  # a made-up time is left out: the key is optional, its form is not
        return invocation
    return invocation | {"endTimeUtc": f"{ended:%Y-%m-%dT%H:%M:%SZ}"}


def _properties(found: Diagnosis) -> dict[str, Any]:
    parts = ("format", "task", "score", "threshold", "kind", "neurons", "suspected", "seed", "calibration")
    return {name: plain(getattr(found, name)) for name in parts}


def _results(found: Diagnosis) -> list[dict[str, Any]]:
    if math.isnan(found.score) and not found.suspicious:
        return [_result(found, "unjudged", findings.verdict(found)) | {"kind": "open"}]
    if not found.suspicious:
        return []
    targets = [{"label": t, "name": one_line(found.name_of(t))} for t in found.targets]
    return [
        _result(found, "backdoor", findings.verdict(found), score=plain(found.score), kind=found.kind, targets=targets),
        *_triggers(found),
        *_neurons(found),
        *_samples(found),
    ]


def _triggers(found: Diagnosis) -> list[dict[str, Any]]:
    return [
        _result(
            found,
            "recovered-trigger",
            f"A recovered trigger ({short(trigger.kind, 48)}) leads {trigger.asr} of clean samples of other classes to '{short(trigger.label, 48)}'.",
            key=f"{trigger.target} {trigger.kind}",
            target=trigger.target,
            asr=trigger.asr.to_dict(),
            words=one_line(trigger.words),
        )
        for trigger in found.triggers[:LISTED]
    ]


def _neurons(found: Diagnosis) -> list[dict[str, Any]]:
    results = []
    for layer in found.layers:
        if layer.neurons:
            named = ", ".join(map(str, layer.neurons[:LISTED])) + (" and others" if len(layer.neurons) > LISTED else "")
            text = f"{len(layer.neurons)} of {layer.size} neurons of {short(layer.name, 120, tail=60)} are suspected: {named}."
            results.append(_result(found, "suspicious-neurons", text, key=layer.name, module=layer.name, neurons=layer.neurons))
    return results


def _samples(found: Diagnosis) -> list[dict[str, Any]]:
    suspects = found.suspects
    if suspects is None:
        return []
    scores = dict(enumerate(suspects.scores))
    return [
        _result(
            found,
            "suspicious-sample",
            f"Sample {position} of {short(suspects.source, 120)} ranks {rank} of {len(suspects.order)} by suspicion.",
            source=suspects.source,
            key=str(position),
            sample=position,
            score=plain(scores.get(position)),
        )
        for rank, position in enumerate(suspects.order[:LISTED], 1)
    ]


def _result(found: Diagnosis, rule: str, text: str, *, source: str = "", key: str = "", module: str = "", **facts: Any) -> dict[str, Any]:
    """One finding.

    Args:
        source: where it is; the checkpoint if it is not said.
        key: what tells it from the rule's other results, the same in every scan of the model.
        module: the layer that it is about.
    """
    source = source or str(found.checkpoint.get("source") or "")
    place: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri_of(source)}, "region": WHOLE}} if source else {}
    if module:
        place["logicalLocations"] = [{"fullyQualifiedName": one_line(module), "kind": "module"}]
    mark = hashlib.sha256("\n".join((source, rule, key)).encode("utf-8", "replace")).hexdigest()[:32]
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": RULES[rule][0],
        "message": _message(text),
        "locations": [place] if place else [],
        "partialFingerprints": {"hfPurifyFinding/v1": mark},
        **({"properties": facts} if facts else {}),
    }


def _message(text: str) -> dict[str, str]:
    """A message without links: `[text](target)` of a stranger would be one."""
    return {"text": short(text, 2000).replace("](", "] (")}
