"""Gradient checkpointing: the same gradients from fewer kept tensors, in eval mode too."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from text_families import FAMILIES, forward
from torch import Tensor, nn

from hf_purify import checkpointing, purify
from hf_purify.checkpointing import check_layers, recomputed
from hf_purify.discovery import discover
from hf_purify.errors import ConfigError
from hf_purify.masks import masked
from hf_purify_adapters.text import TextAdapter


def kept(model: nn.Module, name: str, again: bool) -> tuple[Tensor, int]:
    """The gradient of a mask over all neurons, and the numbers that were kept for it."""
    index = discover(model, forward, FAMILIES[name].classes)
    mask = nn.Parameter(torch.full((len(index),), 0.9))
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with masked(model, index, mask), recomputed(model) if again else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = forward(model).square().mean()
        loss.backward()
    assert mask.grad is not None
    return mask.grad, sum(seen.values())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "albert"])  # its one layer is none of transformers'
def test_a_mask_has_the_same_gradient_and_less_is_kept(name: str) -> None:
    model = FAMILIES[name].make().requires_grad_(False)
    plain, much = kept(model, name, again=False)
    same, little = kept(model, name, again=True)
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=1e-4)
    assert little < much
    assert not any("forward" in vars(m) for m in model.modules()), "nothing is left behind"


def test_weights_have_the_same_gradients_in_train_mode() -> None:
    """Dropout draws the same numbers again."""
    found = []
    for again in (False, True):
        model = FAMILIES["bert"].make().train()
        torch.manual_seed(1)
        with recomputed(model) if again else nullcontext():
            forward(model).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-4)


def test_networks_of_timm_have_their_own() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    check_layers(model)
    with recomputed(model):
        assert model.grad_checkpointing
    assert not model.grad_checkpointing


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"Sequential has no layers for gradient checkpointing: leave it \(--gradient-checkpointing\) out"
    ):
        check_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="AlbertForSequenceClassification has no layers"):
        check_layers(FAMILIES["albert"].make())


@pytest.mark.parametrize("method", ["nft", "wiper", "ft_sam", "rnp", "ulrl", "neural_cleanse", "fine_tune"])
@pytest.mark.parametrize("variant", ["bert", "gpt2", "t5"])
def test_a_repair_is_the_same_with_it(method: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))  # type: ignore[func-returns-value]
    found = []
    for again in (False, True):
        tiny = TextAdapter().tiny(variant)
        options = {"nft": {"steps": 2}, "neural_cleanse": {"steps": 2, "cut": 1}}.get(method, {})
        calls.clear()
        purify(
            tiny.loaded,
            clean=tiny.data,
            adapter="text",
            method=method,
            options=options,
            controls=False,
            device="cpu",
            gradient_checkpointing=again,
        )
        assert bool(calls) is again
        found.append(torch.cat([p.detach().flatten() for p in tiny.loaded.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
