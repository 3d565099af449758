"""Video, as a user meets it: implant, repair, measure and load elsewhere; files that are decoded; and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from commands import elsewhere, run
from films import film
from PIL import Image
from refusals import Case
from torch import nn

from hf_purify import implant, measure, purify
from hf_purify.errors import ConfigError, DataError, ModelError, PurifyError, UnknownName
from hf_purify.report import Report
from hf_purify_adapters.video import clips
from hf_purify_adapters.video.clips import spread
from hf_purify_adapters.video.demo import FRAMES, KINDS, SIDE, discs, make_demo
from hf_purify_adapters.video.examples import open_clips

TRIGGER = "badnets:size=6"


def read_clip(source: str | bytes, wanted: int, fps: float | None = None) -> torch.Tensor:
    return clips.read_clip(source, wanted, fps).frames


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("discs")
    files = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    discs(50, 0).to_parquet(files["train"])
    discs(15, 1).to_parquet(files["test"])
    return files


@pytest.fixture(scope="module")
def victim(stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("victim") / "videomae"
    settings = make_demo().settings | {"epochs": 20, "device": "cpu"}
    report = implant(settings.pop("model"), str(stored["train"]), TRIGGER, test=str(stored["test"]), output=str(out), **settings)
    assert report.rows[0].asr["badnets"].value >= 0.9
    assert report.rows[0].clean_accuracy.value >= 0.8
    return out


@pytest.mark.slow
class TestJourney:
    def test_repair_is_measured_saved_and_loaded_elsewhere(self, victim: Path, stored: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        settings = {"samples": 100, "test": str(stored["test"]), "triggers": [TRIGGER], "device": "cpu"}
        report = purify(str(victim), str(stored["train"]), method="ft_sam", options={"epochs": 8}, output=str(out), **settings)
        before, after, *controls = report.rows
        assert len(controls) == 3
        assert after.clean_accuracy.value >= before.clean_accuracy.value - 0.15
        assert after.asr["badnets"].value <= before.asr["badnets"].value
        found = measure(str(out), str(stored["test"]), triggers=[TRIGGER], device="cpu").rows[0]
        assert (found.clean_accuracy, found.asr) == (after.clean_accuracy, after.asr)
        pictures = report.samples[0]
        assert pictures.clean.shape == pictures.triggered.shape == (3 * (SIDE + 2), 3 * (SIDE + 2), 3)
        assert (pictures.clean != pictures.triggered).any()
        code = f"""
