"""Data sets as tables: opened from wherever they lie, their columns found by features, labels matched, samples drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow.dataset
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError as WireError  # type: ignore[attr-defined]  # of httpx, whichever it is built on
from torch import Tensor
from tqdm.auto import tqdm

from hf_purify.errors import DataError, did_you_mean, first_line

TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Selection:
    """Which samples of a data set are read, and where it holds them.

    Args:
        samples: draw so many, class-balanced; None takes all.
        seed: of the drawing.
        split, revision: of the data set.
        columns: role -> column, where they are named.
        balanced: draw, else take all as they lie.
    """

    samples: int | None = None
    seed: int = 0
    split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    balanced: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Selection:
        """What `Adapter.examples` was asked for, as far as it is about samples."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in options.items() if k in names and v is not None})

    def labelled(self, data: datasets.Dataset, classes: int, model_labels: list[str], unit: str) -> tuple[Tensor, Tensor]:
        """The rows that are chosen `(n,)` and their labels `(n,)`, as class numbers of the model.

        Args:
            unit: what one sample is, for messages.
        """
        labels = read_labels(data, label_column(data, self.columns.get("label")), model_labels, classes)
        if not len(labels):
            raise DataError(f"the clean set is empty: give at least one {unit} per class")
        chosen = draw(labels, self.samples, self.seed) if self.balanced else torch.arange(len(labels))
        return chosen, labels[chosen]


def read_each(rows: Tensor, title: str, read: Callable[[int], Any]) -> list[Any]:
    """What `read` makes of each row, behind a progress bar.

    Raises:
        DataError: all together would not fit the memory that is free: pictures of a small file can be large.
    """
    listed: Iterable[int] = tqdm(rows.tolist(), desc=title, delay=2.0, leave=False, disable=None)
    found: list[Any] = []
    room = psutil.virtual_memory().available
    for i in listed:
        found.append(read(i))
        parts = found[-1] if isinstance(found[-1], tuple) else (found[-1],)
        room -= sum(part.nbytes for part in parts if isinstance(part, Tensor))
        if room < 0:
            raise DataError(
                f"the memory is full at row {i}, after {len(found)} of {len(rows)} samples: draw fewer (samples), or scale them down"
            )
    return found


def stored_cells(data: datasets.Dataset, name: str) -> Callable[[int], Any]:
    """The cells of a column as they are stored, by row: datasets would decode a picture whatever its size, and fetch what lies elsewhere."""
    rows = data.select_columns([name]).with_format("arrow")
    return lambda i: rows[i].column(0)[0].as_py()


def open_data(data: Any, split: str | None = None, revision: str | None = None, loose: str | None = None) -> datasets.Dataset:
    """Open a `datasets.Dataset`, a Parquet, CSV or JSON Lines file, a folder of them, or a data set of the Hub.

    Args:
        loose: the builder of datasets for a folder of other files, such as `imagefolder`.

    Raises:
        DataError: it cannot be found or read, or has several splits and none is named.
    """
    return _open(data, split, revision, loose, streaming=False)


def pinned(data: Any) -> str | None:
    """The commit at which a data set of the Hub is now; None for data that lie here, and where the Hub cannot be asked."""
    if not isinstance(data, str) or data.count("/") != 1 or "*" in data or Path(data).expanduser().exists():
        return None
    if datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(data).sha
    except (OSError, ValueError, WireError):  # reading it will say what is wrong
        return None


def open_stream(data: Any, split: str | None = None, loose: str | None = None, revision: str | None = None) -> datasets.IterableDataset:
    """Open what `open_data` does as a stream, of which nothing is downloaded or read before it is looked at.

    Raises:
        DataError: it cannot be found, read or streamed, or has several splits and none is named.
    """
    return _open(data, split, revision, loose, streaming=True)


