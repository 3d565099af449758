"""A saved mask laid upon a checkpoint's files: shard by shard, with what is replaced, and refused where it does not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_purify.errors import IndexMismatch, ModelError
from hf_purify.folding import fold_files, read_fold
from hf_purify.masks import MASK_FILE, save_mask
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice
from hf_purify.provenance import changed_tensors
from hf_purify.tensors import Difference, Tensors, difference

INDEX = NeuronIndex(
    (NeuronGroup("norm", 3, (ParamSlice("norm.weight", 0),)), NeuronGroup("fc", 2, (ParamSlice("fc.weight", 1, 1, 2),))),
    keys={"fc.weight": "model.fc.weight"},
)
MASK = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0])
META = {"format": "pt"}


def base_at(folder: Path) -> Path:
    """A checkpoint in two shards, with what lies beside it."""
    folder.mkdir()
    save_file({"norm.weight": torch.tensor([2.0, 4.0, 6.0]), "norm.mean": torch.zeros(3)}, folder / "model-1.safetensors", metadata=META)
    save_file({"model.fc.weight": torch.ones(2, 6, dtype=torch.float16)}, folder / "model-2.safetensors", metadata=META)
    names = {"norm.weight": "model-1.safetensors", "norm.mean": "model-1.safetensors", "model.fc.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("the base's own card")
    (folder / "run.py").write_text("raise SystemExit")
    return folder


def repair_at(folder: Path, complete: bool = True, extra: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    save_mask(folder / MASK_FILE, INDEX, MASK, extra=extra, complete=complete)
    return folder


def test_slices_are_scaled_and_statistics_replaced(tmp_path: Path) -> None:
    base, out = base_at(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    fold_files(base, repair_at(tmp_path / "repair", extra={"norm.mean": torch.tensor([7.0, 8.0, 9.0])}), out)
    first, second = load_file(out / "model-1.safetensors"), load_file(out / "model-2.safetensors")
    assert first["norm.weight"].tolist() == [2, 0, 3]
    assert first["norm.mean"].tolist() == [7, 8, 9]
    assert second["model.fc.weight"].dtype == torch.float16
    assert second["model.fc.weight"][0].tolist() == [1, 0.25, 0.25, 0, 0, 1]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
    with Tensors(out) as written:
        assert written.metadata(out / "model-1.safetensors") == META


def test_what_a_mask_file_says(tmp_path: Path) -> None:
    fold = read_fold(repair_at(tmp_path / "repair") / MASK_FILE)
    assert (fold.neurons, fold.removed, fold.complete) == (5, 2, True)
    assert fold.keys == {"norm.weight", "model.fc.weight"}


def edit(change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
    """Change the header of a mask file, and its tensors."""

    def run(_: Path, repair: Path) -> None:
        from safetensors import safe_open

        with safe_open(repair / MASK_FILE, framework="pt") as file:
            meta = dict(file.metadata())
        tensors = load_file(repair / MASK_FILE)
        change(meta, tensors)
        save_file(tensors, repair / MASK_FILE, metadata=meta)

    return run


def slices(value: object) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    return lambda meta, _: meta.update(
        slices=json.dumps({"mask/norm.weight/0": value, "mask/model.fc.weight/1": ["model.fc.weight", 1, 1, 2]})
    )


BAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "another format": (edit(lambda meta, _: meta.update(format="other")), "is no neuron mask: expected format"),
    "early version": (edit(lambda meta, _: meta.pop("slices") and None), "does not say which slices"),
    "no list": (edit(slices("norm.weight")), "does not say which slices"),
    "negative axis": (edit(slices(["norm.weight", -1, 0, 1])), "does not say which slices"),
    "width of zero": (edit(slices(["norm.weight", 0, 0, 0])), "does not say which slices"),
    "true for a number": (edit(slices(["norm.weight", True, 0, 1])), "does not say which slices"),
    "axis outside": (edit(slices(["norm.weight", 3, 0, 1])), "along axis 3, whose shape is"),
    "slices outside": (edit(slices(["norm.weight", 0, 2, 1])), "masks 5 slices of 'norm.weight'"),
    "a key that is not there": (edit(slices(["norm.scale", 0, 0, 1])), "belongs to another model: it changes 'norm.scale'"),
    "replaced by another shape": (edit(lambda _, t: t.update({"replaced/norm.mean": torch.zeros(4)})), r"replaces 'norm.mean' by \(4,\)"),
    "mask of two axes": (edit(lambda _, t: t.update({"mask/norm.weight/0": torch.ones(3, 1)})), "does not say which slices"),
    "slices are no JSON": (edit(lambda meta, _: meta.update(slices="{")), "cannot be read as a neuron mask"),
    "no safetensors": (lambda _, repair: (repair / MASK_FILE).write_bytes(b"\\x80\\x04.") and None, "cannot be read as a neuron mask"),
    "no mask file": (lambda _, repair: (repair / MASK_FILE).unlink(), "cannot be read as a neuron mask"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_a_mask_that_does_not_belong_is_refused(spoil: Callable[[Path, Path], None], said: str, tmp_path: Path) -> None:
    base, repair, out = base_at(tmp_path / "base"), repair_at(tmp_path / "repair"), tmp_path / "out"
    out.mkdir()
    spoil(base, repair)
    with pytest.raises(IndexMismatch, match=said):
        fold_files(base, repair, out)


def test_a_mask_that_is_not_the_whole_repair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexMismatch, match="not the whole repair"):
        fold_files(base_at(tmp_path / "base"), repair_at(tmp_path / "repair", complete=False), tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"holds the tensor 'w' twice, in a\.safetensors"):
        Tensors(tmp_path)


ONE, NAN = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, float("nan"), 4.0])


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (ONE, ONE.clone(), None),
        (NAN, NAN.clone(), None),
        (ONE, torch.tensor([1.0, 2.0, 5.0]), Difference(1, 3, 0.218218)),
        (torch.tensor([0.0, 3.0]), torch.tensor([-0.0, 3.0]), Difference(1, 2, 0.0)),
        (ONE, NAN, Difference(1, 3, None)),
        (ONE, ONE.half(), Difference(3, 3, 0.0, "dtype")),
        (ONE, torch.ones(4), Difference(4, 4, None, "shape")),
        (ONE, None, Difference(3, 3, None, "missing")),
        (None, ONE, Difference(3, 3, None, "new")),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.tensor(3), torch.tensor(4), Difference(1, 1, 0.333333)),
        (torch.tensor([True, False]), torch.tensor([True, True]), Difference(1, 2, 1.0)),
    ],
)
def test_differences_are_told_bit_by_bit(before: torch.Tensor | None, after: torch.Tensor | None, found: Difference | None) -> None:
    assert difference(before, after) == found


def test_changed_tensors_of_two_folders(tmp_path: Path) -> None:
    base, other = base_at(tmp_path / "base"), base_at(tmp_path / "other")
    assert changed_tensors(base, other) == {}
    save_file({"norm.weight": torch.zeros(3), "added": torch.ones(1)}, other / "model-1.safetensors")
    (other / "model.safetensors.index.json").unlink()
    found = {key: d.what for key, d in changed_tensors(base, other).items()}
    assert found == {"norm.weight": "changed", "norm.mean": "missing", "added": "new"}
