"""Scores against brute force, formulas worked out by hand, and torch's own decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.discovery import discover
from hf_purify.neurons import NeuronIndex, get_tensor
from hf_purify.salience import benign_salience, lipschitz, mad_outliers, mad_scores, per_neuron, relative_change, weight_change


def network() -> tuple[nn.Module, NeuronIndex, Tensor]:
    torch.manual_seed(0)
    filters = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*filters, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(model[1].weight)
    x = torch.randn(2, 3, 8, 8)
    return model, discover(model, lambda m: m(x), 5), x


def by_hand(index: NeuronIndex, tensors: dict[str, Tensor]) -> Tensor:
    """One neuron, one slice, one number at a time."""
    found = []
    for group in index:
        for i in range(group.size):
            total = 0.0
            for name, axis, start, width in group.params:
                for k in range(width if name in tensors else 0):
                    total += float(tensors[name].select(axis, start + i * width + k).double().sum())
            found.append(total)
    return torch.tensor(found)


def test_per_neuron_is_the_sum_over_owned_slices() -> None:
    model, index, _ = network()
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    scores = per_neuron(index, values)
    assert scores.shape == (len(index),)
    torch.testing.assert_close(scores, by_hand(index, values), atol=1e-5, rtol=1e-5)
    some = {"5.weight": values["5.weight"]}
    torch.testing.assert_close(per_neuron(index, some), by_hand(index, some), atol=1e-5, rtol=1e-5)


def test_per_neuron_sums_a_channel_of_flattened_maps_over_its_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(2, 3, 4, 4)
    index = discover(model, lambda m: m(x), 5)
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    scores = per_neuron(index, values)
    torch.testing.assert_close(scores, by_hand(index, values), atol=1e-5, rtol=1e-5)
    columns = values["3.weight"].view(5, 4, 4).sum((0, 2))
    torch.testing.assert_close(scores[:4], columns + values["0.weight"].sum((1, 2, 3)) + values["0.bias"])
    bound = lipschitz(model, index)[1]
    filters = torch.linalg.svdvals(model[0].weight.detach()[1].reshape(3, 9))[0]
    assert float(bound) == pytest.approx(float(filters * torch.linalg.svdvals(model[3].weight.detach()[:, 4:8])[0]), rel=1e-4)


def test_weight_change_is_the_absolute_move() -> None:
    model, index, _ = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = {n: p + torch.randn_like(p) for n, p in before.items()}
    hand = by_hand(index, {n: (after[n] - before[n]).abs() for n in before})
    torch.testing.assert_close(weight_change(index, before, after), hand, atol=1e-5, rtol=1e-5)
    assert not weight_change(index, before, before).any()


def test_relative_change_of_a_layer_is_that_of_all_it_owns() -> None:
    model, index, _ = network()
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    after = {n: p + torch.randn_like(p) if p.is_floating_point() else p for n, p in before.items()}
    found = dict(zip((g.name for g in index), relative_change(index, before, after).tolist(), strict=True))
    mine = ("5.weight", "5.bias")
    old, new = (torch.cat([values["7.weight"].flatten(), *(values[n].flatten() for n in mine)]) for values in (before, after))
    assert found["7"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
    doubled = {n: 2 * p for n, p in before.items()}
    assert relative_change(index, before, doubled).tolist() == pytest.approx([1.0] * len(index.groups))
    assert not relative_change(index, before, before).any()
    nothing = {n: torch.zeros_like(p) for n, p in before.items()}
    assert relative_change(index, nothing, before).isinf().all()
    assert not relative_change(index, nothing, nothing).any()


def test_benign_salience_of_a_linear_model() -> None:
    """For `z = W x + b` and cross entropy, `dL/dz = softmax(z) - onehot(y)`: the class row's salience follows without autograd."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4))
    batches = [(torch.randn(6, 3), torch.randint(4, (6,))) for _ in range(3)]
    index = discover(model, lambda m: m(batches[0][0]), 4)
    assert [g.role for g in index] == ["head"]
    weight, bias, eta = model[0].weight.detach(), model[0].bias.detach(), 0.7
    expected = torch.zeros(4)
    for x, y in batches:
        error = (torch.softmax(x @ weight.T + bias, 1) - F.one_hot(y, 4)) / len(y)
        gradient_times_weight = (error.T @ x * weight).sum(1) + error.sum(0) * bias
        expected = eta * expected - (1 - eta) * gradient_times_weight
    as_batches = [{"x": x, "labels": y} for x, y in batches]
    found = benign_salience(model, index, lambda b: F.cross_entropy(model(b["x"]), b["labels"], reduction="none"), as_batches, eta)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_benign_salience_takes_one_backward_pass_a_batch() -> None:
    model, index, x = network()
    passes = []
    model[7].register_full_backward_hook(lambda *_: passes.append(1))
    batches = [{"x": x, "labels": torch.tensor([0, 1])}] * 3
    model.requires_grad_(False)
    benign_salience(model, index, lambda b: F.cross_entropy(model(b["x"]), b["labels"], reduction="none"), batches)
    assert len(passes) == 3
    assert not any(p.requires_grad for p in model.parameters()), "flags are put back"


