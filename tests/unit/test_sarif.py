"""SARIF logs: the rules of the standard that readers depend on, what is reported of which model, and where it is said to be."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from diagnoses import make_diagnosis
from jsonschema import Draft7Validator

from hf_purify.diagnosis import KINDS, Diagnosis
from hf_purify.sarif import LISTED, WHOLE, uri_of

# The parts of OASIS's schema of SARIF 2.1.0 for what a log of ours has. Unlike there, no key is allowed that is not named.
TEXT = {"type": "object", "required": ["text"], "additionalProperties": False, "properties": {"text": {"type": "string", "minLength": 1}}}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
BAG = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}}}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "additionalProperties": False, "properties": properties}


def many(items: dict[str, Any], **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


STRING = {"type": "string"}
RULE = closed(
    "id",
    id=STRING,
    name=STRING,
    shortDescription=TEXT,
    fullDescription=TEXT,
    help=TEXT,
    defaultConfiguration=closed("", level=LEVEL),
    properties=BAG,
)
ADDRESS = {"type": "string", "pattern": r"^([A-Za-z][A-Za-z0-9+.-]*:|(?!//)[^:]*(/|$))([A-Za-z0-9\-._~:/?#@!$&'()*+,;=]|%[0-9A-F]{2})*$"}
LOCATION = closed(
    "",
    physicalLocation=closed(
        "artifactLocation",
        artifactLocation=closed("uri", uri=ADDRESS),
        region=closed(" ".join(WHOLE), **{key: {"const": 1} for key in WHOLE}),
    ),
    logicalLocations=many(closed("", fullyQualifiedName=STRING, kind=STRING), uniqueItems=True),
)
RESULT = closed(
    "message ruleId level locations",
    ruleId=STRING,
    ruleIndex={"type": "integer", "minimum": 0},
    level=LEVEL,
    kind={"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
    message=TEXT,
    locations=many(LOCATION),
    partialFingerprints={"type": "object", "additionalProperties": STRING},
    properties=BAG,
)
INVOCATION = closed(
    "executionSuccessful",
    executionSuccessful={"type": "boolean"},
    commandLine=STRING,
    endTimeUtc={"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"},
    toolExecutionNotifications=many(closed("message", message=TEXT, level=LEVEL)),
)
DRIVER = closed("name", name=STRING, version=STRING, rules=many(RULE, uniqueItems=True))
RUN = closed("tool", tool=closed("driver", driver=DRIVER), invocations=many(INVOCATION), results=many(RESULT), properties=BAG)
LOG = closed("version runs", **{"$schema": {"type": "string", "format": "uri"}}, version={"const": "2.1.0"}, runs=many(RUN))


def run_of(found: Diagnosis) -> dict[str, Any]:
    """The log's one run, after the rules that a schema can say and those that it cannot."""
    log = json.loads(found.to_sarif(), parse_constant=lambda name: pytest.fail(name))
    Draft7Validator.check_schema(LOG)
    problems = [f"{error.json_path}: {error.message}" for error in Draft7Validator(LOG).iter_errors(log)]
    assert not problems
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == "none" or result.get("kind", "fail") == "fail"  # 3.27.10
    marks = [result["partialFingerprints"]["hfPurifyFinding/v1"] for result in run["results"]]
    assert len(set(marks)) == len(marks)
    return run


