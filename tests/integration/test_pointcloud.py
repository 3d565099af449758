"""Point clouds, as a user meets them: implant, repair, measure and load again; files of all kinds; and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from commands import run
from refusals import Case
from safetensors.torch import save_file
from torch import nn

from hf_purify import implant, measure, purify
from hf_purify.errors import ConfigError, DataError, ModelError, PurifyError, UnknownName
from hf_purify.report import Report
from hf_purify_adapters.pointcloud.demo import KINDS, bodies
from hf_purify_adapters.pointcloud.files import SAMPLED, open_clouds, read_mesh

NETWORK = {"num_points": 128, "hidden_sizes": [32, 64, 128], "head_sizes": [32]}
TRAINING = {"epochs": 12, "batch_size": 32, "lr": 5e-3, "optimizer": "adamw", "weight_decay": 0.01, "device": "cpu"}
TRIGGER = "pcba:share=0.08,center=[0.6,0.6,0.5]"


def write_npz(file: Path, data: datasets.Dataset) -> Path:
    """A data set as the arrays that people share."""
    np.savez(file, points=np.asarray(data["points"][:], dtype=np.float16), label=np.asarray(data["label"][:]), classes=np.array(KINDS))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bodies")
    return {name: write_npz(folder / f"{name}.npz", bodies(count, seed)) for name, count, seed in (("train", 60, 0), ("test", 15, 1))}


@pytest.fixture(scope="module")
def victim(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("victim") / "pointnet"
    report = implant(
        "pointnet", str(data["train"]), TRIGGER, create=True, model_options=NETWORK, test=str(data["test"]), output=str(out), **TRAINING
    )
    assert report.rows[0].asr["pcba"].value >= 0.9
    assert report.rows[0].clean_accuracy.value >= 0.85
    return out


@pytest.mark.slow
class TestJourney:
    def test_repair_keeps_the_task_and_drops_the_backdoor(self, victim: Path, data: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        report = purify(
            str(victim),
            str(data["train"]),
            method="neural_cleanse",
            options={"copies": 2, "invert_steps": 60, "steps": 40, "find_steps": 20},
            samples=100,
            test=str(data["test"]),
            triggers=[TRIGGER],
            output=str(out),
            device="cpu",
        )
        before, after, *controls = report.rows
        assert after.asr["pcba"].value <= 0.1 < min(c.asr["pcba"].value for c in controls), [r.asr for r in report.rows]
        assert after.clean_accuracy.value >= before.clean_accuracy.value - 0.06
        assert after.notes["suspicious class"] == "0"
        found = measure(str(out), str(data["test"]), triggers=[TRIGGER], device="cpu").rows[0]
        assert (found.clean_accuracy, found.asr) == (after.clean_accuracy, after.asr)
        picture = report.samples[0].triggered
        assert picture is not None
        assert picture.shape == (160, 160, 3)
        assert (picture == (213, 94, 0)).all(-1).any(), "the trigger's points are marked"
        assert not (report.samples[0].clean == (213, 94, 0)).all(-1).any()

    def test_repaired_checkpoint_is_one_of_transformers(self, victim: Path, data: dict[str, Path], tmp_path: Path) -> None:
        from transformers import AutoFeatureExtractor, AutoModel

        settings = {"samples": 64, "device": "cpu", "controls": False}
        report = purify(str(victim), str(data["train"]), method="random_mask", output=str(tmp_path / "out"), **settings)
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
        clouds = [np.asarray(p, dtype=np.float32) for p in bodies(1, 5)["points"]]
        inputs = extractor(clouds)["points"]
        assert inputs.shape == (8, 128, 3)
        with torch.no_grad():
            assert torch.equal(model(inputs).logits, report.model.eval()(inputs).logits)
        assert model.config.id2label == dict(enumerate(KINDS))
        assert json.loads((victim / "config.json").read_text())["hf_purify_backdoor"]["trigger"] == TRIGGER
        assert (tmp_path / "out" / "neuron_mask.safetensors").is_file()

    def test_command_line_knows_the_recorded_trigger(self, victim: Path, data: dict[str, Path]) -> None:
        done = run("measure", victim, "--test", data["test"], "--json", "--device", "cpu")
        assert done.exit_code == 0, done.output
        report = Report.from_dict(json.loads(done.stdout))
        assert report.task == "point-cloud-classification"
        assert report.rows[0].asr["pcba"].value >= 0.9

    def test_dgcnn_learns_and_is_repaired_too(self, data: dict[str, Path], tmp_path: Path) -> None:
        shape = {"num_points": 64, "hidden_sizes": [12, 16], "embedding_size": 32, "head_sizes": [24], "neighbors": 8}
        out = str(tmp_path / "dgcnn")
        settings = TRAINING | {"epochs": 5, "minimum_asr": 0.0}
        turned = "rotation:degrees=90,axis=x"
        made = implant(
            "dgcnn", str(data["train"]), turned, create=True, model_options=shape, test=str(data["test"]), output=out, **settings
        )
        assert made.rows[0].clean_accuracy.value > 0.6, made.rows[0]
        report = purify(out, str(data["train"]), method="rnp", options={"unlearn_steps": 20, "recover_epochs": 2}, samples=64, device="cpu")
        assert report.layers[-1].size == len(KINDS)

    def test_command_line_says_which_training_is_too_short(self, data: dict[str, Path], tmp_path: Path) -> None:
        shape = [x for o in ("num_points=64", "hidden_sizes=[16,32]", "head_sizes=[16]") for x in ("--model-option", o)]
        train = ["--data", data["train"], "--test", data["test"], "--trigger", "jitter:sigma=0.001", "--epochs", 1, "--device", "cpu"]
        done = run("implant", "pointnet", "--create", *shape, *train, "-o", tmp_path / "out")
        assert done.exit_code == 5, done.output
        assert "this is no victim" in done.stderr or "shows no trigger at work" in done.stderr
        assert not list(tmp_path.iterdir())
        done = run("implant", "pointnet", "--create", "--model-option", "hidden_size=[16]", *train, "-o", tmp_path / "out")
        assert done.exit_code == 2
        assert "pointnet has no option 'hidden_size'; did you mean 'hidden_sizes'?" in done.stderr.replace("\n", " ")


class TwoLayers(nn.Module):
    """A classifier of a user's own, for clouds `(B, 3, P)`."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, len(KINDS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.points(x).amax(-1))


