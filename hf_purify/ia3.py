"""A repair as a PEFT adapter of a few kilobytes: the base model and PEFT alone give the repaired model.

```python
model = PeftModel.from_pretrained(base, "repair").merge_and_unload()
```

- Hidden units and attention values are scaled where a layer reads them: an IA3 vector over its input (`feedforward_modules`).
- Class rows of a layer without a bias are scaled where it writes them: an IA3 vector over its output.
- IA3 has no norms. One whose scale is masked, or whose statistics were replaced, is saved whole, a few values per channel, in the
  same adapter (`modules_to_save`).

All else is refused, by name, before a file is written.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_purify.errors import ConfigError, IndexMismatch, ModelError
from hf_purify.masks import bake
from hf_purify.neurons import NeuronGroup, NeuronIndex, get_tensor, spread

INSTEAD = "Use the repaired checkpoint, or the base model with neuron_mask.safetensors"


class Carried(NamedTuple):
    """Names of the modules that an adapter changes."""

    scaled: list[str]  # by an IA3 vector
    saved: list[str]  # whole; PEFT may add modules whose names end alike, which are saved as they were


def save_ia3(
    out: Path,
    model: nn.Module,
    index: NeuronIndex,
    mask: Tensor,
    *,
    base: str,
    revision: str | None = None,
    task_type: str | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Carried:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which PEFT merges into the weights that `bake` gives.

    A mask of ones gives an adapter that changes nothing.

    Args:
        out: an existing folder, not that of a checkpoint: transformers would repair the repaired one again.
        model: the network before its repair; left as it is, and its weights are not copied.
        index: its neurons.
        mask: `(N,)`, 1 = keep. A group whose mask is 1 throughout is left out.
        base: Hub id or folder of the unrepaired checkpoint, for the adapter's config.
        revision: its commit.
        task_type: of PEFT, such as `CAUSAL_LM`. Without one the adapter loads as a plain `PeftModel`; with `SEQ_CLS` and `TOKEN_CLS`
            PEFT saves the whole classifier too.
        extra: tensors that the repair replaced besides (running statistics of norms), by checkpoint key.

    Raises:
        IndexMismatch: the mask is not `(N,)`, or `extra` replaces what the model has not.
        ModelError: an adapter cannot express the repair; the layers are named.
        ConfigError: PEFT knows no such task.
    """
    from peft import IA3Config, get_peft_model, get_peft_model_state_dict
    from peft.tuners.ia3 import IA3Layer
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
    from peft.utils.constants import DUMMY_TARGET_MODULES

    index.check(mask)
    masks = {n: part for n, part in index.split(mask.detach()).items() if (part != 1).any()}
    groups = [g for g in index if g.name in masks]
    replaced = _named(model, index, extra or {})
    vectors, norms = _plan(model, groups, replaced)
    try:
        config = IA3Config(
            task_type=task_type,
            inference_mode=True,
            target_modules=_exactly(vectors) or DUMMY_TARGET_MODULES,
            feedforward_modules=_exactly({g.module for g in groups if g.module in vectors and _at_input(model, g)}),
            fan_in_fan_out=any(_transposed(model.get_submodule(n)) for n in vectors),
            modules_to_save=sorted(norms) or None,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    adapter = get_peft_model(_twin(model), config)
    twin = adapter.get_base_model()

    _fill(twin, model, groups, masks, replaced)

    state = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.base_model_name_or_path, config.revision = base, revision
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(out), auto_mapping_dict=None if task_type else origin)
    scaled, saved = ([n for n, m in twin.named_modules() if isinstance(m, kind)] for kind in (IA3Layer, ModulesToSaveWrapper))
    return Carried(scaled, saved)


@torch.no_grad()
def _fill(
    twin: nn.Module, model: nn.Module, groups: list[NeuronGroup], masks: Mapping[str, Tensor], replaced: Mapping[str, Tensor]
) -> None:
    """Give vectors and saved modules of the adapter their values."""
    from peft.tuners.ia3 import IA3Layer

    for group in groups:
        module = twin.get_submodule(group.module)
        if isinstance(module, IA3Layer):
            vector = module.ia3_l["default"]
            vector.mul_(_whole(get_tensor(model, group.gate.param), group, masks[group.name]).to(vector).view_as(vector))
        else:
            _own(twin, model, group.gate.param)
            bake(twin, NeuronIndex((group,)), masks[group.name])
    for name, value in replaced.items():
        _own(twin, model, name).copy_(value)