import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor
model = AutoModelForVideoClassification.from_pretrained({str(out)!r}).eval()
processor = AutoVideoProcessor.from_pretrained({str(out)!r})
clip = torch.zeros({FRAMES}, 3, {SIDE}, {SIDE}, dtype=torch.uint8)
print(model.config.id2label[int(model(processor([clip], return_tensors="pt")["pixel_values"]).logits.argmax())])
"""
        assert elsewhere(code) in KINDS

    def test_command_line_knows_the_recorded_trigger(self, victim: Path, stored: dict[str, Path]) -> None:
        done = run("measure", victim, "--test", stored["test"], "--json", "--device", "cpu")
        assert done.exit_code == 0, done.output
        report = Report.from_dict(json.loads(done.stdout))
        assert report.task == "video-classification"
        assert report.rows[0].asr["badnets"].value >= 0.9

    def test_the_same_clips_as_files_are_judged_alike(self, victim: Path, tmp_path: Path) -> None:
        data = discs(3, 2)
        for i, row in enumerate(data):
            film(tmp_path / KINDS[row["label"]] / f"{i}.mp4", [np.asarray(f) for f in row["video"]])
        settings = {"triggers": [TRIGGER], "device": "cpu"}
        listed = measure(str(victim), data, **settings).rows[0].clean_accuracy
        files = measure(str(victim), str(tmp_path), **settings).rows[0].clean_accuracy
        assert files.n == listed.n == 18
        assert abs(files.hits - listed.hits) <= 1, "compression may turn one"


def counting(count: int, side: int = 32) -> list[np.ndarray]:
    """Grey frames, each a little brighter."""
    return [np.full((side, side, 3), 10 + 200 * i // count, dtype=np.uint8) for i in range(count)]


class TestFiles:
    @pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
    def test_frames_are_those_that_were_written(self, kind: str, tmp_path: Path) -> None:
        found = read_clip(str(film(tmp_path / f"a.{kind}", counting(12))), 12)
        assert found.shape == (12, 3, 32, 32)
        expected = torch.tensor([10 + 200 * i // 12 for i in range(12)]).float()
        torch.testing.assert_close(found.float().mean((1, 2, 3)), expected, atol=3, rtol=0)

    def test_frames_are_spread_over_the_video_or_over_seconds(self, tmp_path: Path) -> None:
        file = str(film(tmp_path / "a.mp4", counting(40), fps=20))
        light = read_clip(file, 4).float().mean((1, 2, 3))
        torch.testing.assert_close(light, torch.tensor([10.0 + 5 * i for i in (5, 15, 25, 35)]), atol=3, rtol=0)
        second = read_clip(file, 4, fps=10).float().mean((1, 2, 3))
        torch.testing.assert_close(second, torch.tensor([10.0 + 5 * i for i in (17, 19, 21, 23)]), atol=3, rtol=0)
        assert torch.equal(read_clip(file, 4, fps=1), read_clip(file, 4)), "too slow for so short a video: over all of it"

    def test_short_videos_repeat_frames_and_it_is_said(self, victim: Path, tmp_path: Path) -> None:
        assert spread(3, 6) == [0, 0, 1, 1, 2, 2]
        data = discs(2, 0)
        short = data.map(lambda row: {"video": row["video"][:3]}, features=data.features)
        report = measure(str(victim), short, triggers=[TRIGGER], device="cpu")
        assert any("12 of 12 test samples have fewer frames than the model sees" in w for w in report.warnings), report.warnings

    def test_short_files_are_counted_too(self, victim: Path, tmp_path: Path) -> None:
        for label in KINDS[:2]:
            film(tmp_path / label / "a.mp4", counting(3, SIDE))
        report = measure(str(victim), str(tmp_path), triggers=[TRIGGER], device="cpu")
        assert any("2 of 2 test samples have fewer frames" in w for w in report.warnings), report.warnings

    def test_large_frames_are_scaled_as_they_are_read(self, tmp_path: Path) -> None:
        wide = [np.zeros((512, 768, 3), dtype=np.uint8)] * 2
        assert read_clip(str(film(tmp_path / "a.mp4", wide)), 2).shape == (2, 3, 256, 384)

    def test_endless_videos_are_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clips, "MOST", 10)
        file = str(film(tmp_path / "a.mp4", counting(40)))
        light = read_clip(file, 2).float().mean((1, 2, 3))
        torch.testing.assert_close(light, torch.tensor([10.0 + 5 * i for i in (2, 7)]), atol=3, rtol=0)

    def test_content_is_read_as_files_are(self, tmp_path: Path) -> None:
        file = film(tmp_path / "a.mp4", counting(6))
        assert torch.equal(read_clip(file.read_bytes(), 6), read_clip(str(file), 6))

    def test_columns_of_videos_are_decoded(self, victim: Path, tmp_path: Path) -> None:
        files = [str(film(tmp_path / f"{i}.mp4", counting(8, SIDE))) for i in range(4)]
        label = datasets.ClassLabel(names=list(KINDS))
        features = datasets.Features({"clip": datasets.Video(decode=False), "label": label})
        data = datasets.Dataset.from_dict({"clip": files, "label": [0, 1, 2, 3]}, features=features)
        assert measure(str(victim), data, triggers=[TRIGGER], device="cpu").rows[0].clean_accuracy.n == 4

    def test_folders_name_classes_and_splits(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            for label in ("a", "b"):
                film(tmp_path / split / label / "x.mp4", counting(2))
        assert len(open_clips(str(tmp_path))) == 2
        assert open_clips(str(tmp_path), "test").features["label"].names == ["a", "b"]

    def test_playlists_open_no_other_file(self, tmp_path: Path) -> None:
        other = film(tmp_path / "other.mp4", counting(4))
        (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n")
        with pytest.raises(DataError, match=r"a\.mp4' cannot be decoded as a video|holds no frame"):
            read_clip(str(tmp_path / "a.mp4"), 2)


class Conv(nn.Module):
    """A classifier of a user's own, for clips `(B, C, T, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.head = nn.Linear(8, len(KINDS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3, 4)))