def _open(data: Any, split: str | None, revision: str | None, loose: str | None, streaming: bool) -> Any:
    if isinstance(data, datasets.IterableDataset if streaming else datasets.Dataset):
        return data
    if isinstance(data, datasets.IterableDatasetDict if streaming else datasets.DatasetDict):
        return _one_split(data, split, "the data set")
    name = str(data)
    path = Path(name).expanduser()
    kind = " to stream" if streaming else ""
    try:
        if path.suffix in TABLES or "*" in name:
            return _load(path.suffix, {"train": name}, streaming)["train"]
        if path.is_dir():
            kinds = (".parquet",) if loose else tuple(TABLES)  # beside pictures, a CSV or JSON Lines file is their metadata
            files = sorted(p for p in path.iterdir() if p.suffix in kinds)
            if files:
                stems: dict[str, list[str]] = {}
                for file in files:
                    if file.suffix == files[0].suffix:
                        stems.setdefault(file.stem.split("-")[0], []).append(str(file))
                return _one_split(_load(files[0].suffix, stems, streaming), split, name)
            if loose is None:
                hint = "; leave streaming (--streaming) out: of other files, only those that are drawn are read" if streaming else ""
                raise DataError(f"the folder '{name}' holds no Parquet, CSV or JSON Lines file{kind}{hint}")
            return _one_split(_loaded(loose, streaming, data_dir=str(path)), split, name)
        if path.exists():
            raise DataError(f"expected a folder, a Parquet, CSV or JSON Lines file, or a data set id{kind}; got the file '{name}'")
        return _one_split(_loaded(name, streaming, revision=revision), split, name)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read the data set '{name}': {type(error).__name__}: {first_line(error)}") from error


def _load(suffix: str, files: dict, streaming: bool) -> Any:
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return _loaded(TABLES.get(suffix, "parquet"), streaming, data_files=files, **options)


def _loaded(builder: str, streaming: bool, **options: Any) -> Any:
    """All splits, by the builder or the data set of that name."""
    if not streaming:
        return datasets.load_dataset(builder, **options)
    made = datasets.load_dataset_builder(builder, **options)
    if hasattr(made.config, "fragment_scan_options"):  # of Parquet, which pyarrow would else read ahead, up to whole files
        made.config.fragment_scan_options = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
    return made.as_streaming_dataset()


def _one_split(data: Any, split: str | None, name: str) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None and "train" in data:
        return data["train"]
    if split not in data:
        raise DataError(f"{name} has no split '{split}'{did_you_mean(str(split), data)} (splits: {', '.join(data)})")
    return data[split]


def find_column(data: datasets.Dataset, named: str | None, kind: str, fits: Callable[[str, Any], bool]) -> str:
    """Find a column by its feature, or check the one that was named.

    Raises:
        DataError: none or several fit; the message lists the columns.
    """
    columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in data.features.items())
    if named is not None:
        if named not in data.features:
            raise DataError(f"no column '{named}'{did_you_mean(named, data.features)}; the data set has: {columns}")
        return named
    found = [n for n, f in data.features.items() if fits(n, f)]
    if len(found) != 1:
        what = f"no {kind} column found" if not found else f"several {kind} columns found ({', '.join(found)})"
        raise DataError(f"{what}; name it with columns (--column {kind}=NAME). The data set has: {columns}")
    return found[0]


def label_column(data: datasets.Dataset, named: str | None) -> str:
    """The label column: the only ClassLabel, else an integer or string column called label, labels, class or target."""
    classes = [n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)]
    if named is None and len(classes) == 1:
        return classes[0]
    names = ("label", "labels", "class", "target")
    return find_column(
        data, named, "label", lambda n, f: isinstance(f, datasets.ClassLabel) or (n.lower() in names and isinstance(f, datasets.Value))
    )


def class_names(data: datasets.Dataset, named: str | None) -> list[str]:
    """Class names of a data set, in order: those of its feature, else its labels, sorted."""
    column = label_column(data, named)
    feature, values = data.features[column], data[column][:]
    if hasattr(feature, "names"):
        return list(feature.names)
    if any(v is None for v in values):
        raise DataError(f"column '{column}' has missing labels")
    return [str(v) for v in sorted(set(values))]