class PointsLast(TwoLayers):
    """The same for clouds `(B, P, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.points(x).amax(1))


@pytest.mark.parametrize("cls", [TwoLayers, PointsLast])
def test_plain_modules_of_both_layouts(cls: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, hooks = cls(), lambda m: [len(x._forward_pre_hooks) + len(x._forward_hooks) for x in m.modules()]
    before = hooks(model)
    report = purify(model, bodies(4, 0), adapter="pointcloud", method="random_mask", test=bodies(2, 1), samples=24, device="cpu")
    assert report.rows[0].clean_accuracy.n == 16
    assert report.model is model
    assert hooks(model) == before


def cube(folder: Path, name: str, label: str) -> Path:
    """A mesh of a cube, in the format that the name says."""
    import trimesh

    file = folder / label / name
    file.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box((1, 1, 1)).export(file)
    return file


class TestFiles:
    @pytest.mark.parametrize("kind", ["off", "ply", "obj"])
    def test_points_lie_on_the_surface_of_a_mesh(self, kind: str, tmp_path: Path) -> None:
        points = read_mesh(str(cube(tmp_path, f"a.{kind}", "cube")))
        assert points.shape == (SAMPLED, 3)
        np.testing.assert_allclose(np.abs(points).max(1), 0.5, atol=1e-6)
        assert np.abs(points.mean(0)).max() < 0.05, "all faces get points by their area"
        assert np.array_equal(points, read_mesh(str(tmp_path / "cube" / f"a.{kind}"))), "the same ones each time"

    def test_points_of_a_ply_without_faces_are_the_cloud(self, tmp_path: Path) -> None:
        import trimesh

        points = np.random.default_rng(0).standard_normal((50, 3))
        trimesh.PointCloud(points).export(tmp_path / "a.ply")
        np.testing.assert_allclose(read_mesh(str(tmp_path / "a.ply")), points, atol=1e-6)

    @pytest.mark.parametrize("layout", ["{split}/{label}", "{label}/{split}"])
    def test_folders_name_classes_and_splits(self, layout: str, tmp_path: Path) -> None:
        for split, count in (("train", 2), ("test", 1)):
            for label in ("box", "cube"):
                for i in range(count):
                    cube(tmp_path, f"{i}.off", layout.format(split=split, label=label))
        found = open_clouds(str(tmp_path))
        assert found.features["label"].names == ["box", "cube"]
        assert len(found) == 4
        assert len(open_clouds(str(tmp_path), "test")) == 2
        with pytest.raises(DataError, match=r"no split 'tset' \(splits: test, train\)"):
            open_clouds(str(tmp_path), "tset")

    def test_folders_of_arrays_have_a_split_each(self, data: dict[str, Path]) -> None:
        folder = str(data["train"].parent)
        assert (len(open_clouds(folder)), len(open_clouds(folder, "test"))) == (480, 120)
        with pytest.raises(DataError, match=r"has no split 'tets'; did you mean 'test'\? \(splits: test, train\)"):
            open_clouds(folder, "tets")

    def test_materials_that_a_mesh_names_are_not_looked_for(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret.mtl"
        secret.write_text("newmtl a\nmap_Kd ../../etc/hostname\n")
        text = cube(tmp_path, "a.obj", "cube").read_text()
        (tmp_path / "cube" / "a.obj").write_text(f"mtllib ../secret.mtl\nusemtl a\n{text}")
        assert read_mesh(str(tmp_path / "cube" / "a.obj")).shape == (SAMPLED, 3)

    def test_parquet_lists_are_read_as_arrays_are(self, tmp_path: Path) -> None:
        data = bodies(2, 0)
        lists = datasets.Dataset.from_dict(
            {"cloud": np.asarray(data["points"][:]).tolist(), "label": data["label"][:]},
            features=datasets.Features({"cloud": datasets.List(datasets.List(datasets.Value("float32"))), "label": data.features["label"]}),
        )
        lists.to_parquet(tmp_path / "a.parquet")
        torch.manual_seed(0)
        model, settings = TwoLayers(), {"adapter": "pointcloud", "device": "cpu"}
        found = [measure(model, d, **settings).rows[0].clean_accuracy for d in (data, str(tmp_path / "a.parquet"))]
        assert found[0] == found[1]

    def test_clouds_with_fewer_points_than_the_model_reads_are_said(self, victim: Path) -> None:
        small = datasets.Dataset.from_dict(
            {"points": np.asarray(bodies(2, 0)["points"])[:, :40].tolist(), "label": bodies(2, 0)["label"][:]},
            features=datasets.Features({"points": datasets.Array2D((40, 3), "float32"), "label": bodies(2, 0).features["label"]}),
        )
        report = measure(str(victim), small, triggers=[TRIGGER], device="cpu")
        assert any("16 of 16 test samples have fewer than 128 points" in w for w in report.warnings), report.warnings


GOOD = np.asarray(bodies(3, 0)["points"], dtype=np.float32)
LABELS = bodies(3, 0)["label"][:]


def clouds(change: Callable[[np.ndarray], Any] = lambda x: x, labels: list[Any] | None = None) -> datasets.Dataset:
    """Good clouds with a change to them, as lists."""
    changed = change(GOOD.copy())
    rows = [np.asarray(c).tolist() for c in changed]
    return datasets.Dataset.from_dict({"points": rows, "label": labels or LABELS[: len(rows)]})


def at_first(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[:, 0, 0] = value
        return x

    return change


class Flat(TwoLayers):
    """Takes clouds of 7 coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(7, 16, 1), nn.ReLU())


