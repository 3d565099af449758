"""A LoRA merged into its base, repaired there, and made a LoRA again.

The change of each linear layer, `D = repaired - base`, is cut by a singular value decomposition, `D ~ B A` with `B = U sqrt(S)` and
`A = sqrt(S) V`, at the rank that the LoRA had, or at the least rank at which `||D - B A|| <= 0.01 ||D||`. Only linear layers and the
modules that the LoRA saves whole may move.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ModelError
from hf_purify.lora import copy_beside, insert, save_lora

TOLERANCE = 0.01  # of the norm of a layer's change


class Factors(NamedTuple):
    """A layer's change as `b @ a`: `(out, rank)`, `(rank, in)`, and what is lost of it."""

    a: Tensor
    b: Tensor
    error: float


def merge(lora: Loaded, peft: Any, base: Mapping[str, Tensor]) -> Loaded:
    """A model with its LoRA merged in, which saves itself as a LoRA.

    Args:
        base: the weights of the base, by their names in it.
    """
    config = peft.peft_config["default"]
    saved = tuple(name for name, m in lora.model.named_modules() if hasattr(m, "modules_to_save"))
    model = peft.merge_and_unload()
    layers = _layers(model, saved)
    fixed = frozenset(n for n, _ in model.named_parameters() if n not in layers and not n.startswith(tuple(f"{s}." for s in saved)))
    saver = Remake(dict(base), config, layers, saved, lora.folder)
    return dataclasses.replace(lora, model=model, keys={}, saver=saver, fixed=fixed)


class Remake:
    """Saves a repaired model as a LoRA for its base."""

    def __init__(self, base: dict[str, Tensor], config: Any, layers: list[str], saved: tuple[str, ...], folder: Path | None) -> None:
        self.base, self.config, self.layers, self.saved, self.folder = base, config, layers, saved, folder
        self.factors: dict[str, Factors] = {}

    @torch.no_grad()
    def factor(self, model: nn.Module) -> dict[str, Any]:
        """Find the factors of every layer's change; gives what a report says of them.

        Raises:
            ModelError: something moved that a LoRA cannot carry.
        """
        state, whole = model.state_dict(), tuple(f"{s}." for s in self.saved)
        moved = [n for n, v in state.items() if not n.startswith(whole) and not torch.equal(v.cpu(), self.base[n])]
        lost = [n for n in moved if n not in self.layers]
        if lost:
            raise ModelError(f"a LoRA cannot carry what moved besides linear layers: {', '.join(lost[:3])}; leave merge (--merge) out")
        self.factors = {}
        for name in moved:
            module = model.get_submodule(name.removesuffix(".weight"))
            change = state[name].float() - self.base[name].to(state[name].device).float()
            self.factors[name.removesuffix(".weight")] = factors(change.T if hasattr(module, "nf") else change, self.config.r)
        ranks = [len(f.a) for f in self.factors.values()] or [0]
        worst = max((f.error for f in self.factors.values()), default=0.0)
        return {"rank of the LoRA": f"{min(ranks)}..{max(ranks)}, of {self.config.r} before", "largest relative error as a LoRA": worst}

    @torch.no_grad()
    def __call__(self, model: nn.Module, out: Path) -> None:
        """Write the LoRA of a model that was factored."""
        config = copy.deepcopy(self.config)
        ranks = {n: len(f.a) for n, f in self.factors.items()}
        if ranks:
            config.target_modules = "|".join(re.escape(n) for n in ranks)
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save or [])) or None
        config.lora_alpha, config.use_rslora = config.r, False
        config.rank_pattern = {f"^{re.escape(n)}": rank for n, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        state = model.state_dict()
        twin = copy.deepcopy(model).cpu()
        twin.load_state_dict(self.base)
        peft = insert(twin, copy.deepcopy(config))
        for name, found in self.factors.items():
            layer: Any = twin.get_submodule(name)
            layer.lora_A["default"].weight.copy_(found.a)
            layer.lora_B["default"].weight.copy_(found.b)
        for name in self.saved:
            whole: Any = twin.get_submodule(name)
            whole.modules_to_save["default"].load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            )
        save_lora(peft, out, {})
        if self.folder is not None:
            copy_beside(self.folder, out)
        config.save_pretrained(str(out))


def factors(change: Tensor, rank: int) -> Factors:
    """A matrix `(out, in)` as a product, at `rank` or the least rank above it that loses no more than the tolerance."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    total = float(s.norm())
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost if a singular value and those after it go
    needed = int((tails > TOLERANCE * total).sum())
    kept = min(max(rank, needed), len(s))
    root = s[:kept].sqrt()
    return Factors((root[:, None] * v[:kept]).cpu(), (u[:, :kept] * root).cpu(), float(s[kept:].norm()) / total if total else 0.0)


def _layers(model: nn.Module, saved: tuple[str, ...]) -> list[str]:
    """Weights that a LoRA can change: those of linear layers, but for the ones saved whole, tied, or giving the vocabulary's scores."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    output: Any = getattr(model, "get_output_embeddings", None)
    last = output() if output else None
    linear = {n: m for n, m in model.named_modules() if (type(m) is nn.Linear or hasattr(m, "nf")) and m is not last}
    inside = tuple(f"{s}." for s in saved)
    return [f"{n}.weight" for n, m in linear.items() if uses[id(m.weight)] == 1 and not f"{n}.".startswith(inside)]