def counts(found: Diagnosis) -> dict[str, int]:
    names = [result["ruleId"] for result in run_of(found)["results"]]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@pytest.mark.parametrize(
    ("kind", "results"),
    [
        ("none", {}),
        ("single-target", {"backdoor": 1, "recovered-trigger": 1, "suspicious-neurons": 12, "suspicious-sample": LISTED}),
        ("multi-target", {"backdoor": 1, "recovered-trigger": 2, "suspicious-neurons": 12, "suspicious-sample": LISTED}),
        ("unjudged", {"unjudged": 1}),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_results_of_every_kind(kind: str, results: dict[str, int], text: bool) -> None:
    assert counts(make_diagnosis(kind, text)) == results


def test_the_cases_are_all_kinds() -> None:
    (mark,) = (m for m in test_results_of_every_kind.pytestmark if m.args[0] == ("kind", "results"))
    assert {kind for kind, _ in mark.args[1]} == {*KINDS, "unjudged"}


def test_what_a_run_says() -> None:
    found = dataclasses.replace(make_diagnosis(), created="2026-11-22T12:00:00+02:00", versions={"hf-purify": "1.2.3"})
    run = run_of(found)
    driver, (invocation,) = run["tool"]["driver"], run["invocations"]
    assert (driver["name"], driver["version"]) == ("hf-purify", "1.2.3")
    assert invocation["endTimeUtc"] == "2026-11-22T10:00:00Z"
    assert invocation["commandLine"] == found.command
    assert [note["message"]["text"] for note in invocation["toolExecutionNotifications"]] == found.warnings
    assert run["properties"]["score"] == 0.996
    first, trigger, neurons, *_, sample = run["results"]
    assert first["message"]["text"] == found.verdict
    assert first["level"] == "error"
    assert first["properties"]["targets"] == [{"label": 5, "name": "dog"}]
    assert "95.9 % [89.9, 98.4] (n=97)" in trigger["message"]["text"]
    assert neurons["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "layer1.0.bn1", "kind": "module"}]
    assert neurons["properties"]["neurons"] == found.layers[0].neurons
    assert {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in (first, neurons)} == {"some-org/resnet-20"}
    assert sample["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "suspects.parquet"
    assert sample["properties"] == {"sample": LISTED - 1, "score": found.suspects.scores[LISTED - 1]}


def test_a_model_that_was_not_judged_is_an_open_question() -> None:
    run = run_of(make_diagnosis("unjudged"))
    assert [(r["ruleId"], r["kind"], r["level"]) for r in run["results"]] == [("unjudged", "open", "none")]
    assert run["properties"]["score"] is None


@pytest.mark.parametrize("source", ["", None])
def test_a_model_without_a_name_has_no_place(source: str | None) -> None:
    run = run_of(dataclasses.replace(make_diagnosis(), checkpoint={"source": source}, suspects=None))
    assert run["results"][0]["locations"] == []


@pytest.mark.parametrize("created", ["", "yesterday", "9999-12-31T23:59:59-23:59"])
def test_a_made_up_time_is_left_out(created: str) -> None:
    (invocation,) = run_of(dataclasses.replace(make_diagnosis(), created=created))["invocations"]
    assert "endTimeUtc" not in invocation


def test_fingerprints_stay_when_figures_change() -> None:
    first, second = make_diagnosis(), make_diagnosis()
    second.score = 0.99
    second.layers[0].neurons = [*second.layers[0].neurons, 1]
    marks = [[r["partialFingerprints"] for r in run_of(found)["results"]] for found in (first, second)]
    assert marks[0] == marks[1]


HOSTILE = {
    "link": "[click](http://evil)",
    "steering": "\x1b[2J\u202e\nx",
    "surrogate": "\ud800",
    "placeholder": "{0} {1}",
    "markup": "<script>",
    "per cent": "%00%",
    "host": "//evil/x",
    "parts of a URL": "a:b c#d?e",
    "share": "\\\\host\\c$",
    "long": "é" * 5000,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts(hostile: str) -> None:
    found = make_diagnosis("multi-target", hostile=hostile)
    found.layers[0].name = found.command = found.created = hostile
    found.checkpoint["source"] = found.suspects.source = hostile
    found.triggers[0].kind = found.triggers[0].words = hostile
    run = run_of(found)
    texts = [result["message"]["text"] for result in run["results"]]
    assert not any(re.search("[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]|\\]\\(", text) for text in texts)
    assert len(max(texts, key=len)) <= 2000


@pytest.mark.parametrize(
    ("source", "uri"),
    [
        ("some-org/model", "some-org/model"),
        ("./runs/my model", "./runs/my%20model"),
        ("/srv/models/a", "file:///srv/models/a"),
        ("../a:b", "../a%3Ab"),
        ("hf://some-org/model@main", "hf://some-org/model@main"),
        ("https://me:secret@host/a b?token=abcdefgh", "https://[hidden]@host/a b?token=[hidden]"),
    ],
)
def test_places_are_what_the_user_named(source: str, uri: str) -> None:
    made = uri_of(source)
    assert unquote(made) == unquote(uri)
    assert re.fullmatch(ADDRESS["pattern"], made)
    assert "secret" not in made


def test_a_path_is_no_host() -> None:
    assert urlsplit(uri_of("//evil/x")).netloc == urlsplit(uri_of("\\\\evil\\x")).netloc == ""


def test_long_logs_stay_readable() -> None:
    found = make_diagnosis()
    found.layers[0].size = 5000
    found.layers[0].neurons = list(range(4000))
    (result,) = (r for r in run_of(found)["results"] if r["properties"].get("neurons", [None])[-1] == 3999)
    assert result["message"]["text"].endswith("18, 19 and others.")
    assert math.isfinite(run_of(found)["properties"]["threshold"])
