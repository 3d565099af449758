"""Streams: data sets that are looked at row by row, without being downloaded or held, and a balanced draw from what goes by."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from hf_purify.errors import DataError
from hf_purify.tables import label_column

SHARDS = 64  # that a pass is spread over: opening one costs requests, and what lies together with its first rows
SHARE = 100  # rows of a shard at least: such a group of images is fetched as a whole
HEAD = 100  # first rows, which tell the columns of a stream that does not name their types


@dataclass(frozen=True)
class Drawn:
    """Samples from a stream.

    Args:
        rows: the samples, undecoded until they are read.
        read: rows that were looked at.
        ended: these were all.
        classes: number of classes among all rows that were looked at; None where rows have none.
    """

    rows: datasets.Dataset
    read: int
    ended: bool
    classes: int | None


class Reservoir:
    """At most `samples` rows of those that went by: of each class a uniform draw, and as many of one class as of another, as far as they go.

    Classes share the places as in `tables.draw`. What one may hold only shrinks while rows come, and a uniform draw from which some are left out
    at random is a uniform draw: each class is a reservoir at any time (algorithm R; Vitter, ACM TOMS 1985).
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.rows: dict[Any, list[Any]] = {}  # by class
        self.seen: Counter[Any] = Counter()
        self.full = False
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, label: Any, row: Any) -> None:
        """Take a row or leave it."""
        rows, seen = self.rows.setdefault(label, []), self.seen[label]
        self.seen[label] += 1
        if not self.full:
            rows.append(row)
            self.full = self.seen.total() == self.samples
        elif len(rows) == seen and seen + 1 < len(largest := max(self.rows.values(), key=len)):  # a class of which all are held may grow
            largest.pop(self._below(len(largest)))
            rows.append(row)
        elif (place := self._below(seen + 1)) < len(rows):
            rows[place] = row

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))


def is_stream(data: Any) -> bool:
    return isinstance(data, (datasets.IterableDataset, datasets.IterableDatasetDict))


def draw_rows(
    stream: datasets.IterableDataset,
    samples: int,
    seed: int,
    limit: int,
    label: str | None = None,
    labelled: bool = True,
    hidden: bool = False,
) -> Drawn:
    """Draw samples in one pass, which holds no more than these; nothing is decoded.

    Args:
        samples: how many; fewer where the stream has fewer.
        limit: the pass ends after so many rows.
        label: the column of labels, where it is named.
        labelled: draw class-balanced by the column of labels, else uniformly.
        hidden: show no progress bar.

    Raises:
        DataError: the stream is empty or breaks; it has no column of labels, all rows are of one class, or there are more classes than samples.
    """
    features, passing = features_of(stream), Pass(stream, seed, limit)
    rows = iter(passing)
    first = list(itertools.islice(rows, 1 if features else HEAD))
    if not first:
        raise DataError("the stream is empty: give at least one sample" + (" per class" if labelled else ""))
    column = label_column(_table(first, features), label) if labelled else None
    kept = Reservoir(samples, seed)
    for row in tqdm(itertools.chain(first, rows), desc="read stream", unit=" rows", delay=2.0, leave=False, disable=hidden or None):
        kept.add(None if column is None else _class_of(row.get(column), column), row)
        if len(kept.rows) > samples:
            raise DataError(f"{samples} samples are fewer than the classes of column '{column}'; ask for at least one per class")
    if labelled and len(kept.rows) == 1 and not passing.ended:
        raise DataError(
            f"the first {passing.read:,} rows of the stream are all of one class: look at more (stream_rows, --stream-rows), or give one that "
            "is not sorted by class"
        )
    drawn = list(itertools.chain.from_iterable(kept.rows.values()))
    return Drawn(_table(drawn, features), passing.read, passing.ended, len(kept.rows) if labelled else None)


def beginning(stream: datasets.IterableDataset) -> datasets.Dataset:
    """Some first rows, which show what columns there are."""
    features = features_of(stream)
    return _table(list(Pass(stream, 0, 1 if features else HEAD)), features)


def features_of(stream: datasets.IterableDataset) -> datasets.Features | None:
    """Types of the columns, with what the stream may leave undecoded; None where it does not say."""
    return stream.decode(num_threads=0).features if stream.features else None


class Pass:
    """A pass over the undecoded rows of a stream, at most `limit` of them, from the beginnings of its shards, in a seeded order of these.

    Many data sets are sorted by class: a pass over one whole shard after the other that ends early would see the first classes alone. Shards
    are not read side by side, since what reads Parquet may hold whole files. What is left of the share of a short one goes to the others.

    Attributes:
        read: rows so far.
        ended: nothing was left out so far.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int, limit: int) -> None:
        plain = stream.with_format(None)
        self.stream = plain.decode(False) if plain.features else plain
        self.seed, self.limit, self.read, self.ended = seed, limit, 0, True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises DataError where the stream breaks."""
        count = self.stream.num_shards
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        try:
            for place, i in enumerate(order):
                left, shards = self.limit - self.read, max(1, min(count, SHARDS) - place)
                share = min(left, max(SHARE, math.ceil(left / shards)))
                before = self.read
                for row in itertools.islice(self.stream.shard(count, i) if count > 1 else self.stream, share):
                    self.read += 1
                    yield row
                self.ended &= self.read < before + share
                if self.read == self.limit:
                    return
        except Exception as error:
            raise DataError(f"the stream broke after {self.read:,} rows: {_said(error)}") from error


def _table(rows: list[dict[str, Any]], features: datasets.Features | None) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(rows, features=features)
    except Exception as error:
        raise DataError(f"the rows of the stream do not make one table: {_said(error)}") from error


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _class_of(value: Any, column: str) -> Any:
    """A label as what tells classes apart."""
    if isinstance(value, str):
        return value.strip().lower()
    if value is None or isinstance(value, (int, float)):
        return value
    raise DataError(f"column '{column}' holds {value!r:.80}, which is no class: labels are whole numbers or names")
