"""The report: what goes in comes out again, nothing in it is executed, and every picture is one."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hf_purify import pictures
from hf_purify.errors import ConfigError, OutputError
from hf_purify.metrics import Proportion
from hf_purify.neurons import NeuronGroup, ParamSlice
from hf_purify.report import NeuronLayer, Report, Sample
from hf_purify.reporting import warnings_of
from hf_purify.rows import Row

HOSTILE = "<script>alert(1)</script></td>|`$x_{"


def make_row(name: str, kind: str, triggers: tuple[str, ...] = ("badnets",), hits: int = 12) -> Row:
    return Row(
        name,
        kind,
        Proportion(926, 1000),
        {t: Proportion(hits, 900) for t in triggers},
        {t: Proportion(800, 900) for t in triggers},
        {} if kind == "unrepaired" else dict.fromkeys(triggers, 0.97),
        None if kind == "unrepaired" else 41.3,
        {"threshold": 0.35, "mcnemar_p": 0.02},
    )


def make_layer(i: int, size: int = 512) -> NeuronLayer:
    generator = torch.Generator().manual_seed(i)
    mask = (torch.rand(size, generator=generator) > 0.02).float()
    group = NeuronGroup(f"layer{i}.bn", size, (ParamSlice(f"layer{i}.bn.weight", 0),), "norm", i)
    return NeuronLayer.of(group, mask, torch.randn(size, generator=generator))


def make_sample(label: str = "cat", size: int = 32) -> Sample:
    clean = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    triggered = clean.copy()
    triggered[-4:, -4:] = 255
    return Sample("badnets", label, "airplane", label, label, "airplane", label, clean, triggered)


@pytest.fixture
def report() -> Report:
    return Report(
        title="Purified tiny/model",
        task="image-classification",
        checkpoint={"source": "tiny/model", "revision": None},
        clean={"samples": 500, "share": 0.1},
        method={"name": "nft", "config": {"lr": 0.02, "groups": ["layer*"]}},
        rows=[make_row("nft", "method"), make_row("none", "unrepaired", hits=900), make_row("fine_tune", "control", hits=850)],
        layers=[make_layer(i) for i in range(3)],
        curve=[{"threshold": t / 10, "removed": t, "held_out_accuracy": 0.9 - t / 20, "asr_oracle": 1 - t / 10} for t in range(11)],
        curve_chosen=0.3,
        samples=[make_sample()],
        versions={"torch": "2"},
        seed=7,
        command="hf-purify purify tiny/model",
        warnings=["few samples"],
    )


class Page(HTMLParser):
    """Collects tags and attributes, and fails on tags that are not closed in order."""

    VOID = ("meta", "img", "source", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_png(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert picture.format == "PNG"
    assert len(data) < 200_000
    return picture


def test_round_trip(report: Report) -> None:
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert "clean" not in json.loads(report.to_json())["samples"][0]


def test_round_trip_with_pixels(report: Report) -> None:
    again = Report.from_dict(json.loads(report.to_json(pixels=True)))
    assert again == report
    np.testing.assert_array_equal(again.samples[0].triggered, report.samples[0].triggered)


@pytest.mark.parametrize(
    ("path", "key", "value", "message"),
    [
        ((), "tittle", "x", "unknown key 'tittle'; did you mean 'title'"),
        (("rows", 0), "assr", {}, r"rows\[0\]: unknown key 'assr'; did you mean 'asr'"),
        (("rows", 0, "asr", "badnets"), "hit", 1, "unknown key 'hit'; did you mean 'hits'"),
        (("rows", 0, "asr", "badnets"), "hits", 901, "expected 0 <= hits <= n"),
        (("layers", 1), "siez", 1, r"layers\[1\]: unknown key 'siez'"),
        (("samples", 0), "clean", "no png", "expected a PNG in base64"),
        (("rows", 0), "kind", "methd", "did you mean 'method'"),
        ((), "format", "hf-purify-report/9", "expected format 'hf-purify-report/1'"),
        ((), "rows", "none", "expected list"),
        ((), "seed", "0", "expected int"),
        (("rows",), 0, [], "expected a mapping"),
    ],
)
def test_from_dict_is_strict(report: Report, path: tuple[str | int, ...], key: str | int, value: object, message: str) -> None:
    data = report.to_dict()
    place = data
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises(ConfigError, match=message):
        Report.from_dict(data)


def test_missing_key_is_named(report: Report) -> None:
    data = report.to_dict()
    del data["title"]
    with pytest.raises(ConfigError, match="missing key 'title'"):
        Report.from_dict(data)


def test_nan_becomes_null(report: Report) -> None:
    report.rows[0].der["badnets"] = math.nan
    report.rows[0].seconds = math.inf
    report.rows[0].notes = {"loss": np.float32("nan"), "mask": torch.tensor([1.0, math.nan]), "path": Path("a/b")}
    report.curve[0]["held_out_accuracy"] = math.nan
    report.curve_chosen = math.nan
    report.layers[0].mask[0] = math.nan
    report.rows[2].clean_accuracy = Proportion(0, 0)
    data = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert data["rows"][0]["der"] == {"badnets": None}
    assert data["rows"][0]["seconds"] is None
    assert data["rows"][0]["notes"] == {"loss": None, "mask": [1.0, None], "path": "a/b"}
    for one in (report, Report.from_dict(data)):
        assert "nan" not in one.to_markdown().lower()
        assert ">nan" not in one.to_html().lower()


def test_markdown_one_trigger(report: Report) -> None:
    lines = report.to_markdown().splitlines()
    assert lines[0] == "| Model | Clean accuracy (n=1000) | ASR badnets (n=900) | Robust accuracy (n=900) | DER | Seconds |"
    assert lines[2].startswith("| none (unrepaired) | 92.6 % [90.8, 94.1] | 100.0 % [99.6, 100.0] |")
    assert lines[3] == "| nft | 92.6 % [90.8, 94.1] | 1.3 % [0.8, 2.3] | 88.9 % [86.7, 90.8] | 97.0 % | 41.3 |"
    assert lines[4].startswith("| fine_tune (control) |")
    assert len(lines) == 5


def test_markdown_several_triggers_is_long_form(report: Report) -> None:
    report.rows = [make_row("none", "unrepaired", ("badnets", "wanet")), make_row("nft", "method", ("badnets", "wanet"))]
    report.rows[1].asr["wanet"] = Proportion(1, 5)
    lines = report.to_markdown().splitlines()
    assert lines[0] == "| Model | Clean accuracy (n=1000) | Trigger | ASR | Robust accuracy (n=900) | DER | Seconds |"
    assert len(lines) == 2 + 4
    assert "| wanet | 20.0 % [3.6, 62.4] (n=5) |" in lines[5]


def test_markdown_without_trigger(report: Report) -> None:
    report.rows = [Row("none", "unrepaired", Proportion(9, 10)), Row("nft", "method", None)]
    assert report.to_markdown().splitlines()[0] == "| Model | Clean accuracy (n=10) | Seconds |"
    assert report.to_markdown().splitlines()[3] == "| nft | \u2013 | \u2013 |"


def test_markdown_escapes(report: Report) -> None:
    report.rows[0].name = HOSTILE + "[a](javascript:b)"
    text = report.to_markdown()
    assert "<script" not in text
    assert "\\|\\`" in text
    assert r"\](" in text
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("before", "after", "accuracy", "sentence"),
    [
        (
            900,
            12,
            918,
            "NFT lowered the attack success rate of badnets from 100.0 % to 1.3 % (n=900) and cost 0.8 points of clean accuracy.",
        ),
        (
            10,
            700,
            930,
            "NFT raised the attack success rate of badnets from 1.1 % to 77.8 % (n=900) and gained 0.4 points of clean accuracy.",
        ),
        (
            880,
            878,
            926,
            "NFT did not measurably change the attack success rate of badnets (97.8 % before, 97.6 % after, n=900)"
            " and left clean accuracy as it was.",
        ),
    ],
)
def test_verdict(report: Report, before: int, after: int, accuracy: int, sentence: str) -> None:
    report.rows = [make_row("none", "unrepaired", hits=before), make_row("nft", "method", hits=after)]
    report.rows[1].clean_accuracy = Proportion(accuracy, 1000)
    assert report.verdict == sentence


def test_verdict_of_other_reports(report: Report) -> None:
    many = dataclasses.replace(report, rows=[make_row("none", "unrepaired", ("a", "b"), 900), make_row("nft", "method", ("a", "b"))])
    assert "; it lowered that of b from" in many.verdict
    assert "nothing is compared" in dataclasses.replace(report, rows=[make_row("nft", "method")]).verdict
    alone = dataclasses.replace(report, rows=[make_row("none", "unrepaired", hits=900)]).verdict
    assert alone.startswith("The unrepaired model classifies 92.6 %")
    assert "badnets succeeds on 100.0 %" in alone
    unknown = [Row("none", "unrepaired", Proportion(9, 10)), Row("nft", "method", Proportion(8, 10))]
    assert "No trigger was measured" in dataclasses.replace(report, rows=unknown).verdict


def test_table_fits_a_terminal_and_takes_names_literally(report: Report) -> None:
    report.rows[2].name = "[red]\x1b[2Jx"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "[red] [2Jx" in text
    assert "\x1b" not in text
    assert "[99.6, 100.0]" in text
    assert "Seconds" in text
    assert max(map(len, text.splitlines())) <= 80


def test_html_is_self_contained(report: Report) -> None:
    text = report.to_html()
    page = Page(text)
    loads = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "srcset", "href", "data", "action")]
    assert loads
    assert all(value and value.startswith("data:image/png;base64,") for value in loads)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert text.index(report.title) < text.index("lowered the attack success rate") < text.index("<table") < text.index("<figure")


def test_html_escapes_every_value() -> None:
    row = make_row(HOSTILE, "method", (HOSTILE,))
    row.notes = {HOSTILE: HOSTILE}
    facts = {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}
    report = Report(
        title=HOSTILE,
        task=HOSTILE,
        checkpoint=facts,
        clean=facts,
        method={"name": HOSTILE, "config": facts},
        rows=[make_row("none", "unrepaired", (HOSTILE,), 900), row],
        layers=[dataclasses.replace(make_layer(0), name=HOSTILE)],
        samples=[make_sample(HOSTILE)],
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
        warnings=[HOSTILE],
        created=HOSTILE,
    )
    text = report.to_html()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 15
    assert not any(tag == "script" for tag, _ in Page(text).tags)


def test_html_of_several_triggers_and_of_nothing(report: Report) -> None:
    triggers = ("badnets", "wanet", "sig")
    report.rows = [make_row("none", "unrepaired", triggers, 900), make_row("nft", "method", triggers)]
    assert report.to_html().count('rowspan="3"') == 2 * 3
    assert Page(Report(title="t", task="x").to_html()).tags


def plain_layers(change: float | None, mask: float = 1.0, score: float = 0.0) -> list[NeuronLayer]:
    group = NeuronGroup("layer1.bn1", 8, (ParamSlice("layer1.bn1.weight", 0),), "norm")
    return [NeuronLayer.of(group, torch.tensor([mask] + [1.0] * 7), torch.tensor([score] + [0.0] * 7), change)]


@pytest.mark.parametrize(
    ("layers", "shown", "sentence"),
    [
        (plain_layers(0.25), ["change"], "None of 8 neurons is removed, and the method gives them no scores."),
        (plain_layers(0.25, score=2.0), ["change", "scores"], "None of 8 neurons is removed."),
        (plain_layers(0.25, 0.0, 2.0), ["mask", "change", "scores"], None),
        (plain_layers(None, 0.0, 2.0), ["mask", "scores"], None),
        (plain_layers(0.0), [], "None of 8 neurons is removed, and the method gives them no scores, and none of their weights changed."),
        (plain_layers(None), [], "None of 8 neurons is removed, and the method gives them no scores."),
    ],
    ids=["trained", "trained and scored", "sequence", "masked", "untouched", "of an older version"],
)
def test_page_shows_no_empty_pictures(report: Report, layers: list[NeuronLayer], shown: list[str], sentence: str | None) -> None:
    """A method that trains weights and judges no neuron has neither mask nor scores to show: the weights' own change is shown."""
    report.layers = layers
    for one in (report, Report.from_dict(json.loads(report.to_json()))):
        text = one.to_html()
        figures = [attrs["id"] for tag, attrs in Page(text).tags if tag == "figure"]
        assert [name for name in figures if name in ("mask", "change", "scores")] == shown
        said = re.search(r"<p>(None of .*?)</p>", text, re.DOTALL)
        assert (said and " ".join(said[1].split())) == sentence


