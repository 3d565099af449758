"""The address space: cutting, joining, locating, selecting, fingerprints."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hf_purify.errors import IndexMismatch, ModelError
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice, get_tensor, owned, shaped, spread


def group(name: str, size: int, role: str = "hidden", block: int = 0, axis: int = 1) -> NeuronGroup:
    return NeuronGroup(name, size, (ParamSlice(f"{name}.weight", axis), ParamSlice(f"{name}.bias", 0)), role, block)


INDEX = NeuronIndex(
    (
        group("stem.norm", 3, "norm"),
        group("blocks.0.fc2", 4, block=1),
        group("blocks.1.fc2", 2, block=2),
        group("head", 5, "head", axis=0),
    )
)


def test_split_and_flatten_are_inverses() -> None:
    flat = torch.arange(14.0)
    parts = INDEX.split(flat)
    assert list(parts) == ["stem.norm", "blocks.0.fc2", "blocks.1.fc2", "head"]
    assert parts["blocks.1.fc2"].tolist() == [7, 8]
    assert torch.equal(INDEX.flatten(parts), flat)
    assert torch.equal(INDEX.flatten(dict(reversed(parts.items()))), flat)


def test_locate_agrees_with_split() -> None:
    flat = torch.arange(len(INDEX))
    for i in range(len(INDEX)):
        name, position = INDEX.locate(i)
        assert int(INDEX.split(flat)[name][position]) == i
    for outside in (-1, 14):
        with pytest.raises(IndexError, match=r"outside 0\.\.13"):
            INDEX.locate(outside)


@pytest.mark.parametrize("shape", [(13,), (15,), (14, 1), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(IndexMismatch, match=r"shape \(14,\)"):
        INDEX.split(torch.zeros(shape))


def test_where_selects_by_name_role_and_block() -> None:
    def names(index: NeuronIndex) -> list[str]:
        return [g.name for g in index]

    assert names(INDEX.where("blocks.*")) == ["blocks.0.fc2", "blocks.1.fc2"]
    assert names(INDEX.where(role="head")) == ["head"]
    assert names(INDEX.where(role=("head", "norm"))) == ["stem.norm", "head"]
    assert names(INDEX.where(blocks=True)) == ["blocks.0.fc2", "blocks.1.fc2"]
    assert names(INDEX.where(role="norm", blocks=True)) == ["stem.norm"], "a plain stack has no stem to leave out"
    assert len(INDEX.where(role="embedding")) == 0


def test_embed_places_a_selection() -> None:
    part = INDEX.where(role="hidden")
    whole = INDEX.embed(part, torch.arange(6.0), fill=-1)
    assert whole.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1]
    with pytest.raises(IndexMismatch):
        INDEX.embed(part, torch.zeros(14))


def test_per_group_and_standardize() -> None:
    assert INDEX.per_group([1, 2, 3, 4]).tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    scores = torch.rand(14, generator=torch.Generator().manual_seed(0)) * INDEX.per_group([1, 100, 1e4, 0])
    parts = INDEX.split(INDEX.standardize(scores))
    for name in ("stem.norm", "blocks.0.fc2", "blocks.1.fc2"):
        assert float(parts[name].mean()) == pytest.approx(0, abs=1e-5)
        assert float(parts[name].std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert not parts["head"].any(), "scores that do not spread stand out nowhere"


def test_fingerprint_is_taken_over_keys_axes_and_sizes() -> None:
    def changed(**change: object) -> str:
        return NeuronIndex((dataclasses.replace(INDEX.groups[0], **change), *INDEX.groups[1:])).fingerprint()

    moved = {g.name: (ParamSlice(f"model.{g.gate.param}", g.gate.axis),) for g in INDEX}
    renamed = tuple(dataclasses.replace(g, name=f"model.{g.name}", params=moved[g.name]) for g in INDEX)
    keys = {g.gate.param: g.gate.param.removeprefix("model.") for g in renamed}
    assert NeuronIndex(renamed, keys).fingerprint() == INDEX.fingerprint(), "module names may change, checkpoint keys do not"
    assert NeuronIndex(renamed).fingerprint() != INDEX.fingerprint()
    assert changed(role="hidden", block=3) == INDEX.fingerprint(), "roles are for selection only"
    assert changed(size=4) != INDEX.fingerprint()
    assert changed(params=(ParamSlice("stem.norm.weight", 0),)) != INDEX.fingerprint()
    assert changed(params=(ParamSlice("stem.norm.weight", 1, 3),)) != INDEX.fingerprint()
    assert changed(params=(ParamSlice("stem.norm.weight", 1, 0, 4),)) != INDEX.fingerprint()
    assert NeuronIndex(INDEX.groups[::-1]).fingerprint() != INDEX.fingerprint()


def test_gate_module_and_bias() -> None:
    plain = group("blocks.0.fc2", 4)
    assert plain.gate == ParamSlice("blocks.0.fc2.weight", 1, 0)
    assert plain.module == "blocks.0.fc2"
    assert plain.bias == ParamSlice("blocks.0.fc2.bias", 0)
    foreign = NeuronGroup("fc2", 4, (ParamSlice("fc2.weight", 1), ParamSlice("fc1.bias", 0)))
    assert foreign.bias is None
    rows = NeuronGroup("fc2[out]", 4, (ParamSlice("fc2.weight", 0), ParamSlice("fc2.bias", 0)), "head")
    assert rows.module == "fc2"


def test_owned_is_a_view_with_neurons_first() -> None:
    weight = torch.arange(24.0).view(2, 12)
    view = owned(weight, ParamSlice("w", 1, 4), 3)
    assert view.shape == (3, 2)
    view[1] = 0
    assert weight[:, 5].tolist() == [0, 0]
    assert int((weight == 0).sum()) == 3
    runs = ParamSlice("w", 1, 2, 5)
    view = owned(weight, runs, 2)
    assert view.shape == (2, 2, 5), "neurons, rows, positions"
    view[1] = -1
    assert (weight == -1).nonzero()[:, 1].tolist() == [7, 8, 9, 10, 11] * 2
    assert spread(torch.tensor([3.0, 4.0]), runs).tolist() == [3] * 5 + [4] * 5
    assert spread(torch.tensor([3.0, 4.0]), ParamSlice("w", 1)).tolist() == [3, 4]
    assert shaped(torch.ones(5), 4, 1).shape == (1, 5, 1, 1)
    assert shaped(torch.ones(5), 3, -1).shape == (1, 1, 5)


def test_get_tensor_knows_parameters_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert get_tensor(model, "0.weight") is model[0].weight
    assert get_tensor(model, "1.running_var") is model[1].running_var
    with pytest.raises(ModelError, match=r"no parameter or buffer '0\.gamma'"):
        get_tensor(model, "0.gamma")