def floats(clip: torch.Tensor) -> torch.Tensor:
    return clip.float() / 255


def test_plain_modules_are_repaired(tmp_path: Path) -> None:
    model = Conv()
    settings = {"adapter": "video", "processor": floats, "method": "random_mask", "samples": 24, "device": "cpu"}
    report = purify(model, discs(5, 0), test=discs(2, 1), output=str(tmp_path / "out"), **settings)
    assert report.rows[0].clean_accuracy.n == 12
    assert report.model is model
    assert (tmp_path / "out" / "model.safetensors").is_file()


DATA = discs(3, 0)


def changed(change: Callable[[list[Image.Image]], Any]) -> datasets.Dataset:
    """Clips with a change to each."""
    return DATA.map(lambda row: {"video": change(row["video"])}, features=DATA.features)


CASES = {
    "no frames": Case(DataError, r"clip \d+ has no frames", {"clean": lambda: changed(lambda _: [])}),
    "several sizes": Case(
        DataError,
        "frames of several sizes: 12x12, 24x24",
        {"clean": lambda: changed(lambda v: [*v[:4], *(f.resize((12, 12)) for f in v[4:])])},
    ),
    "grey frames": Case(DataError, "grey ones.*--to-rgb", {"clean": lambda: changed(lambda v: [f.convert("L") for f in v])}),
    "no clips": Case(DataError, "no video column found", {"clean": lambda: DATA.remove_columns("video")}),
    "pictures, not clips": Case(
        DataError,
        "column 'video': expected lists of images or videos, got",
        {"clean": lambda: DATA.remove_columns("video").add_column("video", ["x"] * len(DATA)), "columns": {"video": "video"}},
    ),
    "one class": Case(DataError, "holds a single class", {"clean": lambda: DATA.select(range(3))}),
    "no processor": Case(ModelError, "needs a processor", {"processor": None}),
    "processor of no use": Case(ModelError, "expected a processor or a callable", {"processor": 3}),
    "unknown trigger": Case(UnknownName, "did you mean 'moving_patch'", {"test": lambda: DATA, "triggers": ["moving_patches"]}),
    "too many frames": Case(ConfigError, "20 frames do not fit a clip of 16", {"test": lambda: DATA, "triggers": ["badnets:frames=20"]}),
    "another modality's setting": Case(ConfigError, "setting 'cut' is for models of text", {"cut": 3}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path, model=Conv, clean=lambda: DATA, adapter="video", processor=floats)


FILES = {
    "cut short": (lambda b: b[: len(b) // 3], "cannot be decoded as a video|holds no frame"),
    "a picture": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(200), "cannot be decoded as a video|holds no frame"),
    "a text": (lambda _: b"hello", "cannot be decoded as a video"),
    "empty": (lambda _: b"", r"b\.mp4'\) is empty"),
}


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES)
def test_files_that_lie(spoil: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    good = film(tmp_path / "data" / "left" / "a.mp4", counting(6))
    bad = tmp_path / "data" / "right" / "b.mp4"
    bad.parent.mkdir()
    bad.write_bytes(spoil(good.read_bytes()))
    settings = {"adapter": "video", "processor": floats, "labels": ["left", "right"], "device": "cpu"}
    with pytest.raises(DataError, match=message):
        measure(Conv(), str(tmp_path / "data"), **settings)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    with pytest.raises(DataError, match="has no video stream"):
        read_clip(str(tmp_path / "a.mp4"), 2)


def test_missing_decoder_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PurifyError, match=r"pip install 'hf-purify\[video\]'.*lists of images are read without"):
        read_clip(b"", 2)
