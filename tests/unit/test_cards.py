"""The model card: what the Hub reads of it, what a person reads, and that no value of a stranger is more than text in it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from huggingface_hub import ModelCard
from papers import SHA, output_at, report_of

from hf_purify.cards import make_card
from hf_purify.errors import ConfigError, UnsafeCheckpoint
from hf_purify.provenance import FILE, Provenance, read_provenance
from hf_purify.rows import Row

SCHEMA = json.loads(importlib.resources.files("hf_purify_hub_cards").joinpath("provenance.schema.json").read_text("utf-8"))


def card_of(folder: Path, **changes: Any) -> ModelCard:
    output_at(folder, report_of(**changes))
    return ModelCard.load(folder / "out" / "README.md")


def test_metadata_are_what_the_client_of_the_hub_reads(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    data = card.data.to_dict()
    assert data["base_model"] == "some-org/model"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["some-org/pictures"]
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["hf-purify", "backdoor-defense", "rnp"]
    figures = {(r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert figures == {
        ("accuracy", "clean accuracy (n=200)"): 0.95,
        ("attack_success_rate", "attack success rate, badnets (n=180)"): 0.027778,
    }
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.dataset_split, first.dataset_revision) == ("some-org/pictures", "test", SHA)


def test_a_person_finds_table_limits_files_and_the_way_to_repeat(tmp_path: Path) -> None:
    text = card_of(tmp_path).content
    assert "| rnp | 95.0 % [91.0, 97.3] | 2.8 % [1.2, 6.3] |" in text
    assert "| fine_tune (control) |" in text
    assert "lowered the attack success rate of badnets from 97.8 % to 2.8 % (n=180)" in text
    assert "hf-purify verify out" in text
    assert "AutoModelForImageClassification.from_pretrained('out')" in text
    assert "hf-purify purify some-org/model --clean some-org/pictures --method rnp" in text
    assert "chat template" in text
    assert "look twice" in text
    assert "1 tensors are not those of the base; base and `neuron_mask.safetensors` together" in text
    assert "config.json" in text
    files = json.loads((tmp_path / "out" / FILE).read_text())["files"]
    assert f"| `{files['model.safetensors']['sha256'][:16]}` |" in text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("victim", "Backdoored on purpose"),
        ("adapter", "PeftModel.from_pretrained(base, 'out')"),
        ("adapter", f"revision='{SHA}'"),
        ("repair", f"hf-purify apply out --to some-org/model@{SHA} -o purified"),
    ],
)
def test_each_kind_says_how_it_is_used(kind: str, said: str, tmp_path: Path) -> None:
    output_at(tmp_path, kind=kind)
    text = (tmp_path / "out" / "README.md").read_text()
    assert said in text
    relation = yaml.safe_load(text.split("---")[1]).get("base_model_relation")
    assert relation == ("finetune" if kind == "victim" else "adapter")


def test_a_base_that_is_no_repository_is_not_named_as_one(tmp_path: Path) -> None:
    data = card_of(tmp_path, checkpoint={"source": "/data/models/net", "revision": None, "kind": "timm"}, test={}).data.to_dict()
    assert "base_model" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "test-data"


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.invalid/x.png)",
    "| cell | cell |",
    "---\nlicense: mit\n---",
    "```\n# heading\n```",
    "\x1b]8;;http://evil.invalid\x07link\x1b]8;;\x07",
    "\x1b[2J",
    "a\nb: c",
    "!!python/object/apply:os.system ['id']",
    "'; rm -rf ~; echo '",
    "$(id) `id`",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe",
    '=HYPERLINK("http://evil.invalid")',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_value_is_text_and_nothing_else(text: str, tmp_path: Path) -> None:
    honest = card_of(tmp_path / "honest").content
    rows = report_of().rows
    rows[1].asr = {text: rows[1].asr["badnets"]}
    rows.append(Row(text, "other"))
    hostile = card_of(
        tmp_path / "hostile",
        title=text,
        rows=rows,
        checkpoint={"source": text, "revision": SHA, "kind": text, "architecture": text},
        clean={"source": text, "split": text, "samples": 5},
        method={"name": "rnp", "config": {text: text}},
        command=text,
        warnings=[text],
    ).content
    head, body = hostile.split("---\n", 2)[1:]
    assert set(yaml.safe_load(head)) <= set(yaml.safe_load(honest.split("---\n", 2)[1]))
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<script|<img|(?<!\\)\]\(|(?<!\\)\]\[", outside)
    assert not [c for c in hostile if not c.isprintable() and c != "\n"], "terminal escapes and marks that turn the direction of writing"
    assert re.findall(r"^#+ .*$", outside, re.MULTILINE) == re.findall(r"^#+ .*$", honest.split("---\n", 2)[2], re.MULTILINE)
    columns = {line.count("|") - line.count("\\|") for line in outside.splitlines() if line.startswith("| ") and "sha256" not in line}
    assert len(columns) <= 3, "a cell that ends early makes another number of columns"


def test_an_edited_card_of_the_base_carries_only_words_over(tmp_path: Path) -> None:
    provenance = output_at(tmp_path)
    text = make_card(report_of(), provenance, "me/model", {"license": {"a": 1}, "language": ["en", 7], "license_link": "x" * 999})
    assert not {"license", "language", "license_link"} & set(yaml.safe_load(text.split("---")[1]))


def test_provenance_is_what_its_schema_says(tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    output_at(tmp_path)
    found = json.loads((tmp_path / "out" / FILE).read_text())
    jsonschema.validate(found, SCHEMA)
    assert set(SCHEMA["properties"]) == {f.name for f in dataclasses.fields(Provenance)} == set(SCHEMA["required"])
    assert found["changed"] == {"fc.weight": {"values": 4, "of": 6, "relative": 0.665062, "what": "changed"}}
    assert found["base"]["revision"] == SHA
    assert set(found["base"]["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert read_provenance(tmp_path / "out").complete


BROKEN: dict[str, tuple[Any, str]] = {
    "no mapping": ([], "expected a mapping"),
    "another format": ({"format": "x"}, "expected format 'hf-purify-provenance/1', got 'x'"),
    "unknown key": ({"kinds": 1}, "unknown key 'kinds'; did you mean 'kind'"),
    "unknown kind": ({"kind": "other"}, "kind must be one of"),
    "files of a wrong type": ({"files": []}, "files: expected dict"),
    "no hash": ({"files": {"a": {"sha256": "x", "bytes": 1}}}, "must map file names to sha256 and bytes"),
    "no size": ({"files": {"a": {"sha256": "0" * 64}}}, "must map file names to sha256 and bytes"),
    "file outside": ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "names the file '../../etc/passwd'"),
    "base that is no commit": ({"base": {"source": "a/b", "revision": "main"}}, "40 hexadecimal digits, got 'main'"),
    "base of a wrong type": ({"base": {"source": 7}}, "base must name a source"),
    "rows of a wrong type": ({"report": {"rows": {}}}, "rows as a list"),
    "a row that is none": ({"report": {"rows": [7]}}, r"rows\[0\]: expected a mapping, got int"),
    "figures that are none": ({"report": {"rows": [{"name": "x", "kind": "method", "asr": {"t": {"hits": 9, "n": 3}}}]}}, "0 <= hits <= n"),
    "a method of a wrong type": ({"report": {"method": []}}, "a method as a mapping"),
    "oddities of a wrong type": ({"oddities": "x"}, "oddities: expected list"),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_provenance_of_a_stranger_is_checked(change: Any, said: str, tmp_path: Path) -> None:
    output_at(tmp_path)
    file = tmp_path / "out" / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises((ConfigError, UnsafeCheckpoint), match=said):
        read_provenance(tmp_path / "out")
