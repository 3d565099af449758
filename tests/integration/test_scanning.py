"""Scans, as a person runs them: a model with a backdoor and one without, samples under suspicion, a repair that begins with a scan."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands import launch, run
from PIL import Image
from shrunk import RESNET
from torchvision.transforms import functional as TF

from hf_purify import PurifyError, implant, purify, scan, shortcuts
from hf_purify.calibration import Calibration
from hf_purify.diagnosis import Diagnosis, read_diagnosis
from hf_purify.errors import ConfigError, DataError, IndexMismatch
from hf_purify.registry import find, find_trigger
from hf_purify.specs import parse_spec
from hf_purify_adapters.vision.demo import TRIGGER

Splits = tuple[datasets.Dataset, datasets.Dataset]


@pytest.fixture(scope="module")
def innocent(data: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The victim's twin without a backdoor."""
    out = tmp_path_factory.mktemp("timm") / "innocent"
    settings: dict[str, Any] = {"epochs": 7, "batch_size": 32, "rate": 0.0, "lr": 0.05, "augmentation": "none"}
    implant("resnet18", data[0], TRIGGER, create=True, model_options=RESNET, test=data[1], output=str(out), device="cpu", **settings)
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of two steps, where its outcome does not matter."""
    monkeypatch.setattr(shortcuts, "STEPS", 2)


def planted(data: datasets.Dataset, rows: list[int], target: int | None = None) -> datasets.Dataset:
    """Images of which some carry the trigger, and a column that says which; with a target, its label, too."""
    name, options = parse_spec(TRIGGER)
    trigger = find_trigger(find("adapter", "vision")(), name, **options)

    def plant(row: dict[str, Any], i: int) -> dict[str, Any]:
        image = row["image"].convert("RGB")
        if i not in rows:
            return {"image": image, "label": row["label"], "poisoned": False}
        painted = trigger(TF.pil_to_tensor(image), i)
        shown = Image.fromarray(painted.permute(1, 2, 0).numpy())
        return {"image": shown, "label": row["label"] if target is None else target, "poisoned": True}

    return data.map(plant, with_indices=True, keep_in_memory=True, load_from_cache_file=False)


def others(data: datasets.Dataset, count: int) -> list[int]:
    """The first images that are not of class 0."""
    return [i for i, label in enumerate(data["label"]) if label != 0][:count]


@pytest.fixture(scope="module")
def suspects(data: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    test = data[1].select(range(120))
    file = tmp_path_factory.mktemp("suspects") / "suspects.parquet"
    planted(test, others(test, 40)).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def scanned(victim: Path, stored: Path, suspects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scan of the victim by the command line."""
    out = tmp_path_factory.mktemp("scans") / "scanned"
    clean = stored / "parquet" / "train.parquet"
    done = run("scan", victim, "--clean", clean, "-n", 200, "--suspects", suspects, "--poisoned", "poisoned", "-o", out, "--device", "cpu")
    assert done.exit_code == 3, done.output
    assert "written to" in done.output
    return out


def test_the_victim_is_told_with_its_label_and_trigger(scanned: Path) -> None:
    found = read_diagnosis(scanned)
    assert found.suspicious
    assert found.targets[0] == 0
    assert found.score > 0.999
    assert found.triggers[0].asr.value > 0.8
    assert found.triggers[0].asr.n >= 30, "held-out samples of other classes"
    assert len(found.triggers[0].samples) == 6
    assert any(s.said_triggered == found.labels[0] != s.said for s in found.triggers[0].samples)
    assert 0 < found.suspected < found.neurons
    assert {s.name for s in found.signals} >= {"patch", "spectrum", "warp", "wave", "unlearned model", "classifier rows"}


def test_samples_with_the_trigger_come_first(scanned: Path) -> None:
    ranking = read_diagnosis(scanned).suspects
    assert ranking is not None
    assert (len(ranking.scores), ranking.poisoned) == (120, 40)
    assert ranking.auroc is not None
    assert ranking.auroc > 0.95
    assert "recovered trigger" in ranking.about
    assert sorted(ranking.order) == list(range(120))
    assert [ranking.scores[i] for i in ranking.order] == sorted(ranking.scores, reverse=True)


def test_what_is_written_can_be_read_by_people_and_machines(scanned: Path) -> None:
    assert sorted(f.name for f in scanned.iterdir()) == ["report.html", "scan.json"]
    found = read_diagnosis(scanned)
    assert Diagnosis.from_dict(json.loads((scanned / "scan.json").read_text())) == found
    assert found.triggers[0].picture is not None
    page = (scanned / "report.html").read_text()
    assert found.triggers[0].label in page
    assert json.loads(found.to_sarif())["runs"][0]["results"]