def test_lipschitz_bound_is_torchs_largest_singular_value() -> None:
    model, index, _ = network()
    bounds = index.split(lipschitz(model, index))
    conv, norm = model[0], model[1]
    for i in range(4):
        sigma = torch.linalg.svdvals(conv.weight.detach()[i].reshape(3, 9))[0]
        scale = (norm.weight.detach()[i] / (norm.running_var[i] + norm.eps).sqrt()).abs()
        assert float(bounds["1"][i]) == pytest.approx(float(sigma * scale), rel=1e-4)
    rows = get_tensor(model, "5.weight").detach().norm(dim=1) * get_tensor(model, "7.weight").detach().norm(dim=0)
    torch.testing.assert_close(bounds["7"], rows, rtol=1e-4, atol=1e-5)


def test_mad_scores_by_hand() -> None:
    values = torch.tensor([1.0, 2, 3, 4, 100])
    torch.testing.assert_close(mad_scores(values), (values - 3) / 1.4826, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [[2.0] * 6, [0.0] * 4, [7.0], [-1.0, -1.0]])
def test_nothing_stands_out_where_nothing_spreads(values: list[float]) -> None:
    assert mad_scores(torch.tensor(values)).tolist() == [0.0] * len(values)
    assert mad_outliers(torch.tensor(values)).tolist() == []


def test_half_the_values_equal_is_no_division_by_zero() -> None:
    """More than half equal: the MAD is zero, the quartiles are not."""
    values = torch.tensor([1.0, 1, 1, 1, 1, 2, 3, 50])
    scores = mad_scores(values)
    assert torch.isfinite(scores).all()
    spread = float(values.quantile(0.75) - 1) / 1.349
    assert float(scores[-1]) == pytest.approx(49 / spread, rel=1e-4)
    assert mad_outliers(values).tolist() == [7]


def test_three_quarters_equal_flags_nothing() -> None:
    values = torch.tensor([1.0] * 9 + [50.0])
    assert mad_outliers(values).tolist() == []


def test_two_values_flag_neither() -> None:
    scores = mad_scores(torch.tensor([1.0, 2.0]))
    assert torch.isfinite(scores).all()
    assert mad_outliers(torch.tensor([1.0, 1000.0])).tolist() == []


def test_outliers_come_largest_first_and_at_most_so_many() -> None:
    values = torch.tensor([1.0, 30, 1.1, 0.9, 20, 1.05, 0.95, 40, 1.02, -99])
    assert mad_outliers(values).tolist() == [7, 1, 4]
    assert mad_outliers(values, at_most=2).tolist() == [7, 1]
    assert mad_outliers(values, cut=math.inf).tolist() == []
