"""Streams: what is drawn from them, what that costs, and every modality's way on from there."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from PIL import Image
from scipy.stats import chisquare
from transformers import RTDetrImageProcessor

from hf_purify import implant, measure, purify
from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, DataError
from hf_purify.purifier import count_classes
from hf_purify.recipe import ImplantRecipe, PurifyRecipe
from hf_purify.registry import find
from hf_purify.report import Report
from hf_purify.session import Session
from hf_purify.streaming import Drawn, Reservoir, draw_rows
from hf_purify.tables import draw, open_stream

FOUR = Features({"row": Value("int64"), "label": ClassLabel(num_classes=4)})
QUICK: dict[str, Any] = {"method": "random_mask", "controls": False, "device": "cpu"}


def counted(length: int | None = None, classes: int = 4, features: Features | None = FOUR) -> tuple[IterableDataset, list[int]]:
    """A stream of numbered rows whose classes take turns, without an end if no length is given; and the numbers that it gave away."""
    given: list[int] = []

    def rows() -> Iterator[dict[str, int]]:
        for i in itertools.islice(itertools.count(), length):
            given.append(i)
            yield {"row": i, "label": i % classes}

    return IterableDataset.from_generator(rows, features=features), given


def sorted_by_class(classes: int, each: int) -> IterableDataset:
    """One shard a class."""

    def rows(shards: list[int]) -> Iterator[dict[str, int]]:
        for c in shards:
            yield from ({"row": c * each + i, "label": c} for i in range(each))

    features = Features({"row": Value("int64"), "label": ClassLabel(num_classes=classes)})
    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(classes))}, features=features)


def of(drawn: Drawn, column: str = "row") -> list[Any]:
    return list(drawn.rows[column])


class TestReservoir:
    @pytest.mark.parametrize("sizes", [(50, 50), (3, 40, 200), (1, 1, 1, 30), (10, 11, 12, 13, 14), (100, 2)])
    @pytest.mark.parametrize("samples", [6, 20, 33])
    def test_classes_share_as_where_all_rows_are_known(self, sizes: tuple[int, ...], samples: int) -> None:
        labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
        expected = labels[draw(labels, samples, 0)].bincount(minlength=len(sizes)).sort().values
        for seed in range(5):
            kept = Reservoir(samples, seed)
            for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
                kept.add(int(labels[i]), i)
                assert sum(map(len, kept.rows.values())) <= samples
            found = torch.tensor([len(kept.rows[c]) for c in range(len(sizes))])
            assert torch.equal(found.sort().values, expected)
            assert all(labels[rows].eq(c).all() and len(set(rows)) == len(rows) for c, rows in kept.rows.items())

    @pytest.mark.parametrize("order", ["sorted", "in turn"])
    def test_each_row_of_a_class_is_as_likely_as_another(self, order: str) -> None:
        labels = [0] * 30 + [1] * 20 + [2] * 3 if order == "sorted" else [i % 2 for i in range(40)] + [2] * 3
        taken = torch.zeros(len(labels))
        for seed in range(1500):
            kept = Reservoir(11, seed)
            for i, label in enumerate(labels):
                kept.add(label, i)
            taken[list(itertools.chain.from_iterable(kept.rows.values()))] += 1
        assert taken.sum() == 1500 * 11
        for c in (0, 1):
            assert chisquare(taken[torch.tensor(labels) == c].numpy()).pvalue > 0.01
        assert (taken[torch.tensor(labels) == 2] == 1500).all(), "a class that is small is taken whole"


class TestPass:
    def test_an_endless_stream_ends_at_the_bound(self) -> None:
        stream, given = counted()
        drawn = draw_rows(stream, 20, 0, 500)
        assert given == list(range(500))
        assert (drawn.read, drawn.ended, drawn.classes) == (500, False, 4)
        assert torch.tensor(of(drawn, "label")).bincount().tolist() == [5] * 4
        assert max(of(drawn)) > 250

    def test_a_stream_that_ends_is_read_once(self) -> None:
        stream, given = counted(90)
        drawn = draw_rows(stream, 20, 0, 500)
        assert given == list(range(90))
        assert (drawn.read, drawn.ended) == (90, True)
        assert of(draw_rows(stream, 200, 0, 500), "label").count(0) == 23, "all there are"

    def test_seeds(self) -> None:
        first, again, other = (of(draw_rows(counted(400)[0], 20, seed, 1000)) for seed in (3, 3, 4))
        assert first == again
        assert len(set(first) & set(other)) < 10

    def test_without_classes_rows_are_drawn_uniformly(self) -> None:
        drawn = draw_rows(counted(5000)[0], 400, 0, 10_000, labelled=False)
        assert drawn.classes is None
        assert chisquare(np.histogram(of(drawn), bins=10, range=(0, 5000))[0]).pvalue > 0.01

    def test_memory_is_that_of_the_samples(self) -> None:
        def rows() -> Iterator[dict[str, Any]]:
            for i in range(1500):
                yield {"text": bytes(100_000), "label": i % 2}

        features = Features({"text": Value("binary"), "label": Value("int64")})
        stream = IterableDataset.from_generator(rows, features=features)
        tracemalloc.start()
        try:
            draw_rows(stream, 20, 0, 10_000)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 10e6, f"150 MB went by, 2 MB were asked for, {peak / 1e6:.0f} MB were held"

    def test_the_bound_is_spread_over_shards(self) -> None:
        drawn = draw_rows(sorted_by_class(6, 1000), 30, 0, 600)
        assert torch.tensor(of(drawn, "label")).bincount().tolist() == [5] * 6, "a class in each shard"
        assert (drawn.read, drawn.ended) == (600, False)
        some = [draw_rows(sorted_by_class(40, 1000), 40, seed, 300) for seed in range(2)]
        assert [d.classes for d in some] == [3, 3], "a shard is not opened for a few rows"
        assert set(of(some[0], "label")) != set(of(some[1], "label"))
        drawn = draw_rows(sorted_by_class(6, 100), 30, 0, 700)
        assert (drawn.read, drawn.ended) == (600, True), "short shards leave their share to the others"

    def test_columns_of_a_stream_that_names_no_types(self) -> None:
        stream, given = counted(300, features=None)
        assert stream.features is None
        drawn = draw_rows(stream, 20, 0, 1000)
        assert given == list(range(300))
        assert drawn.rows.features == Features({"row": Value("int64"), "label": Value("int64")})

    def test_a_format_of_the_stream_is_no_matter(self) -> None:
        assert of(draw_rows(counted(50)[0].with_format("torch"), 20, 0, 100)) == of(draw_rows(counted(50)[0], 20, 0, 100))

    @pytest.mark.parametrize("change", [lambda s: s, lambda s: s.decode(False), lambda s: s.take(40)])
    def test_images_of_a_stream_however_it_decodes_them(self, change: Callable[[IterableDataset], IterableDataset], tmp_path: Path) -> None:
        pictures(40).to_parquet(tmp_path / "train.parquet")
        opened = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", streaming=True)
        drawn = draw_rows(change(opened), 8, 0, 100)
        assert all(int(np.asarray(row["image"])[0, 0, 0]) % 4 == row["label"] for row in drawn.rows)

    def test_what_is_left_is_never_decoded(self) -> None:
        def pictures(good: set[int] | None) -> IterableDataset:
            def rows() -> Iterator[dict[str, Any]]:
                for i in range(60):
                    content = png(i) if good is None or i in good else b"no picture"
                    yield {"image": {"bytes": content, "path": None}, "row": i, "label": i % 4}

            return IterableDataset.from_generator(rows, features=Features({"image": datasets.Image(), **FOUR}))

        good = set(of(draw_rows(pictures(None), 12, 0, 100)))
        drawn = draw_rows(pictures(good), 12, 0, 100)
        assert set(of(drawn)) == good
        assert [int(np.asarray(row["image"])[0, 0, 0]) for row in drawn.rows] == of(drawn)


def breaking() -> IterableDataset:
    def rows() -> Iterator[dict[str, int]]:
        yield from ({"row": i, "label": i % 4} for i in range(1234))
        raise ConnectionError("the line is dead\nand more")

    return IterableDataset.from_generator(rows, features=FOUR)


def holding(**columns: list[Any]) -> IterableDataset:
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


class TestErrors:
    @pytest.mark.parametrize(
        ("stream", "message"),
        [
            (lambda: counted(0)[0], "the stream is empty: give at least one sample per class"),
            (lambda: counted(0, features=None)[0], "the stream is empty"),
            (breaking, "the stream broke after 1,234 rows: ConnectionError: the line is dead$"),
            (lambda: holding(row=[1, 2]), r"no label column found; name it with columns .* has: row \(Value\)"),
            (lambda: holding(label=[float(i) / 7 for i in range(99)]), "20 samples are fewer than the classes of column 'label'"),
            (lambda: holding(label=[[0, 1], [1]]), r"column 'label' holds \[0, 1\], which is no class"),
            (lambda: sorted_by_class(1, 500), "the first 300 rows of the stream are all of one class: look at more .*--stream-rows"),
        ],
    )
    def test_streams_of_no_use(self, stream: Callable[[], IterableDataset], message: str) -> None:
        named = "label" if stream().column_names == ["label"] else None
        with pytest.raises(DataError, match=message):
            draw_rows(stream(), 20, 0, 300 if "300" in message else 10_000, named)

    def test_rows_that_are_not_alike(self) -> None:
        def rows() -> Iterator[dict[str, Any]]:
            yield from ({"row": i if i % 2 else {"a": 1}, "label": i % 2} for i in range(10))

        with pytest.raises(DataError, match="rows of the stream do not make one table"):
            draw_rows(IterableDataset.from_generator(rows), 5, 0, 100)

    def test_what_is_no_stream(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no Parquet, CSV or JSON Lines file to stream; leave streaming"):
            open_stream(tmp_path)
        (tmp_path / "clouds.npz").write_bytes(b"")
        with pytest.raises(DataError, match="or a data set id to stream; got the file"):
            open_stream(tmp_path / "clouds.npz")
        with pytest.raises(DataError, match="cannot read the data set 'some-org/none'"):
            open_stream("some-org/none")

    def test_samples_must_be_given(self) -> None:
        stream, given = counted()
        with pytest.raises(ConfigError, match=r"a stream has no known end: say how many clean samples"):
            repair(stream, samples=None)
        with pytest.raises(ConfigError, match=r"say how many test samples .* test_samples"):
            measure(model(), stream, device="cpu")
        assert not given
        with pytest.raises(ConfigError, match="stream_rows must be at least 1, got 0"):
            PurifyRecipe.make(model="m", clean="c", stream_rows=0)

    def test_all_processes_must_see_the_same_stream(self) -> None:
        adapter = find("adapter", "vision")()
        recipe = PurifyRecipe.make(model="m", clean="c")
        session = Session(recipe, adapter, SimpleNamespace(num_processes=2, is_main_process=True), adapter.tiny().loaded, 4)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="the stream is split among processes"):
            session.draw(split_dataset_by_node(counted(100)[0], 0, 2), None, 20, "clean samples")
        assert session.draw(counted(100)[0], None, 20, "clean samples").read == 100


def png(shade: int, side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(count: int) -> datasets.Dataset:
    rows = [{"image": {"bytes": png(i % 256), "path": None}, "label": i % 4} for i in range(count)]
    return datasets.Dataset.from_list(rows, features=Features({"image": datasets.Image(), "label": ClassLabel(num_classes=4)}))


def model(adapter: str = "vision", variant: str | None = None) -> Loaded:
    """A tiny model that takes what data sets hold."""
    loaded = find("adapter", adapter)().tiny(variant).loaded
    if adapter == "vision":
        loaded.processor = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if adapter == "detection":
        loaded.processor = RTDetrImageProcessor(size={"height": 32, "width": 32}, do_pad=False)
    return loaded


def repair(clean: Any, adapter: str = "vision", variant: str | None = None, **settings: Any) -> Report:
    return purify(model(adapter, variant), clean, adapter=adapter, **{"samples": 24} | QUICK | settings)


class TestRepairs:
    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        """How many images were opened so far, by whomever."""
        calls: list[int] = []
        opened = Image.open
        monkeypatch.setattr(Image, "open", lambda *a, **k: (calls.append(1), opened(*a, **k))[1])
        return lambda: len(calls)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for i in range(3):
            pictures(40).to_parquet(tmp_path / f"train-{i:05}-of-00003.parquet")
        pictures(20).to_parquet(tmp_path / "test-00000-of-00001.parquet")
        return tmp_path

    def test_images_of_parquet_files(self, folder: Path, seen: Callable[[], int]) -> None:
        report = repair(str(folder), streaming=True, test=str(folder), test_samples=8, seed=1)
        known = {"samples": 24, "rows_read": 120, "rows_are_all": True, "per_class": "6..6", "source": str(folder)}
        assert report.clean | known == report.clean
        assert report.rows[0].clean_accuracy is not None
        assert report.rows[0].clean_accuracy.n == 8
        assert seen() == 24 + 8
        assert not [w for w in report.warnings if "stream" in w]
        assert "--streaming" in report.command
        again, other = (repair(str(folder), streaming=True, seed=s).clean["fingerprint"] for s in (1, 2))
        assert again == report.clean["fingerprint"] != other

    def test_a_longer_stream_is_said(self, folder: Path) -> None:
        stream = pictures(120).to_iterable_dataset()
        report = repair(datasets.IterableDatasetDict(train=stream), stream_rows=50)
        assert report.clean | {"source": "<IterableDatasetDict>", "rows_read": 50, "rows_are_all": False} == report.clean
        assert "clean samples were drawn from 50 rows of a stream, which may have more" in report.warnings
        few = stream.filter(lambda row: row["label"] != 2)
        report = measure(model(), few, test_samples=9, stream_rows=50, device="cpu")
        assert "in which 1 of 4 classes do not occur: look at more (--stream-rows)" in report.warnings[0]

    def test_image_folder(self, tmp_path: Path, seen: Callable[[], int]) -> None:
        for c, i in itertools.product("0123", range(8)):
            (tmp_path / c).mkdir(exist_ok=True)
            (tmp_path / c / f"{i}.png").write_bytes(png(i))
        report = repair(str(tmp_path), streaming=True, samples=8)
        assert report.clean | {"rows_read": 32, "per_class": "2..2"} == report.clean
        assert seen() == 8

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
    @pytest.mark.parametrize("variant", ["bert", "gpt2"])
    def test_texts(self, suffix: str, variant: str, tmp_path: Path) -> None:
        words = ["a red dog", "the old cat", "a bird sees the dog", "the hill"]
        rows = datasets.Dataset.from_dict({"text": [words[i % 4] for i in range(200)], "label": [i % 4 for i in range(200)]})
        file = tmp_path / f"train.{suffix}"
        {"parquet": rows.to_parquet, "csv": rows.to_csv, "jsonl": rows.to_json}[suffix](str(file))
        report = repair(str(file), "text", variant, streaming=True, stream_rows=150)
        assert report.clean | {"samples": 24, "rows_read": 150} == report.clean
        assert report.clean["per_class"] == ("6..6" if variant == "bert" else "24..24")

    @pytest.mark.parametrize("adapter", ["detection", "video", "pointcloud"])
    def test_other_modalities(self, adapter: str) -> None:
        data, features = other(adapter)
        stream = IterableDataset.from_generator(lambda: iter(data), features=features)
        report = repair(stream, adapter, samples=8)
        assert report.clean | {"samples": 8, "rows_read": 40, "rows_are_all": True} == report.clean

    def test_classes_of_a_new_model(self) -> None:
        def counting(stream: IterableDataset, **settings: Any) -> list[str] | None:
            recipe = ImplantRecipe.make(model="resnet18", data=stream, triggers=["badnets"], create=True, **settings)
            return count_classes(recipe).labels

        assert counting(counted()[0]) == ["0", "1", "2", "3"]
        with pytest.raises(ConfigError, match=r"does not say how many classes there are: give classes=\.\.\."):
            counting(counted(features=None)[0])
        assert counting(counted(features=None)[0], classes=4) is None

    def test_a_victim_from_a_stream(self) -> None:
        settings: dict[str, Any] = {"epochs": 1, "minimum_asr": 0.0, "rate": 0.0, "samples": 16, "test_samples": 8, "device": "cpu"}
        report = implant(model(), pictures(60).to_iterable_dataset(), "badnets", **settings)
        assert report.clean | {"samples": 16, "rows_read": 60, "rows_are_all": True} == report.clean


def other(adapter: str) -> tuple[list[dict[str, Any]], Features]:
    """Forty rows of a modality, and their types."""
    generator = np.random.default_rng(0)
    if adapter == "pointcloud":
        clouds = [{"points": generator.normal(size=(64, 3)).astype("float32"), "label": i % 4} for i in range(40)]
        return clouds, Features({"points": datasets.Array2D((64, 3), "float32"), "label": ClassLabel(num_classes=4)})
    image = {"bytes": png(7), "path": None}
    if adapter == "video":
        small = {"bytes": png(7, 16), "path": None}
        clips = [{"video": [small] * 4, "label": i % 4} for i in range(40)]
        return clips, Features({"video": datasets.List(datasets.Image()), "label": ClassLabel(num_classes=4)})
    scenes = [{"image": image, "objects": {"bbox": [[4.0, 4.0, 9.0, 9.0]], "category": [i % 2]}} for i in range(40)]
    objects = {"bbox": datasets.List(datasets.List(Value("float32"))), "category": datasets.List(Value("int64"))}
    return scenes, Features({"image": datasets.Image(), "objects": objects})
