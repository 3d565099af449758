"""Diagnoses: what goes in comes out again, what is said of them, and that nothing in them is executed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnoses import make_diagnosis, picture, shown
from rich.console import Console

from hf_purify import findings
from hf_purify.diagnosis import KINDS, Diagnosis, Signal, SuspectLayer, Suspects, read_diagnosis
from hf_purify.errors import ConfigError, OutputError
from hf_purify.metrics import Proportion

HOSTILE = "<script>alert(1)</script></td>|`$x_{[red]\x1b[2J\u202e\n# h](javascript:a) @everyone"


def changed(found: Diagnosis, **changes: Any) -> Diagnosis:
    return dataclasses.replace(found, **changes)


def terminal(found: Diagnosis, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(findings.terminal(found))
    return console.export_text()


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text", [False, True])
    def test_of_every_kind(self, kind: str, text: bool) -> None:
        found = make_diagnosis(kind, text)
        assert Diagnosis.from_dict(json.loads(found.to_json())) == found

    def test_pictures_come_along_when_asked_for(self) -> None:
        found = make_diagnosis()
        without, with_pixels = (Diagnosis.from_dict(json.loads(found.to_json(pixels=p))) for p in (False, True))
        assert without.triggers[0].picture is without.triggers[0].samples[0].clean is None
        np.testing.assert_array_equal(with_pixels.triggers[0].picture, found.triggers[0].picture)
        np.testing.assert_array_equal(with_pixels.triggers[0].samples[1].triggered, found.triggers[0].samples[1].triggered)
        np.testing.assert_array_equal(with_pixels.suspects.top[2].clean, found.suspects.top[2].clean)

    def test_a_model_that_was_not_judged_stays_so(self) -> None:
        again = Diagnosis.from_dict(json.loads(make_diagnosis("unjudged").to_json()))
        assert math.isnan(again.score)
        assert again.verdict == "No class stands out, by a fixed rule, with no score: this says little."

    def test_values_that_are_no_numbers_are_shown_as_unknown(self) -> None:
        found = make_diagnosis()
        found.signals[0].values[3] = math.nan
        again = Diagnosis.from_dict(json.loads(found.to_json()))
        assert again.signals[0].values[3] is None
        for one in (found, again):
            assert re.search(r"<th scope=\"row\">cat</th>.*?<td>unknown</td>", one.to_html(), re.DOTALL)
            assert "nan" not in one.to_markdown().lower()

    @pytest.mark.parametrize(
        ("path", "key", "value", "message"),
        [
            ((), "tittle", "x", "scan: unknown key 'tittle'; did you mean 'title'"),
            ((), "format", "hf-purify-scan/9", "expected format 'hf-purify-scan/1', got 'hf-purify-scan/9'"),
            ((), "format", None, "expected format"),
            ((), "kind", "single", "scan.kind: expected one of none, single-target"),
            ((), "targets", 5, "scan.targets: expected list"),
            ((), "seed", "0", "scan.seed: expected int"),
            (("signals", 1), "vlaues", [], r"signals\[1\]: unknown key 'vlaues'; did you mean 'values'"),
            (("layers", 0), "size", "16", r"layers\[0\].size: expected int"),
            (("triggers", 0, "asr"), "hits", 98, "expected 0 <= hits <= n"),
            (("triggers", 0), "picture", "no png", r"triggers\[0\].picture: expected a PNG in base64"),
            (("triggers", 0, "samples", 0), "clean", "no png", "clean: expected a PNG in base64"),
            (("suspects",), "order", "0", "suspects.order: expected list"),
            (("signals",), 0, "patch", r"signals\[0\]: expected a mapping"),
        ],
    )
    def test_other_formats_are_refused(self, path: tuple[str | int, ...], key: str | int, value: object, message: str) -> None:
        data = make_diagnosis().to_dict()
        place: Any = data
        for step in path:
            place = place[step]
        place[key] = value
        with pytest.raises(ConfigError, match=message):
            Diagnosis.from_dict(data)

    @pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800"], ids=["empty", "list", "torn", "deep", "surrogate"])
    def test_files_that_hold_no_scan(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "scan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match="scan"):
            read_diagnosis(tmp_path)

    def test_save_and_read(self, tmp_path: Path) -> None:
        found = make_diagnosis(hostile=HOSTILE)
        folder = found.save(tmp_path / "new" / "folder")
        assert sorted(p.name for p in folder.iterdir()) == ["report.html", "scan.json"]
        assert read_diagnosis(folder) == read_diagnosis(folder / "scan.json") == found
        assert not re.search("[\x1b\u202e]", (folder / "scan.json").read_text("utf-8"))

    def test_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="name another folder"):
            make_diagnosis().save(tmp_path / "file" / "folder")


class TestWords:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"kind": "none", "suspicious": False, "score": 0.42, "targets": []}, "No backdoor was found: an estimated 58.0 % of clean"),
            ({}, "Suspicious of a backdoor towards the class 'dog': an estimated 0.4 % of clean models look as odd as this."),
            ({"kind": "multi-target", "targets": [5, 7]}, "towards the classes 'dog' and 'horse': an"),
            ({"kind": "multi-target", "targets": [0, 5, 99]}, "towards the classes 'airplane', 'dog' and '99': an"),
            ({"kind": "multi-target", "targets": list(range(10))}, "'bird', 'cat', 'deer' and 5 more: an"),
            ({"kind": "single-target", "targets": []}, "a backdoor whose target is not clear: an"),
            ({"score": 1.0}, "an estimated under 0.1 % of clean models"),
            ({"score": math.nan}, "Suspicious of a backdoor towards the class 'dog': by a fixed rule, with no score."),
        ],
    )
    def test_verdict(self, changes: dict[str, Any], sentence: str) -> None:
        assert sentence in changed(make_diagnosis(), **changes).verdict

    def test_every_kind_has_its_words(self) -> None:
        assert set(findings.KINDS) == set(KINDS)

    @pytest.mark.parametrize("text", [False, True], ids=["pictures", "texts"])
    def test_markdown_says_what_was_found(self, text: bool) -> None:
        said = make_diagnosis(text=text).to_markdown()
        for part in (
            "24 of 384 neurons (6.2 %) are suspected",
            "AUROC 0.981 [0.960, 0.990]",
            "Signal 'words': not available for vision.",
            "| dog | patch 4.1 (line 2.1) |",
            "| patch | dog | 4.1 | 2.1 | 0.4 % |",
            "95.9 % [89.9, 98.4] (n=97)",
            "| layer3.0.bn1 | 3 of 48 | 6.2 % |",
            "- 5 of the clean samples",
        ):
            assert part in said
        assert ("| cf, tq" in said) == text

    def test_a_clean_model_has_no_tables_of_what_was_not_found(self) -> None:
        said = make_diagnosis("none").to_markdown()
        assert re.findall("### (.*)", said) == ["Signals"]

    def test_classes_above_a_line_are_named_where_there_is_no_target(self) -> None:
        said = changed(make_diagnosis(), targets=[]).to_markdown()
        assert "| Class | Signals above their outlier line |" in said
        assert "| dog | patch 4.1 (line 2.1) |" in said

    @pytest.mark.parametrize("kind", [*KINDS, "unjudged"])
    @pytest.mark.parametrize("text", [False, True])
    def test_a_terminal_of_80_columns_holds_it(self, kind: str, text: bool) -> None:
        found = make_diagnosis(kind, text, hostile="x" * 3000)
        said = terminal(found)
        assert max(map(len, said.splitlines())) <= 80
        assert len(said.splitlines()) < 120
        assert " ".join(said.split()).startswith(" ".join(found.verdict.split()[:8]))
        assert "\u2026" in said or kind == "none"


class TestHostileTexts:
    @pytest.fixture(params=[False, True], ids=["pictures", "texts"])
    def found(self, request: pytest.FixtureRequest) -> Diagnosis:
        found = make_diagnosis("multi-target", request.param, HOSTILE)
        found.signals[0].name = found.signals[0].about = found.signals[3].unavailable = found.ranked_by = found.command = HOSTILE
        found.layers[0].name = found.layers[0].role = found.created = found.task = HOSTILE
        found.checkpoint[HOSTILE] = [HOSTILE, {HOSTILE: HOSTILE}]
        for one in (*found.suspects.top, *found.triggers[0].samples):
            one.label = one.said = one.clean_text = one.triggered_text = HOSTILE
        return found

    def test_page_escapes_them(self, found: Diagnosis) -> None:
        text = found.to_html()
        assert "<script" not in text
        assert text.count("&lt;script&gt;") > 40
        assert not re.search("[\x1b\u202e]", text)
        assert not re.search(r"\son\w+=|javascript:(?!a\))|https?://", text)

    def test_markdown_escapes_them(self, found: Diagnosis) -> None:
        text = found.to_markdown()
        assert "<script" not in text
        assert not re.search("[\x1b\u202e]|\n# h|(?<!\\\\)\\]\\(|(?<!\\\\)@", text)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1

    def test_terminal_shows_them_literally(self, found: Diagnosis) -> None:
        text = terminal(found, 200)
        assert "[red]" in text
        assert not re.search("[\x1b\u202e]", text)

    def test_tokens_are_hidden(self) -> None:
        token = "hf_" + "a1B2" * 8
        found = make_diagnosis(hostile=f" {token}")
        for text in (found.to_html(), found.to_markdown(), found.to_json(), found.to_sarif(), terminal(found, 200)):
            assert token[:12] not in text
            assert "[hidden]" in text or "%5Bhidden%5D" in text


class TestPage:
    def test_says_all_that_was_found(self) -> None:
        text = re.sub("[ \n]+", " ", make_diagnosis().to_html())
        for part in (
            "Suspicious of a backdoor towards the class &#39;dog&#39;",
            "about 5 in 100 clean models are called so, too",
            "<dt>words</dt><dd>not available for vision</dd>",
            "95.9\u00a0% [89.9, 98.4] (n=97)",
            "<dt>layer3.0.bn2 (norm)</dt><dd>1, 3, 43</dd>",
            "<strong>0.981 [0.960, 0.990]</strong>",
            "<strong>Sample 3</strong>, score 0.822",
        ):
            assert part in text, part

    def test_a_trigger_of_words_is_marked_in_its_samples(self) -> None:
        assert "<q>sample 0 says <mark>cf</mark> this</q>" in make_diagnosis(text=True).to_html()

    @pytest.mark.parametrize(
        ("kind", "part"),
        [
            ("none", "No trigger was recovered."),
            ("none", "No backdoor was found"),
            ("unjudged", "not calibrated, so there is no score"),
            ("multi-target", "several classes are targets"),
        ],
    )
    def test_of_every_outcome(self, kind: str, part: str) -> None:
        assert part in make_diagnosis(kind).to_html()

    def test_a_model_that_was_not_judged_is_nowhere_called_suspicious(self) -> None:
        assert "<dd>Suspicious" not in make_diagnosis("unjudged").to_html()

    def test_of_next_to_nothing(self) -> None:
        text = Diagnosis("t", "x", suspicious=False, score=0.5, suspects=Suspects("here"), signals=[Signal("s", "about")]).to_html()
        for part in (
            "No signal has values",
            "no values, and no reason was given",
            "No neurons were ranked",
            "unknown, as the truth is not",
        ):
            assert part in text

    def test_stays_small_whatever_there_is(self) -> None:
        long, rng = "<&'\"" * 20_000, np.random.default_rng(0)
        found = make_diagnosis("multi-target", hostile=long)
        found.labels = [f"{i}{long}" for i in range(1000)]
        for signal in found.signals[:3]:
            signal.values, signal.line = rng.normal(size=1000).tolist(), 2.0
        found.layers = [SuspectLayer(f"layer{i}.{long}", "norm", 4096, list(range(4096)), [0.0] * 7) for i in range(200)]
        samples = [dataclasses.replace(shown(k), clean_text=long, triggered_text=f"cf {long}") for k in range(30)]
        found.triggers = [dataclasses.replace(found.triggers[0], samples=samples)] * 40
        found.suspects = dataclasses.replace(found.suspects, top=samples)
        found.warnings = [long] * 500
        found.checkpoint = {f"{i}{long}": [long] * 500 for i in range(20)}
        deep: dict[str, Any] = {}
        for _ in range(200):
            deep = {long: deep}
        found.config = deep
        assert len(found.to_html().encode()) < 2_000_000
        noise = [rng.integers(0, 255, (300, 300, 3), dtype=np.uint8) for _ in range(60)]
        for i, one in enumerate(samples):
            one.clean, one.triggered, one.clean_text, one.triggered_text = noise[2 * i], noise[2 * i + 1], "", ""
        assert len(found.to_html().encode()) < 2_000_000

    def test_an_empty_count_is_no_success_rate(self) -> None:
        found = make_diagnosis()
        found.triggers[0] = dataclasses.replace(found.triggers[0], asr=Proportion(0, 0), picture=picture(1)[:, :, 0])
        assert "nothing to count (n=0)" in found.to_html()
