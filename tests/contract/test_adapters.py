"""Every adapter on every kind of network that it makes: masks at both levels, baked and saved; losses; fingerprints."""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from hf_purify.adapter import Adapter, Tiny
from hf_purify.errors import ConfigError, IndexMismatch
from hf_purify.folding import fold_files
from hf_purify.masks import MASK_NAME, bake, load_mask, masked, save_mask
from hf_purify.neurons import NeuronIndex, get_tensor
from hf_purify.output import apply_mask
from hf_purify.provenance import changed_tensors
from hf_purify.registry import find, names
from hf_purify_adapters._checkpoints import transformers_keys

NETWORKS = [(adapter, variant) for adapter in names("adapter") for variant in find("adapter", adapter).variants]
LEVELS = ("activation", "weight")

networks = pytest.mark.parametrize(("name", "variant"), NETWORKS, ids=lambda v: str(v))


class Bench:
    """A tiny model with its index, one batch and a random mask."""

    def __init__(self, name: str, variant: str) -> None:
        self.adapter: Adapter = find("adapter", name)()
        self.tiny: Tiny = self.adapter.tiny(variant)
        self.model = self.tiny.loaded.model.eval()
        self.batch = self.tiny.data.batch(torch.arange(4))
        self.index: NeuronIndex = self.adapter.index(self.tiny.loaded, self.batch)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # shifts of zero, and scales of a residual branch near zero, would hide what happens behind them
            for n, p in self.model.named_parameters():
                if n.endswith("bias"):
                    p.copy_(torch.randn(p.shape, generator=generator))
                elif p.dim() == 1 and p.abs().max() < 1e-3:
                    p.fill_(0.7)
        self.mask = torch.rand(len(self.index), generator=generator)
        self.mask[::5] = 0
        self.mask[1::5] = 1

    def logits(self, model: nn.Module | None = None) -> Tensor:
        return self.adapter.logits(model or self.model, self.batch)


def fail(_: Tensor) -> None:
    raise KeyError("stop")


def last_to_run(bench: Bench) -> nn.Module:
    """The module whose forward begins last; not all run in a plain forward pass."""
    begun: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: begun.append(module)) for m in bench.model.modules()]
    bench.logits()
    for hook in hooks:
        hook.remove()
    return begun[-1]


def leftovers(model: nn.Module) -> dict[str, object]:
    """Everything that a mask could leave on a model."""
    return {
        "modules": [(n, type(m)) for n, m in model.named_modules()],
        "parameters": [(n, id(p)) for n, p in model.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers()],
        "keys": list(model.state_dict()),
        "hooks": {
            (n, a): list(v) for n, m in model.named_modules() for a, v in vars(m).items() if a.endswith("_hooks") and isinstance(v, dict)
        },
    }


@networks
def test_tiny_is_small_quick_and_repeatable(name: str, variant: str) -> None:
    adapter = find("adapter", name)()
    adapter.tiny(variant)  # the first call imports libraries
    start = time.perf_counter()
    first = adapter.tiny(variant)
    assert time.perf_counter() - start < 5
    second, other = adapter.tiny(variant), adapter.tiny(variant, seed=1)
    assert len(first.data) == 8
    assert int(first.data.labels.max()) < first.classes
    state = first.loaded.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in second.loaded.model.state_dict().items())
    assert not all(torch.equal(state[k], v) for k, v in other.loaded.model.state_dict().items())