def _named(model: nn.Module, index: NeuronIndex, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaced tensors by their names in the model."""
    state = model.state_dict()
    names = {index.keys.get(n, n): n for n in state}
    for key, value in extra.items():
        if key not in names or value.shape != state[names[key]].shape:
            raise IndexMismatch(f"the repair replaces '{key}' {tuple(value.shape)}, which this model has not")
    return {names[k]: v for k, v in extra.items()}


def _plan(model: nn.Module, groups: list[NeuronGroup], replaced: Collection[str]) -> tuple[set[str], set[str]]:
    """Names of the modules that get a vector, and of the norms to save; `ModelError` for what cannot be carried."""
    uses = Counter(id(t) for tensors in (model.named_parameters, model.named_buffers) for _, t in tensors(remove_duplicate=False))
    norms = {g.module for g in groups if get_tensor(model, g.gate.param).dim() == 1} | {n.rpartition(".")[0] for n in replaced}
    inputs = {g.module for g in groups if _at_input(model, g)}
    problems = {}
    for group in groups:
        module, weight = model.get_submodule(group.module), get_tensor(model, group.gate.param)
        if group.caller is not None:
            problems[group.name] = f"'{group.caller}' uses its weight, and its own forward never runs"
        elif uses[id(weight)] > 1:
            problems[group.name] = "its weight is tied to another layer's"
        elif group.module in norms:
            continue
        elif not (isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or _transposed(module)):
            problems[group.name] = f"IA3 has no {type(module).__name__}"
        elif getattr(module, "groups", 1) > 1:
            problems[group.name] = "a convolution in groups shares its input channels out"
        elif not _at_input(model, group) and group.module in inputs:
            problems[group.name] = "its input is scaled too, and IA3 scales one side of a layer"
        elif not _at_input(model, group) and module.bias is not None:
            problems[group.name] = "IA3 would scale the bias of these outputs too"
    for name in norms:
        for found, module in model.named_modules():
            if found.endswith(name) and not _is_norm(module):
                ending = f"PEFT finds modules to save by the ending of their names, and would take '{found}' for it"
                problems.setdefault(name, "only a norm is small enough to be saved whole" if found == name else ending)
    if problems:
        listed = "; ".join(f"'{n}': {why}" for n, why in list(problems.items())[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ModelError(f"a PEFT adapter cannot carry {len(problems)} of the repaired layers ({listed}). {INSTEAD}")
    return {g.module for g in groups} - norms, norms


def _is_norm(module: nn.Module) -> bool:
    """Does a module hold a weight, and no tensor of more than one dimension?"""
    return hasattr(module, "weight") and all(t.dim() < 2 for t in module.state_dict().values())


def _whole(weight: Tensor, group: NeuronGroup, mask: Tensor) -> Tensor:
    """The scale of every index of the gate's axis, rounded as `bake` rounds it; 1 where the group owns none."""
    scale, full = spread(mask, group.gate), weight.new_ones(weight.shape[group.gate.axis])
    full[group.gate.start : group.gate.start + len(scale)] = scale.to(full)
    return full


def _transposed(module: nn.Module) -> bool:
    """Is it transformers' `Conv1D`, whose weight is `(in, out)`?"""
    return hasattr(module, "nf")


def _at_input(model: nn.Module, group: NeuronGroup) -> bool:
    """Does the gate of a group lie on the axis of the weight that holds input channels?"""
    module = model.get_submodule(group.module)
    return get_tensor(model, group.gate.param).dim() > 1 and group.gate.axis == (0 if _transposed(module) else 1)


def _exactly(names: Collection[str]) -> str:
    """A pattern for these module names; in a list, PEFT would take them for endings of names."""
    return "|".join(re.escape(n) for n in sorted(names))


def _twin(model: nn.Module) -> nn.Module:
    """The same modules over the same memory: PEFT rebuilds and freezes what it is given, and the model must stay as it is."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.detach() for b in model.buffers()})


def _own(twin: nn.Module, model: nn.Module, name: str) -> Tensor:
    """The adapter's own copy of a tensor, not the one that is shared with the model."""
    found = get_tensor(twin, name)
    if found.data_ptr() == get_tensor(model, name).data_ptr():
        raise ModelError(f"PEFT does not save '{name}'. {INSTEAD}")
    return found