def match_classes(names: list[str], model_labels: list[str]) -> list[int] | None:
    """The model's class number of each class of the data, by name; None where the model names none, and numbers are taken as they are.

    Raises:
        DataError: a class that is none of the model's.
    """
    if not model_labels or all(n.upper() == f"LABEL_{i}" for i, n in enumerate(model_labels)):
        return None
    known = {n.strip().lower(): i for i, n in enumerate(model_labels)}
    missing = [n for n in names if n.strip().lower() not in known]
    if missing:
        raise DataError(
            f"class names do not match: the data has {len(names)} classes, and {len(missing)} of them, such as '{missing[0]}', are none of the "
            f"model's {len(model_labels)} ('{model_labels[0]}', ...); use data with the model's classes, or rename them"
        )
    return [known[n.strip().lower()] for n in names]


def read_labels(data: datasets.Dataset, column: str, model_labels: list[str], classes: int) -> Tensor:
    """Labels `(n,)` as class numbers of the model; names are matched where both sides have them.

    Raises:
        DataError: a label outside the model's classes, or class names that do not match.
    """
    feature, values = data.features[column], data[column][:]
    if any(v is None for v in values):
        raise DataError(f"column '{column}' has missing labels")
    if isinstance(feature, datasets.ClassLabel) and (matched := match_classes(feature.names, model_labels)) is not None:
        bad = next((v for v in values if not 0 <= v < len(feature.names)), None)
        if bad is not None:
            raise DataError(
                f"label {bad} is outside the range 0..{len(feature.names) - 1} of column '{column}': a test set may hide its labels"
            )
        return torch.tensor([matched[v] for v in values], dtype=torch.long)
    known = {n.strip().lower(): i for i, n in enumerate(model_labels)}
    if values and isinstance(values[0], str):
        missing = sorted({v for v in values if v.strip().lower() not in known})
        if missing:
            raise DataError(
                f"label '{missing[0]}' is none of the model's classes: {', '.join(model_labels[:10]) or 'the model names none'}"
            )
        return torch.tensor([known[v.strip().lower()] for v in values])
    odd = next((v for v in values if isinstance(v, float) and not v.is_integer()), None)
    if odd is not None:
        raise DataError(f"column '{column}' holds {odd}, which is no class: labels are whole numbers or names")
    labels = torch.tensor(values, dtype=torch.long)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise DataError(f"label {int(bad)} is outside the model's range 0..{classes - 1}; the model has {classes} classes")
    return labels


def read_flags(data: Any, split: str | None, column: str, revision: str | None = None) -> Tensor:
    """A column of true and false, `(rows,)` of bool.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    opened = open_data(data, split, revision)
    if column not in opened.column_names:
        raise DataError(
            f"the data has no column '{column}'{did_you_mean(column, opened.column_names)} (columns: {', '.join(opened.column_names)})"
        )
    values = opened[column]
    if not all(v in (0, 1) for v in values):  # True and False are 1 and 0
        raise DataError(
            f"column '{column}' must say of each sample whether it is poisoned, true or false; it holds {next(v for v in values if v not in (0, 1))!r}"
        )
    return torch.tensor([bool(v) for v in values])


def draw(labels: Tensor, samples: int | None, seed: int) -> Tensor:
    """A seeded, class-balanced selection `(samples,)`: classes take turns until enough are drawn.

    Raises:
        DataError: fewer samples asked for, or there, than classes.
    """
    present = labels.unique().tolist()
    if not present:
        raise DataError("the clean set is empty: give at least one sample per class")
    if len(present) < 2:
        raise DataError(f"the clean set holds a single class ({present[0]}); a repair needs samples of all classes")
    if samples is None or samples >= len(labels):
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if samples < len(present):
        raise DataError(f"{samples} samples are fewer than the {len(present)} classes; ask for at least one per class")
    generator = torch.Generator().manual_seed(seed)
    queues = {c: (labels == c).nonzero().flatten() for c in present}
    queues = {c: q[torch.randperm(len(q), generator=generator)] for c, q in queues.items()}
    chosen: list[Tensor] = []
    while sum(len(c) for c in chosen) < samples:
        order = torch.randperm(len(present), generator=generator).tolist()
        taken = [queues[present[k]][:1] for k in order if len(queues[present[k]])]
        queues = {c: q[1:] for c, q in queues.items()}
        chosen += taken[: samples - sum(len(c) for c in chosen)]
    return torch.cat(chosen)
