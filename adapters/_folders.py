"""Folders of files of one class each, as tables. Shared by the modalities."""

from __future__ import annotations

from pathlib import Path

import datasets

from hf_purify.errors import DataError

SPLITS = ("train", "test", "validation", "val")
FILE, LABEL = "file", "label"


def files_in(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """All files below a folder that end so, in order."""
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def table_of(root: Path, files: list[Path], split: str | None) -> datasets.Dataset:
    """The files of a split with their classes: `CLASS/FILE`, `SPLIT/CLASS/FILE` or `CLASS/SPLIT/FILE`.

    Raises:
        DataError: a file in no class, or no such split.
    """
    rows = []
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        splits, classes = [f for f in folders if f.lower() in SPLITS], [f for f in folders if f.lower() not in SPLITS]
        if not classes:
            raise DataError(f"'{file}' lies in no folder of a class; expected CLASS/FILE, SPLIT/CLASS/FILE or CLASS/SPLIT/FILE")
        rows.append((splits[0].lower() if splits else None, classes[0], str(file)))
    there = sorted({s for s, *_ in rows if s})
    wanted = split or ("train" if "train" in there else None)
    if wanted is not None and wanted not in there:
        raise DataError(f"'{root}' has no split '{wanted}' (splits: {', '.join(there) or 'none'})")
    names = sorted({c for _, c, _ in rows})
    kept = [(c, f) for s, c, f in rows if wanted is None or s == wanted]
    features = datasets.Features({FILE: datasets.Value("string"), LABEL: datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({FILE: [f for _, f in kept], LABEL: [names.index(c) for c, _ in kept]}, features=features)