@networks
def test_index_addresses_real_slices(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    assert len({g.name for g in bench.index}) == len(bench.index.groups)
    for group in bench.index:
        bench.model.get_submodule(group.module)
        for part in group.params:
            assert part.start + group.size * part.width <= get_tensor(bench.model, part.param).shape[part.axis], (group.name, part)
    heads = [group.size for group in bench.index.where(role="head")]
    assert heads == ([bench.tiny.classes] if bench.adapter.classifies(bench.tiny.loaded) else [])


@networks
@pytest.mark.parametrize("bias", [False, True])
def test_both_levels_and_the_baked_model_agree(name: str, variant: str, bias: bool) -> None:
    bench = Bench(name, variant)
    with torch.no_grad():
        plain = bench.logits()
        found = {}
        for level in LEVELS:
            with masked(bench.model, bench.index, bench.mask, level=level, bias=bias):
                found[level] = bench.logits()
        baked = bench.logits(bake(copy.deepcopy(bench.model), bench.index, bench.mask, bias=bias))
        after = bench.logits()
    assert not torch.allclose(plain, baked, atol=1e-3)
    torch.testing.assert_close(found["activation"], found["weight"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["activation"], baked, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, plain)


@networks
def test_mask_gradients_agree_and_weights_get_none(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    bench.model.requires_grad_(False)
    grads = {}
    for level in LEVELS:
        mask = nn.Parameter(bench.mask.clamp(0.1, 0.9))
        with masked(bench.model, bench.index, mask, level=level):
            assert dict(bench.model.named_parameters())[MASK_NAME] is mask
            bench.adapter.loss(bench.model, bench.batch).mean().backward()
        assert mask.grad is not None
        grads[level] = mask.grad
    assert grads["activation"].abs().max() > 1e-4
    torch.testing.assert_close(grads["activation"], grads["weight"], atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in bench.model.parameters())


@networks
def test_each_neuron_moves_the_output(name: str, variant: str) -> None:
    """A group whose mask did nothing would be no neurons: each group, removed alone, changes the logits."""
    bench = Bench(name, variant)
    with torch.no_grad():
        plain = bench.logits()
        for group in bench.index:
            part = NeuronIndex((group,), bench.index.keys)
            with masked(bench.model, part, torch.zeros(len(part))):
                assert not torch.equal(bench.logits(), plain), group.name


@networks
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [False, True])
def test_mask_of_ones_changes_no_bit(name: str, variant: str, level: str, bias: bool) -> None:
    bench = Bench(name, variant)
    ones = torch.ones(len(bench.index))
    with torch.no_grad():
        plain = bench.logits()
        with masked(bench.model, bench.index, ones, level=level, bias=bias):
            assert torch.equal(bench.logits(), plain)
        before = {k: v.clone() for k, v in bench.model.state_dict().items()}
        bake(bench.model, bench.index, ones, bias=bias)
    assert all(torch.equal(before[k], v) for k, v in bench.model.state_dict().items())


@networks
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("learned", [False, True])
def test_nothing_is_left_behind(name: str, variant: str, level: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a normal end, after an exception inside the context, and after one inside the forward pass, in the last layer of all."""
    bench = Bench(name, variant)
    bench.model.requires_grad_(False)
    before = leftovers(bench.model)
    state = {k: v.clone() for k, v in bench.model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in bench.model.named_parameters()}
    mask: Tensor = nn.Parameter(bench.mask.clone()) if learned else bench.mask
    with masked(bench.model, bench.index, mask, level=level):
        bench.logits()
    assert leftovers(bench.model) == before
    with pytest.raises(KeyError, match="stop"), masked(bench.model, bench.index, mask, level=level):
        fail(bench.logits())
    assert leftovers(bench.model) == before
    monkeypatch.setattr(last_to_run(bench), "forward", fail)
    with pytest.raises(KeyError, match="stop"), masked(bench.model, bench.index, mask, level=level):
        bench.logits()
    monkeypatch.undo()
    assert leftovers(bench.model) == before
    assert {n: p.requires_grad for n, p in bench.model.named_parameters()} == flags
    assert all(torch.equal(state[k], v) for k, v in bench.model.state_dict().items())


@networks
def test_checkpoint_inside_the_context_has_the_models_own_keys(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    keys = list(bench.model.state_dict())
    with masked(bench.model, bench.index, nn.Parameter(bench.mask.clone())):
        inside = bench.model.state_dict()
        assert list(inside) == keys
        assert all(torch.equal(v, w) for v, w in zip(inside.values(), copy.deepcopy(inside).values(), strict=True))


@networks
def test_wrong_masks_are_refused_before_anything_happens(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    before = leftovers(bench.model)
    with pytest.raises(IndexMismatch, match="one value per neuron"), masked(bench.model, bench.index, torch.ones(len(bench.index) + 1)):
        pass
    with pytest.raises(ConfigError, match="level must be"), masked(bench.model, bench.index, bench.mask, level="neuron"):
        pass
    assert leftovers(bench.model) == before


@pytest.mark.parametrize("name", names("adapter"))
def test_fingerprints_are_stable_and_tell_networks_apart(name: str) -> None:
    variants = find("adapter", name).variants
    first = {v: Bench(name, v).index.fingerprint() for v in variants}
    adapter = find("adapter", name)()
    for variant in variants:
        again = adapter.tiny(variant, seed=7)
        assert adapter.index(again.loaded, again.data.batch(torch.arange(2))).fingerprint() == first[variant]
    assert len(set(first.values())) == len(variants)


@networks
def test_mask_file_repairs_the_base_bit_for_bit(name: str, variant: str, tmp_path: Path) -> None:
    bench = Bench(name, variant)
    file = tmp_path / "neuron_mask.safetensors"
    save_mask(file, bench.index, bench.mask)
    mask, extra, complete = load_mask(file, bench.index)
    assert torch.equal(mask, bench.mask)
    assert not extra
    assert complete
    repaired = bake(copy.deepcopy(bench.model), bench.index, bench.mask).state_dict()
    applied = apply_mask(copy.deepcopy(bench.model), bench.index, file).state_dict()
    assert list(applied) == list(repaired)
    assert all(torch.equal(applied[k], v) for k, v in repaired.items())


@networks
def test_mask_folded_into_files_is_the_baked_model(name: str, variant: str, tmp_path: Path) -> None:
    """Without a model: what `apply` and `verify` rest on."""
    bench = Bench(name, variant)
    base, baked, folded = (tmp_path / n for n in ("base", "baked", "folded"))
    for folder in (base, baked, folded):
        folder.mkdir()
    model, of_transformers = bench.model, hasattr(bench.model, "save_pretrained")
    save = (lambda out: model.save_pretrained(out)) if of_transformers else (lambda out: save_model(model, str(out / "model.safetensors")))
    index = NeuronIndex(bench.index.groups, transformers_keys(model) if of_transformers else {})
    save(base)
    save_mask(tmp_path / "neuron_mask.safetensors", index, bench.mask)
    bake(model, index, bench.mask)
    save(baked)
    fold_files(base, tmp_path, folded)
    assert not changed_tensors(baked, folded)
    assert changed_tensors(base, folded)


@pytest.mark.parametrize("name", names("adapter"))
def test_mask_of_another_network_is_refused(name: str, tmp_path: Path) -> None:
    variants = find("adapter", name).variants
    for variant, other in itertools.pairwise(variants):
        bench = Bench(name, variant)
        save_mask(tmp_path / "mask.safetensors", bench.index, bench.mask)
        with pytest.raises(IndexMismatch, match="another model"):
            load_mask(tmp_path / "mask.safetensors", Bench(name, other).index)


@networks
def test_loss_is_one_number_per_example(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    loss = bench.adapter.loss(bench.model, bench.batch)
    size = len(bench.batch["labels"])
    assert loss.shape == (size,)
    one = bench.adapter.loss(bench.model, {k: v[2:3] for k, v in bench.batch.items()})
    torch.testing.assert_close(loss[2:3], one, atol=1e-5, rtol=1e-5)
    loss.mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in bench.model.parameters())


@networks
def test_mixup_goes_from_one_example_to_the_other(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    partner = torch.tensor([1, 2, 3, 0])
    kept = {k: v.clone() for k, v in bench.batch.items()}
    with torch.no_grad():
        plain = bench.adapter.loss(bench.model, bench.batch)
        own = bench.adapter.loss(bench.model, bench.adapter.mix(bench.batch, partner, torch.tensor(1.0)))
        others = bench.adapter.loss(bench.model, bench.adapter.mix(bench.batch, partner, torch.tensor(0.0)))
        half = bench.adapter.loss(bench.model, bench.adapter.mix(bench.batch, partner, torch.tensor(0.5)))
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(others, plain[partner])
    assert not torch.allclose(half, plain)
    assert all(torch.equal(bench.batch[k], v) for k, v in kept.items())


@networks
def test_augmentations_keep_shapes_labels_and_their_seed(name: str, variant: str) -> None:
    bench = Bench(name, variant)
    kinds = bench.adapter.augmentations()
    assert len(set(kinds)) == len(kinds)
    for kind in kinds:
        once, twice = (bench.adapter.augment(bench.batch, torch.Generator().manual_seed(3), kind) for _ in range(2))
        assert {k: v.shape for k, v in once.items()} == {k: v.shape for k, v in bench.batch.items()}
        assert torch.equal(once["labels"], bench.batch["labels"])
        assert all(torch.equal(once[k], twice[k]) for k in once)
        assert any(not torch.equal(once[k], v) for k, v in bench.batch.items()), kind
