"""The common neuron-indexing interface: one flat address space over the neurons of any network.

Everything said about neurons is one `(N,)` tensor aligned with a `NeuronIndex`: scores (higher = more suspicious)
and masks (1 = keep). A neuron is a position in a group; a group is a module whose channels can be scaled one by one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_purify.errors import IndexMismatch, ModelError

ROLES = ("hidden", "norm", "head", "attention", "embedding")


class ParamSlice(NamedTuple):
    """What neuron `i` owns of one parameter: `width` indices along `axis`, from `start + i * width` on.

    The width is 1, but where a layer reads flattened maps: there a channel has a column for each of its positions.
    """

    param: str
    axis: int
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one module.

    Args:
        name: name of the module whose activations a mask scales, unique in the index (the class rows of a module that
            also has hidden inputs are `module[out]`).
        size: number of neurons.
        params: the slices that neuron `i` owns. The first is the *gate*: the weight slice of module `name` that a mask
            multiplies. The others (biases, the filter in front of a norm, the rows that feed a hidden unit) belong to the
            neuron when it is scored, reset or regularized.
        role: `hidden`, `norm`, `head`, `attention` or `embedding`; for selection only.
        block: number of the block that holds the module, counted from the input; 0 is the stem.
        caller: name of the module whose forward uses the gate's weight, where the module that holds it does not run itself, as
            `out_proj` of `nn.MultiheadAttention`. No activation of such a group passes a hook.
    """

    name: str
    size: int
    params: tuple[ParamSlice, ...]
    role: str = "hidden"
    block: int = 0
    caller: str | None = None

    @property
    def gate(self) -> ParamSlice:
        return self.params[0]

    @property
    def module(self) -> str:
        """Dotted name of the module that owns the gate, as in `model.get_submodule`."""
        return self.gate.param.rpartition(".")[0]

    @property
    def bias(self) -> ParamSlice | None:
        """The bias of the gate's own module, where it is indexed like the gate."""
        own = f"{self.module}.bias".lstrip(".")
        return next((p for p in self.params[1:] if p.param == own), None)


@dataclass(frozen=True)
class NeuronIndex:
    """An ordered tuple of groups: neuron `0..N-1` are those of the first group, then the second, and so on.

    Args:
        groups: the groups, from the input to the output of the network.
        keys: parameter name -> key in the saved checkpoint, where the two differ. Module names change between versions
            of transformers, checkpoint keys do not; so the fingerprint is taken over the keys.
    """

    groups: tuple[NeuronGroup, ...]
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[NeuronGroup]:
        return iter(self.groups)

    @property
    def sizes(self) -> list[int]:
        return [g.size for g in self.groups]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat `(N,)` tensor into one view per group, keyed by group name."""
        self.check(flat)
        return dict(zip((g.name for g in self.groups), flat.split(self.sizes), strict=True))

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Join per-group tensors into one flat `(N,)` tensor: the inverse of `split`."""
        return torch.cat([parts[g.name].reshape(-1) for g in self.groups])

    def locate(self, i: int) -> tuple[str, int]:
        """Return `(group name, position in the group)` of neuron `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"neuron {i} is outside 0..{len(self) - 1}")
        for g in self.groups:
            if i < g.size:
                return g.name, i
            i -= g.size
        raise AssertionError("unreachable")

    def where(self, pattern: str = "*", role: str | Sequence[str] | None = None, blocks: bool = False) -> NeuronIndex:
        """Select groups by a shell pattern on the name and by role; `blocks=True` leaves the stem out.

        The stem is left out only where blocks exist: in a plain stack of layers all groups count.
        """
        roles = (role,) if isinstance(role, str) else role
        groups = tuple(g for g in self.groups if fnmatch.fnmatch(g.name, pattern) and (roles is None or g.role in roles))
        if blocks and any(g.block > 0 for g in groups):
            groups = tuple(g for g in groups if g.block > 0)
        return NeuronIndex(groups, self.keys)

    def per_group(self, values: Sequence[float] | Tensor) -> Tensor:
        """Spread one value per group over its neurons: `(groups,) -> (N,)`."""
        values = torch.as_tensor(values, dtype=torch.float32)
        return values.repeat_interleave(torch.tensor(self.sizes))

    def standardize(self, scores: Tensor) -> Tensor:
        """Z-score `(N,)` within each group: raw sums are not comparable across layers."""
        parts = [(s - s.mean()) / s.std(unbiased=False).clamp_min(1e-12) for s in self.split(scores.float()).values()]
        return torch.cat(parts) if parts else scores

    def embed(self, part: NeuronIndex, flat: Tensor, fill: float = 1.0) -> Tensor:
        """Place a tensor aligned with `part`, a selection of this index, into this index; the rest is `fill`."""
        parts = part.split(flat)
        return torch.cat([parts[g.name] if g.name in parts else flat.new_full((g.size,), fill) for g in self.groups])

    def check(self, flat: Tensor) -> None:
        """Raise `IndexMismatch` unless `flat` is `(N,)`."""
        if flat.shape != (len(self),):
            raise IndexMismatch(f"expected one value per neuron, shape ({len(self)},); got {tuple(flat.shape)}")

    def fingerprint(self) -> str:
        """A hash over checkpoint keys, axes and sizes; saved with every mask, checked before one is used."""
        rows: list[list[str | int]] = [[self.keys.get(g.gate.param, g.gate.param), g.gate.axis, g.gate.start, g.size] for g in self.groups]
        for row, group in zip(rows, self.groups, strict=True):
            row += [group.gate.width] if group.gate.width > 1 else []
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter, or the buffer where a frozen norm keeps its weight, by dotted name."""
    module, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(module), leaf, None)
    if not isinstance(value, Tensor):
        raise ModelError(f"the model has no parameter or buffer '{name}'")
    return value


def shaped(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """View a `(C,)` vector so that it broadcasts along `axis` of an `ndim`-dimensional tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


def owned(tensor: Tensor, part: ParamSlice, size: int) -> Tensor:
    """A view `(size, ...)` of what the neurons of a group own in a parameter: neuron axis first."""
    run = tensor.narrow(part.axis, part.start, size * part.width)
    return (run.unflatten(part.axis, (size, part.width)) if part.width > 1 else run).movedim(part.axis, 0)


def spread(values: Tensor, part: ParamSlice) -> Tensor:
    """One value per index that is owned in a parameter: `(size,) -> (size * width,)`."""
    return values.repeat_interleave(part.width) if part.width > 1 else values