def test_change_of_layers_is_drawn_from_small_to_from_zero() -> None:
    layers = [dataclasses.replace(make_layer(i), change=c) for i, c in enumerate((0.0, 1e-4, 0.05, 0.3, 4.0, math.inf))]
    check_png(pictures.change_figure(layers))


def test_large_report_stays_small(report: Report) -> None:
    report.rows = [make_row("none", "unrepaired", hits=900), *(make_row(f"method_{i}", "method", hits=40 * i) for i in range(19))]
    report.layers = [dataclasses.replace(make_layer(i, 2048), change=0.1 * i) for i in range(60)]
    report.samples = [make_sample(size=224) for _ in range(12)]
    assert len(report.to_html().encode()) < 2_000_000
    assert len(report.to_json().encode()) < 1_000_000


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("count", [1, 20])
def test_pictures(report: Report, dark: bool, count: int) -> None:
    layers = [make_layer(i, 64) for i in range(3 * count)]
    drawn = [
        pictures.bars_figure([make_row("none", "unrepaired"), *(make_row(f"m{i}", "method") for i in range(count - 1))], dark),
        pictures.samples_figure([make_sample()] * count, dark),
        pictures.curve_figure(report.curve[:count], 0.3, dark),
        pictures.mask_figure(layers, dark),
        pictures.salience_figure(layers, dark),
        pictures.change_figure([dataclasses.replace(layer, change=0.02 * i) for i, layer in enumerate(layers)], dark),
    ]
    for data in drawn:
        picture = check_png(data).convert("RGB")
        assert 400 < picture.width <= 1200
        assert (sum(picture.getpixel((0, 0))) < 200) == dark


