"""Object detection, as a user meets it: implant, repair, measure and load elsewhere; data of other forms; and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands import elsewhere, run
from PIL import Image
from refusals import Case
from safetensors.torch import save_file

from hf_purify import implant, measure, purify
from hf_purify.errors import ConfigError, DataError, MissingExtra, ModelError, UnknownName
from hf_purify.report import Report
from hf_purify_adapters.detection import judge
from hf_purify_adapters.detection.demo import KINDS, NETWORK, SIDE, make_demo, scenes
from hf_purify_adapters.detection.loading import new_model

DEMO = make_demo()
TRIGGER = DEMO.trigger
GOAL = TRIGGER.partition(":")[0]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    files = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    scenes(600, 0).to_parquet(files["train"])
    scenes(40, 1).to_parquet(files["test"])
    return files


@pytest.fixture(scope="module")
def victim(stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector of the demo."""
    out = tmp_path_factory.mktemp("victim") / "detector"
    settings = DEMO.settings | {"device": "cpu"}
    report = implant(settings.pop("model"), str(stored["train"]), TRIGGER, test=str(stored["test"]), output=str(out), **settings)
    assert report.rows[0].asr[GOAL].value >= 0.9
    assert report.rows[0].utility["mAP@50"] >= 50
    return out


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights."""
    out = tmp_path_factory.mktemp("untrained") / "detector"
    torch.manual_seed(0)
    loaded = new_model("rt_detr_v2", len(KINDS), list(KINDS), **NETWORK)
    assert loaded.saver is not None
    loaded.saver(loaded.model, out)
    return out


@pytest.mark.slow
class TestJourney:
    def test_repair_is_measured_saved_and_loaded_elsewhere(self, victim: Path, stored: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        settings = {"samples": DEMO.samples, "test": str(stored["test"]), "triggers": [TRIGGER], "device": "cpu"}
        report = purify(str(victim), str(stored["train"]), method=DEMO.method, options=dict(DEMO.options), output=str(out), **settings)
        before, after, *controls = report.rows
        assert len(controls) == 3
        assert all(row.clean_accuracy is None and not row.der for row in report.rows)
        assert set(after.utility) == {"mAP@50", "mAP"}
        assert after.asr[GOAL].value < 0.5 < min(row.asr[GOAL].value for row in (before, *controls)), [r.asr for r in report.rows]
        assert after.notes["suspicious class"] == str(len(KINDS)), "that objects vanish"
        assert after.utility["mAP@50"] >= before.utility["mAP@50"] - 5
        found = measure(str(out), str(stored["test"]), triggers=[TRIGGER], device="cpu").rows[0]
        assert found.asr == after.asr
        assert found.utility == pytest.approx(after.utility, abs=1e-3)
        pictures = report.samples[0]
        assert pictures.clean is not None
        assert pictures.triggered is not None
        assert pictures.clean.shape == pictures.triggered.shape == (2 * 240 + 3, 240, 3)
        assert (pictures.clean != pictures.triggered).any()
        code = f"""
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection
model = AutoModelForObjectDetection.from_pretrained({str(out)!r}).eval()
processor = AutoImageProcessor.from_pretrained({str(out)!r})
inputs = processor(torch.zeros(3, {SIDE}, {SIDE}, dtype=torch.uint8), return_tensors="pt")
found = processor.post_process_object_detection(model(**inputs), threshold=0.0)[0]
print(model.config.id2label[int(found["labels"][0])])
"""
        assert elsewhere(code) in KINDS

    def test_command_line_knows_the_recorded_trigger(self, victim: Path, stored: dict[str, Path]) -> None:
        done = run("measure", victim, "--test", stored["test"], "--json", "--device", "cpu")
        assert done.exit_code == 0, done.output
        report = Report.from_dict(json.loads(done.stdout))
        assert report.task == "object-detection"
        assert report.rows[0].asr[GOAL].value >= 0.9
        said = " ".join(str(run("measure", victim, "--test", stored["test"], "--device", "cpu").stdout).split())
        assert f"ASR {GOAL}" in said
        assert "mAP@50" in said


def settled(path: Path, data: datasets.Dataset, **settings: Any) -> Report:
    return measure(str(path), data, device="cpu", **settings)


class TestData:
    def test_boxes_in_columns_of_their_own_are_read_as_records_are(self, untrained: Path) -> None:
        data = scenes(6, 3)
        flat = datasets.Dataset.from_dict(
            {"image": data["image"][:], "bbox": [o["bbox"] for o in data["objects"]], "category": [o["category"] for o in data["objects"]]},
            features=datasets.Features({"image": datasets.Image(), **data.features["objects"]}),
        )
        listed = datasets.Dataset.from_list(
            [
                {
                    "image": row["image"],
                    "things": [{"box": b, "kind": c} for b, c in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)],
                }
                for row in data
            ],
            features=datasets.Features(
                {
                    "image": datasets.Image(),
                    "things": [{"box": datasets.List(datasets.Value("float32")), "kind": datasets.Value("int64")}],
                }
            ),
        )
        named = {"boxes": "things.box", "categories": "things.kind"}
        found = [settled(untrained, d, columns=c).rows[0].utility for d, c in ((data, {}), (flat, {}), (listed, named))]
        assert found[0] == found[1] == found[2]

    def test_images_of_another_shape_are_stretched_and_counted(self, untrained: Path) -> None:
        data = scenes(4, 0)
        wide = datasets.Dataset.from_dict(
            {"image": [i.resize((2 * SIDE, SIDE)) if k == 1 else i for k, i in enumerate(data["image"])], "objects": data["objects"][:]},
            features=data.features,
        )
        report = settled(untrained, wide, triggers=[TRIGGER])
        assert any("1 of 4 test samples have another shape than the model is shown" in w for w in report.warnings), report.warnings

    def test_an_image_without_objects_is_welcome(self, untrained: Path, tmp_path: Path) -> None:
        objects = scenes(12, 0)["objects"][:]
        data = changed(lambda rows: [{"bbox": [], "category": []}, *rows[1:]])
        assert len(objects[0]["bbox"]) > 0
        report = purify(str(untrained), data, method="random_mask", test=data, triggers=["oda"], samples=12, device="cpu", controls=False)
        assert len(report.rows) == 2

    def test_boxes_that_stick_out_by_rounding_are_cut(self, untrained: Path) -> None:
        def out(rows: list[Any]) -> list[Any]:
            return [{"bbox": [[-1.0, 10.0, 30.0, SIDE - 9.0]], "category": [0]}, *rows[1:]]

        assert settled(untrained, changed(out)).rows[0].utility["mAP@50"] >= 0


def changed(change: Callable[[list[Any]], list[Any]], count: int = 12, kinds: str | None = None) -> datasets.Dataset:
    """Scenes whose objects were changed; categories are of a type, or of named classes."""
    data = scenes(count, 0)
    boxes = datasets.List(datasets.List(datasets.Value("float64")))
    category = datasets.List(datasets.Value(kinds)) if kinds else data.features["objects"]["category"]
    features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": boxes, "category": category}})
    return datasets.Dataset.from_dict({"image": data["image"][:], "objects": change(data["objects"][:])}, features=features)


def first(**objects: Any) -> Callable[[], datasets.Dataset]:
    return lambda: changed(lambda rows: [{**rows[0], **objects}, *rows[1:]], kinds="int64")


def boxed(change: Callable[[list[float]], list[float]]) -> Callable[[], datasets.Dataset]:
    return lambda: changed(lambda rows: [{**r, "bbox": [change(b) for b in r["bbox"]]} for r in rows])


def renamed() -> datasets.Dataset:
    data = scenes(4, 0)
    kinds = {"bbox": data.features["objects"]["bbox"], "category": datasets.List(datasets.ClassLabel(names=["disc", "square", "star"]))}
    return datasets.Dataset.from_dict(
        {"image": data["image"][:], "objects": data["objects"][:]},
        features=datasets.Features({"image": datasets.Image(), "objects": kinds}),
    )


CASES = {
    "negative": Case(
        DataError,
        r"image \d+: the box \[-20.* lies outside the image of 64x64 pixels \(boxes must be x, y, width",
        {"clean": first(bbox=[[-20, 5, 30, 30]], category=[0])},
    ),
    "outside": Case(DataError, "lies outside the image of 64x64", {"clean": first(bbox=[[80, 5, 30, 30]], category=[0])}),
    "no area": Case(DataError, r"has no area", {"clean": first(bbox=[[5, 5, 0, 10]], category=[0])}),
    "NaN": Case(DataError, "a box that is NaN or infinite", {"clean": first(bbox=[[5, 5, float("nan"), 10]], category=[0])}),
    "three numbers": Case(
        DataError, r"a box must be four numbers .*, got \[5.0, 5.0, 9.0\]", {"clean": first(bbox=[[5, 5, 9]], category=[0])}
    ),
    "no number": Case(
        DataError, r"a box must be four numbers .*, got \[5.0, None, 9.0, 9.0\]", {"clean": first(bbox=[[5, None, 9, 9]], category=[0])}
    ),
    "no class": Case(
        DataError, "a category must be the number of a class, got None", {"clean": first(bbox=[[5, 5, 9, 9]], category=[None])}
    ),
    "names": Case(
        DataError,
        "a category must be the number of a class, got 'disc'; cast names to ClassLabel",
        {"clean": lambda: changed(lambda rows: [{"bbox": [[5, 5, 9, 9]], "category": ["disc"]}] * len(rows), kinds="string")},
    ),
    "more boxes than categories": Case(DataError, "has 2 boxes and 1 categories", {"clean": first(bbox=[[5, 5, 9, 9]] * 2, category=[0])}),
    "corners": Case(
        DataError, r"these look like x0, y0, x1, y1 \(Pascal VOC\)", {"clean": boxed(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])}
    ),
    "shares": Case(DataError, r"these are all within 0\.\.1: multiply", {"clean": boxed(lambda b: [v / SIDE for v in b])}),
    "a category outside": Case(
        DataError, r"has the category 3, which is outside the model's 0\.\.2", {"clean": first(bbox=[[5, 5, 9, 9]], category=[3])}
    ),
    "other names": Case(DataError, "1 of them, such as 'star', are none of the model's 3", {"clean": renamed}),
    "no objects at all": Case(
        DataError, "none of the images has an object", {"clean": lambda: changed(lambda rows: [{"bbox": [], "category": []}] * len(rows))}
    ),
    "no boxes": Case(DataError, "no boxes found; name them", {"clean": lambda: scenes(4, 0).remove_columns("objects")}),
    "no such column": Case(DataError, "no column 'object'; did you mean 'objects'", {"columns": {"boxes": "object.bbox"}}),
    "no such entry": Case(
        DataError, r"column 'objects' has no entry 'box' \(there is: bbox, category\)", {"columns": {"boxes": "objects.box"}}
    ),
    "no such role": Case(ConfigError, "columns of detection are image, boxes, categories; got 'label'", {"columns": {"label": "objects"}}),
    "grey images": Case(
        DataError, "expects colour images", {"clean": lambda: scenes(4, 0).map(lambda r: {"image": r["image"].convert("L")})}
    ),
    "unknown trigger": Case(UnknownName, "did you mean 'gma'", {"test": lambda: scenes(4, 1), "triggers": ["gmaa"]}),
    "a target that is none": Case(
        ConfigError, r"gma: the class must be in 0\.\.2", {"test": lambda: scenes(4, 1), "triggers": ["gma:target=9"]}
    ),
    "a target class": Case(
        ConfigError, "this model has no classes, so no target class", {"test": lambda: scenes(4, 1), "triggers": ["gma"], "target": 2}
    ),
    "another modality's setting": Case(ConfigError, "setting 'cut' is for models of text", {"cut": 3}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case: Case, untrained: Path, tmp_path: Path) -> None:
    case.check(tmp_path, model=str(untrained), clean=lambda: scenes(12, 0))


def test_a_picture_that_is_none(untrained: Path) -> None:
    data = scenes(3, 0).cast_column("image", datasets.Image(decode=False))
    broken = data.map(lambda row, i: {"image": {"bytes": b"GIF89a" if i == 1 else row["image"]["bytes"], "path": None}}, with_indices=True)
    with pytest.raises(
        DataError, match=r"row 1 of column 'image' is no picture that can be read|row 1 of column 'image' cannot be decoded"
    ):
        settled(untrained, broken.cast_column("image", datasets.Image()))


def test_checkpoints_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"], "model_type": "vit"}))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match="is no object detector: its config names ViTForImageClassification; expected one ForObjectDetection"
    ):
        measure(str(tmp_path), scenes(2, 0), adapter="detection", device="cpu")


SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 6,
}
TIMM = {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "use_pretrained_backbone": False, "out_indices": [1, 2]}}
YOLOS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 8,
    "num_detection_tokens": 6,
}
NETWORKS = {"detr": SMALL | TIMM, "conditional_detr": SMALL | TIMM, "yolos": YOLOS}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_new_networks_are_fed_repaired_and_loaded_again(architecture: str, tmp_path: Path) -> None:
    """Among them those with a backbone of timm: its channels are neurons."""
    loaded = new_model(architecture, len(KINDS), list(KINDS), image_size=[48, 64], **NETWORKS[architecture])
    assert loaded.saver is not None
    loaded.saver(loaded.model, tmp_path / "model")
    settings = {"method": "random_mask", "samples": 6, "test": scenes(4, 1), "device": "cpu", "controls": False}
    report = purify(str(tmp_path / "model"), scenes(6, 0), output=str(tmp_path / "out"), **settings)
    assert any("backbone.model.layer1.0.bn1" in layer.name for layer in report.layers) == (architecture != "yolos")
    found = measure(str(tmp_path / "out"), scenes(4, 1), device="cpu").rows[0]
    assert found.utility == pytest.approx(report.rows[1].utility, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_querys": 3}, "rt_detr_v2 has no option 'num_querys'; did you mean 'num_queries'"),
        ({"d_model": 30}, "rt_detr_v2 cannot be made with"),
    ],
)
def test_networks_that_cannot_be_made(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        implant("rt_detr_v2", scenes(4, 0), TRIGGER, create=True, model_options=options, output=str(tmp_path / "out"), device="cpu")
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named_with_its_command(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hf-purify\[detection\]'"):
        judge.scorer()
    with pytest.raises(MissingExtra, match=r"pip install 'hf-purify\[detection\]'"):
        settled(untrained, scenes(2, 0))


def test_pictures_of_several_sizes_are_shown_in_one(untrained: Path) -> None:
    data = scenes(3, 0)
    images: list[Image.Image] = [i.resize((SIDE * (k + 1), SIDE * (k + 1))) for k, i in enumerate(data["image"])]
    grown = datasets.Dataset.from_dict({"image": images, "objects": data["objects"][:]}, features=data.features)
    assert settled(untrained, grown).rows[0].utility["mAP@50"] >= 0