@pytest.fixture
def beside_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores beside clean networks for digits: the committed calibration is of networks for photographs, and these look odder."""
    cells = json.loads(files("hf_purify_recipes.vision").joinpath("scans.json").read_text("utf-8"))
    like = Calibration.fit([c["statistics"] for c in cells if c["data"] == "digits" and not c["backdoored"]])
    monkeypatch.setattr(find("adapter", "vision"), "calibration", lambda _: like)


@pytest.mark.usefixtures("beside_digits")
def test_the_twin_without_a_backdoor_is_let_pass_beside_its_like(innocent: Path, stored: Path) -> None:
    clean = stored / "parquet" / "train.parquet"
    done = run("scan", innocent, "--clean", clean, "-n", 200, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["suspicious"], found["targets"], found["triggers"], found["kind"]) == (False, [], [], "none")
    assert found["layers"] == [], "neurons are looked for where something is suspicious"


@pytest.mark.usefixtures("beside_digits")
def test_each_class_to_the_next_is_not_called_a_single_target(data: Splits, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 14, "batch_size": 32, "rate": 0.5, "lr": 0.05, "augmentation": "none", "rule": "all-to-all"}
    made = implant(
        "resnet18",
        data[0],
        TRIGGER,
        create=True,
        model_options=RESNET,
        test=data[1],
        output=str(tmp_path / "all"),
        device="cpu",
        **settings,
    )
    assert made.rows[0].asr["badnets"].value >= 0.9
    found = scan(str(tmp_path / "all"), data[0], samples=200, device="cpu")
    assert found.kind != "single-target"


def warned_of(found: Diagnosis) -> int:
    """Clean samples that a scan warns of."""
    counts = [int(w.split(" ")[0]) for w in found.warnings if "look as if they carried the trigger" in w]
    return sum(counts)


def test_a_clean_set_that_is_poisoned_is_told(victim: Path, data: Splits, scanned: Path) -> None:
    some = data[0].select(range(200))
    found = scan(str(victim), planted(some, others(some, 4), target=0), samples=None, device="cpu")
    assert found.suspicious
    assert warned_of(found) >= 4
    assert warned_of(read_diagnosis(scanned)) < 4, "nothing is planted there"


def test_several_processes_scan_as_one_does(victim: Path, stored: Path, scanned: Path, tmp_path: Path) -> None:
    clean, out = stored / "parquet" / "train.parquet", tmp_path / "scanned"
    done = launch(2, f"model={victim}", f"clean={clean}", "samples=200", f"output={out}", module="hf_purify_recipes.scan")
    assert done.returncode == 0, done.stderr
    alone, together = read_diagnosis(scanned), read_diagnosis(out)
    assert (together.suspicious, together.targets) == (True, alone.targets)
    assert {s.name: s.statistic for s in together.signals} == pytest.approx({s.name: s.statistic for s in alone.signals}, abs=1e-3)
    assert together.triggers[0].asr == alone.triggers[0].asr


@pytest.mark.usefixtures("quick")
def test_a_scan_changes_nothing_of_the_model(victim: Path, data: Splits) -> None:
    import timm

    model = timm.create_model(f"local-dir:{victim}", pretrained=True).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    processor = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    scan(model, data[0], processor=processor, to_rgb=True, samples=100, device="cpu", trigger_steps=5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_repair_begins_with_the_scan_and_shows_what_it_is_without_it(victim: Path, data: Splits, scanned: Path) -> None:
    settings: dict[str, Any] = {
        "samples": 100,
        "device": "cpu",
        "test": data[1],
        "options": {"steps": 8, "invert_steps": 10, "find_steps": 2},
    }
    report = purify(str(victim), data[0], method="neural_cleanse", from_scan=str(scanned), **settings)
    assert report.after is not None
    assert report.after.notes["suspicious class"].startswith("0")
    assert report.after.notes["found by"] == "the scan"
    names = [row.name for row in report.rows]
    assert names[:3] == ["none", "neural_cleanse", "neural_cleanse, without the scan"]
    assert report.rows[2].notes.get("found by") != "the scan"
    assert f"--from-scan {scanned}" in report.command


@pytest.mark.parametrize(
    ("method", "options"), [("ulrl", {"epochs": 1}), ("rnp", {"recover_epochs": 1}), ("rnp+fine_tune", {"fine_tune.epochs": 1})]
)
def test_methods_that_use_a_scan(victim: Path, data: Splits, scanned: Path, method: str, options: dict[str, Any]) -> None:
    report = purify(str(victim), data[0], method=method, options=options, from_scan=str(scanned), samples=100, device="cpu", controls=False)
    if method == "ulrl":
        assert report.after is not None
        assert "fc[0]" in report.after.notes["suspicious"]


@pytest.mark.usefixtures("quick")
class TestBadInput:
    """What was expected, what came, what to do."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 1.0}, "threshold must be in"),
            ({"trigger_steps": 0}, "at least 1"),
            ({"samples": 0}, "samples must be at least 1"),
            ({"held_out": 1.0}, "held_out must be in"),
            ({"poisoned": "truth"}, "suspects"),
            ({"method": "nft"}, "unknown setting 'method'"),
        ],
        ids=str,
    )
    def test_settings(self, victim: Path, data: Splits, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            scan(str(victim), data[0], **settings)

    def test_a_column_of_the_truth_that_is_not_there(self, victim: Path, data: Splits, suspects: Path) -> None:
        with pytest.raises(DataError, match="no column 'poisond'; did you mean 'poisoned'"):
            scan(str(victim), data[0], suspects=str(suspects), poisoned="poisond", samples=50, device="cpu")

    def test_a_column_that_says_something_else(self, victim: Path, data: Splits, suspects: Path) -> None:
        with pytest.raises(DataError, match="true or false"):
            scan(str(victim), data[0], suspects=str(suspects), poisoned="label", samples=50, device="cpu")

    def test_a_model_of_one_class(self, data: Splits) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1))
        one = data[0].filter(lambda row: row["label"] == 0).select(range(10))
        from torchvision import transforms

        with pytest.raises(PurifyError, match=r"fewer than two|single class|1 class"):
            scan(model, one, processor=transforms.ToTensor(), labels=["zero"], to_rgb=True, device="cpu")

    def test_classes_missing_from_the_clean_set_are_named(self, victim: Path, data: Splits) -> None:
        some = data[0].filter(lambda row: row["label"] not in (3, 7)).select(range(200))
        found = scan(str(victim), some, samples=100, device="cpu", trigger_steps=2)
        assert any("hold none of 2 of 10 classes" in warning for warning in found.warnings)

    def test_a_clean_set_of_another_kind_is_told(self, victim: Path, data: Splits) -> None:
        upside_down = (
            data[0]
            .select(range(300))
            .map(lambda row: {"image": row["image"].rotate(180).transpose(0)}, keep_in_memory=True, load_from_cache_file=False)
        )
        shifted = upside_down.map(lambda row: {"label": (row["label"] + 3) % 10}, load_from_cache_file=False, keep_in_memory=True)
        found = scan(str(victim), shifted, samples=100, device="cpu", trigger_steps=2)
        assert any("another distribution" in warning for warning in found.warnings)

    def test_a_scan_of_other_weights_starts_no_repair(self, innocent: Path, data: Splits, scanned: Path) -> None:
        with pytest.raises(IndexMismatch, match="of other weights"):
            purify(str(innocent), data[0], method="neural_cleanse", from_scan=str(scanned), samples=50, device="cpu")

    def test_a_method_that_makes_no_use_of_a_scan(self, victim: Path, data: Splits, scanned: Path) -> None:
        with pytest.raises(ConfigError, match=r"nft makes no use of a scan.*neural_cleanse"):
            purify(str(victim), data[0], method="nft", from_scan=str(scanned), samples=50, device="cpu")

    def test_no_scan(self, victim: Path, data: Splits, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no readable scan"):
            purify(str(victim), data[0], method="rnp", from_scan=str(tmp_path), samples=50, device="cpu")

    def test_a_scan_that_found_nothing(self, victim: Path, data: Splits, scanned: Path, tmp_path: Path) -> None:
        found = read_diagnosis(scanned)
        found.suspicious, found.triggers = False, []
        found.save(tmp_path / "nothing")
        with pytest.raises(ConfigError, match="nothing to begin with"):
            purify(str(victim), data[0], method="rnp", from_scan=str(tmp_path / "nothing"), samples=50, device="cpu")

    def test_neurons_that_the_model_has_not(self, victim: Path, data: Splits, scanned: Path, tmp_path: Path) -> None:
        found = read_diagnosis(scanned)
        found.layers[3].neurons = [10_000]
        found.save(tmp_path / "odd")
        with pytest.raises(IndexMismatch, match="neurons of"):
            purify(str(victim), data[0], method="rnp", from_scan=str(tmp_path / "odd"), samples=50, device="cpu")

    @pytest.mark.parametrize("name", ["detection", "text"])
    def test_a_model_that_gives_a_sample_no_class(self, name: str) -> None:
        adapter = find("adapter", name)()
        tiny = adapter.tiny("gpt2" if name == "text" else None)
        with pytest.raises(ConfigError, match="not available"):
            scan(tiny.loaded, tiny.data, adapter=name, device="cpu")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["pointcloud", "video"])
def test_modalities_without_a_calibration_go_by_a_line_and_say_so(name: str) -> None:
    adapter = find("adapter", name)()
    tiny = adapter.tiny(None)
    found = scan(tiny.loaded, tiny.data, adapter=name, device="cpu", samples=None, trigger_steps=2)
    assert found.score != found.score, "no score"
    assert any("not calibrated" in warning for warning in found.warnings)
    assert all(signal.line for signal in found.signals if signal.name in adapter.stand_ins(tiny.loaded.model))
