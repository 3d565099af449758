"""Every kind of trigger that an adapter can recover, on every kind of network that it makes."""

from __future__ import annotations

import pytest
import torch

from hf_purify.adapter import Adapter, Batch, Tiny
from hf_purify.errors import ConfigError
from hf_purify.registry import find, names
from hf_purify.stand_in import StandIn


def kinds() -> list[tuple[str, str, str]]:
    """Adapter, variant and kind."""
    found = []
    for name in names("adapter"):
        adapter = find("adapter", name)()
        for variant in adapter.variants:
            try:
                found += [(name, variant, kind) for kind in adapter.stand_ins(adapter.tiny(variant).loaded.model)]
            except ConfigError:
                continue
    return found


every = pytest.mark.parametrize(("name", "variant", "kind"), kinds(), ids=str)


class Bench:
    def __init__(self, name: str, variant: str, kind: str) -> None:
        self.adapter: Adapter = find("adapter", name)()
        self.tiny: Tiny = self.adapter.tiny(variant)
        self.model = self.tiny.loaded.model.eval()
        self.batch = self.tiny.data.batch(torch.arange(6))
        self.which = torch.tensor([0, 1, 2, 0, 1, 2])
        with torch.no_grad():
            self.made = self.stand_in(kind)

    def stand_in(self, kind: str) -> StandIn:
        classes = torch.tensor([0, 1, 1])
        made = self.adapter.stand_ins(self.model)[kind]
        return made(self.tiny.data, classes, torch.Generator().manual_seed(0), lambda b: self.adapter.logits(self.model, b))

    def placed(self) -> Batch:
        return self.made.place(self.batch, self.which)


@every
def test_place_keeps_labels_and_what_it_was_given(name: str, variant: str, kind: str) -> None:
    bench = Bench(name, variant, kind)
    kept = {k: v.clone() for k, v in bench.batch.items()}
    placed = bench.placed()
    assert torch.equal(placed["labels"], kept["labels"])
    assert all(torch.equal(bench.batch[k], v) for k, v in kept.items())
    with torch.no_grad():
        assert bench.adapter.loss(bench.model, placed).shape == (6,)


@every
def test_gradients_reach_what_is_recovered_and_no_other_trigger(name: str, variant: str, kind: str) -> None:
    bench = Bench(name, variant, kind)
    one = bench.made.place(bench.batch, torch.ones(6, dtype=torch.long))
    bench.adapter.loss(bench.model, one).sum().backward()
    grads = [p.grad for p in bench.made.parameters() if p.grad is not None]
    assert any(bool(g[1].any()) for g in grads)
    assert not any(bool(g[0].any()) or bool(g[2].any()) for g in grads)


@every
def test_sizes_shrink_to_their_limits(name: str, variant: str, kind: str) -> None:
    bench = Bench(name, variant, kind)
    limits = bench.made.size().detach().clone()
    assert limits.shape == (3,)
    assert bool((limits >= 0).all())
    with torch.no_grad():
        for p in bench.made.parameters():
            p.add_(1.0)
    grown = bench.made.size().detach()
    bench.made.shrink(limits)
    shrunk = bench.made.size().detach()
    assert bool((shrunk <= limits + 1e-6).all())
    if bool((grown > limits).all()):
        assert bool((shrunk > 0.5 * limits).all()), "no further than it must"


@every
def test_made_from_one_seed_twice_it_is_the_same(name: str, variant: str, kind: str) -> None:
    bench = Bench(name, variant, kind)
    with torch.no_grad():
        again = bench.stand_in(kind)
    assert all(torch.equal(a, b) for a, b in zip(bench.made.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        first = bench.adapter.loss(bench.model, bench.placed())
        bench.made = again
        assert torch.equal(bench.adapter.loss(bench.model, bench.placed()), first)