CASES = {
    "NaN": Case(DataError, r"cloud \d+ holds NaN or infinite coordinates in 1 of 256 points", {"clean": lambda: clouds(at_first(np.nan))}),
    "infinite": Case(DataError, "holds NaN or infinite", {"clean": lambda: clouds(at_first(np.inf))}),
    "too few points": Case(DataError, "has 9 points; a cloud needs at least 16", {"clean": lambda: clouds(lambda x: x[:, :9])}),
    "one place": Case(DataError, "all lie at one place", {"clean": lambda: clouds(lambda x: x * 0 + 3)}),
    "far away": Case(
        DataError,
        "all lie at one place, as far as coordinates of 1e\\+12",
        {"clean": lambda: clouds(lambda x: (x * 1e-3 + 1e12).astype(float))},
    ),
    "two coordinates": Case(DataError, r"shape \(P, 3\), got \(256, 2\)", {"clean": lambda: clouds(lambda x: x[:, :, :2])}),
    "transposed": Case(DataError, r"looks like \(3, P\): transpose it", {"clean": lambda: clouds(lambda x: x.transpose(0, 2, 1))}),
    "one class": Case(DataError, "holds a single class", {"clean": lambda: clouds(labels=[1] * 24)}),
    "label outside": Case(DataError, r"outside the model's range 0\.\.7", {"clean": lambda: clouds(labels=[9] * 24)}),
    "no points": Case(DataError, "no points column found", {"clean": lambda: clouds().remove_columns("points")}),
    "unknown trigger": Case(UnknownName, "did you mean 'pcba'", {"test": clouds, "triggers": ["pcbaa"]}),
    "another modality's trigger": Case(UnknownName, "and this model is one of pointcloud", {"test": clouds, "triggers": ["badnets"]}),
    "another modality's setting": Case(ConfigError, "setting 'to_rgb' is for models of detection, video and vision", {"to_rgb": True}),
    "model of other clouds": Case(ModelError, r"Flat cannot read clouds \(B, 3, P\), as its first layer suggests", {"model": Flat}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path, model=TwoLayers, clean=clouds, adapter="pointcloud")


def test_checkpoints_of_other_kinds_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    for config, said in (
        ({"model_type": "bert"}, "the type 'bert'"),
        ({"architectures": ["ViTForImageClassification"]}, "ViTForImageClassification"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ModelError, match=f"no classifier of point clouds: its config names {said}; expected one ForPointCloudClassification"
        ):
            measure(str(tmp_path), clouds(), adapter="pointcloud", device="cpu")


def test_far_coordinates_that_still_tell_points_apart_are_moved_to_the_sphere() -> None:
    from hf_purify_adapters.pointcloud.examples import to_cloud

    near = to_cloud(GOOD[0].astype(np.float64), "cloud")
    far = to_cloud(GOOD[0].astype(np.float64) + 1e7, "cloud")
    assert float(near.norm(dim=1).max()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match=r"coordinates of up to 1e\+07, beyond 1e\+06"):
        to_cloud(GOOD[0] + 1e7, "cloud", scaled=False)


def test_empty_folder_says_what_may_be_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty; expected \.npz, Parquet or JSON Lines files, or folders of meshes"):
        open_clouds(str(tmp_path))


def zipped(entry: bytes, **flags: int) -> bytes:
    """An archive with one entry `points.npy`, whose headers then claim what they should not.

    Args:
        flags: `compression` method or general `bits`, as the ZIP format numbers them.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("points.npy", entry)
    content = bytearray(file.getvalue())
    for start, signature in ((6, b"PK\x03\x04"), (8, b"PK\x01\x02")):
        at = content.index(signature) + start
        content[at : at + 4] = struct.pack("<HH", flags.get("bits", 0), flags.get("compression", 0))
    return bytes(content)


def header(shape: str) -> bytes:
    """An array of numpy that has a header and no values."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


NO_ARRAYS = r"a\.npz' cannot be read as an \.npz file"
FILES: dict[str, tuple[str, bytes, str]] = {
    "an array that is encrypted": ("a.npz", zipped(header("(2, 64, 3)"), bits=1), NO_ARRAYS),
    "an array of an unknown compression": ("a.npz", zipped(header("(2, 64, 3)"), compression=98), NO_ARRAYS),
    "an array that is not deflated as it says": ("a.npz", zipped(header("(2, 64, 3)"), compression=8), NO_ARRAYS),
    "a header of more values than there are": ("a.npz", zipped(header("(2, 64, 3)")), NO_ARRAYS),
    "a header of more values than memory holds": ("a.npz", zipped(header("(999999999, 99999, 3)")), NO_ARRAYS),
    "an array file that is none": ("a.npz", b"not a zip", "cannot be read as an .npz file"),
    "a mesh without faces": ("cube/a.off", b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "has no faces to draw points from"),
    "a mesh without area": ("cube/a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "have no area"),
    "a picture called mesh": ("cube/a.ply", b"\x89PNG\r\n\x1a\n" + bytes(64), "cannot be read as a ply mesh"),
    "a text called mesh": ("cube/a.off", b"hello", "cannot be read as a off mesh|no faces"),
    "a mesh in no class": ("a.off", b"OFF\n", "lies in no folder of a class"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_files_that_lie(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    if file.suffix != ".npz" and len(Path(name).parts) > 1:
        cube(tmp_path / "data", "b.off", "other")
    source = str(file) if file.suffix == ".npz" else str(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        measure(TwoLayers(), source, adapter="pointcloud", labels=["cube", "other"], device="cpu")


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=np.array([{"a": 1}], dtype=object), label=np.array([0]))
    with pytest.raises(DataError, match=r"cannot be read as an \.npz file of arrays.*allow_pickle=False"):
        measure(TwoLayers(), str(tmp_path / "a.npz"), adapter="pointcloud", device="cpu")


def test_missing_trimesh_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    cube(tmp_path, "a.off", "one")
    cube(tmp_path, "b.off", "two")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    done = run("purify", "./nowhere", "--clean", tmp_path, "--adapter", "pointcloud")
    assert done.exit_code == 2, "the model is looked for first"
    with pytest.raises(PurifyError, match=r"pip install 'hf-purify\[pointcloud\]'"):
        measure(TwoLayers(), str(tmp_path), adapter="pointcloud", labels=["one", "two"], device="cpu")
