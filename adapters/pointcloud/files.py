"""Clouds from files: arrays of numpy, and folders of meshes, as tables."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_purify.errors import DataError, MissingExtra, did_you_mean
from hf_purify.tables import open_data

from .._folders import LABEL, files_in, table_of

MESHES = (".off", ".ply", ".obj")
SAMPLED = 2048  # points that are drawn from the surface of a mesh
LARGEST = 2 * 2**30  # bytes that arrays may hold, in the file and as float32
LARGEST_MESH = 2**28  # bytes of its file; in memory, a text becomes several times as large
POINTS = "points"


def open_clouds(data: Any, split: str | None = None, revision: str | None = None) -> datasets.Dataset:
    """Open clouds: `.npz`, a folder of a `.npz` for each split or of meshes in folders of classes, or what `open_data` knows.

    Raises:
        DataError: it cannot be found or read.
    """
    path = Path(str(data)).expanduser() if isinstance(data, (str, Path)) else None
    if path is not None and path.suffix == ".npz":
        return _read_arrays(path)
    if path is not None and path.is_dir():
        arrays = {file.stem: file for file in sorted(path.glob("*.npz"))}
        if arrays:
            return _read_arrays(arrays[_one_of(arrays, split, path)])
        meshes = files_in(path, MESHES)
        if meshes:
            return table_of(path, meshes, split)
        if not any(path.iterdir()):
            raise DataError(
                f"the folder '{path}' is empty; expected .npz, Parquet or JSON Lines files, or folders of meshes ({', '.join(MESHES)})"
            )
    return open_data(data, split, revision)


def _one_of(splits: Mapping[str, Path], split: str | None, where: Path) -> str:
    """The split that is asked for, else the one that is called `train`, or the only one."""
    wanted = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if wanted not in splits:
        raise DataError(f"{where} has no split '{wanted}'{did_you_mean(str(wanted), splits)} (splits: {', '.join(splits)})")
    return str(wanted)


def _read_arrays(path: Path) -> datasets.Dataset:
    """`points` `(N, P, 3)`, `label` `(N,)` and, where there are names, `classes`, of a `.npz`. Nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
        if size > LARGEST:
            raise DataError(f"'{path}' holds {size / 2**30:.1f} GiB when it is unpacked; {LARGEST // 2**30} is the most. Give it in parts")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (POINTS, LABEL, "classes") if name in file.files}
            there = ", ".join(file.files)
    except FileNotFoundError:
        raise DataError(f"cannot read the data set '{path}': there is no such file") from None
    # an encrypted entry and an unknown compression are RuntimeErrors, a header that claims a huge shape is a MemoryError
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read as an .npz file of arrays: {error}") from error
    if POINTS not in arrays or LABEL not in arrays:
        raise DataError(f"'{path}' must hold the arrays '{POINTS}' (N, P, 3) and '{LABEL}' (N,); it holds {there or 'nothing'}")
    points, labels = arrays[POINTS], arrays[LABEL]
    if points.dtype.kind not in "fiu" or points.ndim != 3 or points.shape[2] != 3:
        raise DataError(f"'{path}': {POINTS} must be numbers of the shape (N, P, 3), got {points.dtype} {points.shape}")
    if points.size * 4 > LARGEST:
        raise DataError(f"'{path}' holds {points.size // 3:,} points; {LARGEST // 12:,} are the most. Give it in parts")
    if labels.dtype.kind not in "iu" or labels.shape != points.shape[:1]:
        raise DataError(f"'{path}': {LABEL} must be {len(points)} class numbers, got {labels.dtype} {labels.shape}")
    named = arrays.get("classes")
    label = datasets.ClassLabel(names=[str(n) for n in named]) if named is not None else datasets.Value("int64")
    wide = points.astype(np.float32)
    features = datasets.Features({POINTS: datasets.Array2D(wide.shape[1:], "float32"), LABEL: label})
    return datasets.Dataset.from_dict({POINTS: wide, LABEL: labels.astype(np.int64)}, features=features)


def read_mesh(file: str, seed: int = 0) -> np.ndarray:
    """Points `(2048, 3)` of a mesh's surface, each part of it by its area; of a `.ply` without faces its own points `(P, 3)`.

    Raises:
        DataError: the file is no mesh, or has no surface.
        MissingExtra: there is no trimesh.
    """
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtra("meshes need trimesh: pip install 'hf-purify[pointcloud]'") from error
    path = Path(file)
    kind = path.suffix.lower().removeprefix(".")
    if path.stat().st_size > LARGEST_MESH:
        raise DataError(f"the mesh '{file}' has {path.stat().st_size / 2**20:,.0f} MiB; {LARGEST_MESH // 2**20} are the most")
    options = {} if kind == "off" else {"skip_materials": True}
    try:  # from memory: what a file names beside itself, such as materials, is not looked for
        found = trimesh.load(io.BytesIO(path.read_bytes()), file_type=kind, process=False, **options)
        if isinstance(found, trimesh.Scene):
            found = found.to_mesh()
        vertices = np.asarray(getattr(found, "vertices", np.empty((0, 3))), dtype=np.float64)
        if not len(getattr(found, "faces", None) if getattr(found, "faces", None) is not None else ()):
            if kind == "ply" and len(vertices):
                return vertices
            raise DataError(f"the mesh '{file}' has no faces to draw points from")
        if not np.isfinite(vertices).all():
            raise DataError(f"the mesh '{file}' has vertices that are NaN or infinite")
        if not 0 < found.area < np.inf:
            raise DataError(f"the faces of the mesh '{file}' have no area to draw points from" + " (it is infinite)" * bool(found.area))
        return np.asarray(trimesh.sample.sample_surface(found, SAMPLED, seed=seed)[0])
    except DataError:
        raise
    except Exception as error:
        text = str(error).splitlines()
        raise DataError(f"'{file}' cannot be read as a {kind} mesh: {text[0] if text else type(error).__name__}") from error