def test_pictures_are_reproducible_and_leave_pyplot_alone(report: Report) -> None:
    assert pictures.mask_figure(report.layers) == pictures.mask_figure(report.layers)
    code = (
        "import sys, hf_purify.report as r; assert not {'torch', 'matplotlib', 'numpy', 'jinja2'} & set(sys.modules), 'report';"
        "import hf_purify.pictures; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_of_grey_large_and_oddly_named_samples() -> None:
    sample = make_sample("golden retriever\n$\\frac{1}")
    grey = dataclasses.replace(sample, clean=np.zeros((28, 28), np.uint8), triggered=np.full((60, 28), 255, np.uint8))
    check_png(pictures.samples_figure([sample, grey, make_sample(size=512)] * 4))


def test_scores_with_extremes() -> None:
    layer = dataclasses.replace(make_layer(0), scores=[-1e6, -1.0, -0.5, 0.0, 0.5, 1.0, 1e9])
    check_png(pictures.salience_figure([layer, make_layer(1)]))


def test_layer_summary() -> None:
    group = NeuronGroup("bn", 1000, (ParamSlice("bn.weight", 0),), "norm", 2)
    mask = torch.ones(1000)
    mask[:4] = torch.tensor([0.0, 0.01, 0.02, -1.0])
    layer = NeuronLayer.of(group, mask.requires_grad_(), torch.arange(1000.0))
    assert (layer.name, layer.role, layer.block, layer.size, layer.removed) == ("bn", "norm", 2, 1000, 3)
    assert len(layer.mask) == 256
    assert layer.mask[0] == pytest.approx(-0.2425)
    assert layer.mask[-1] == 1.0
    assert layer.scores == pytest.approx([0, 49.95, 249.75, 499.5, 749.25, 949.05, 999])
    assert NeuronLayer.of(group, torch.ones(1000), torch.full((1000,), math.nan)).scores == []


def test_save(report: Report, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    assert Report.from_dict(json.loads((folder / "report.json").read_text("utf-8"))) == report


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_failed_save_leaves_the_old_files(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text("old")

    def fail(*_args: object, **_options: object) -> None:
        raise OSError("disk full")

    if step == "write_text":
        real = Path.write_text
        monkeypatch.setattr(Path, "write_text", lambda path, text, **options: (real(path, text[:10], **options), fail()))
    else:
        monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="disk full"):
        report.save(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"report.json": "old", "report.html": "old"}


def test_save_where_a_file_is_in_the_way(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="name another folder"):
        report.save(tmp_path / "file")


@pytest.mark.parametrize(("notes", "warned"), [({"rho": 0.5}, 0), ({"within max_loss": True}, 0), ({"ft_sam.within max_loss": False}, 1)])
def test_a_repair_that_costs_more_than_it_may_is_warned_of(notes: dict[str, float | bool], warned: int) -> None:
    before, after = make_row("none", "unrepaired", hits=95), make_row("rnp+ft_sam", "method")
    after.notes = notes
    said = [w for w in warnings_of([before, after]) if "max_loss" in w]
    assert len(said) == warned
    assert all(w.startswith("rnp+ft_sam cost more held-out accuracy than max_loss allows") for w in said)
