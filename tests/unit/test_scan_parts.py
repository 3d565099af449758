"""What a scan is made of: shortcuts, the unlearned model, activations, the ranking of samples and neurons, the verdict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_purify.activations import activation_change
from hf_purify.calibration import Calibration, Null
from hf_purify.diagnosis import KINDS
from hf_purify.forgetting import Forgotten
from hf_purify.judgement import OUTLIER, judge
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice
from hf_purify.ranking import auroc, log_odds
from hf_purify.registry import find
from hf_purify.shortcuts import Shortcut
from hf_purify.suspicion import agreement, suspected


def forgotten(classes: int = 10, rows: Tensor | None = None) -> Forgotten:
    return Forgotten({}, {}, torch.eye(classes), 0.7, 5, rows)


def shortcut(*costs: float, kind: str = "patch") -> Shortcut:
    return Shortcut(kind, torch.tensor(costs), tried=True)


class TestShortcut:
    def test_a_cheap_class_stands_out_beside_the_third(self) -> None:
        found = shortcut(4.0, 1.0, 8.0, 5.0)
        assert found.statistic == pytest.approx(math.log(5.0))
        assert int(found.values.argmax()) == 1

    def test_two_cheap_classes_do_not_hide_each_other(self) -> None:
        assert shortcut(1.0, 1.0, 8.0, 8.0).statistic == pytest.approx(math.log(8.0))

    def test_two_classes_are_seen_beside_each_other(self) -> None:
        assert shortcut(1.0, 3.0).statistic == pytest.approx(math.log(3.0))

    def test_a_class_that_the_kind_cannot_lead_to_is_no_base(self) -> None:
        found = shortcut(2.0, 4.0, 6.0, math.inf)
        assert found.statistic == pytest.approx(math.log(3.0))
        assert found.values[3] == -math.inf

    def test_what_recovered_triggers_cost_by_themselves_counts(self) -> None:
        near, far = (Shortcut("patch", torch.tensor(costs)) for costs in ((0.5, 1.0, 1.5), (5.0, 10.0, 15.0)))
        assert near.relative.tolist() == pytest.approx(far.relative.tolist())
        assert near.statistic - far.statistic == pytest.approx(math.log(10.0))

    def test_a_cost_of_nothing_is_finite(self) -> None:
        assert math.isfinite(shortcut(0.0, 1.0, 2.0).statistic)


CALIBRATION = Calibration({"patch": Null(0.2, 0.05, 8)}, Null(0.2, 1.0, 8))


class TestVerdict:
    @pytest.mark.parametrize(
        ("costs", "kind", "targets"),
        [
            ((5.0, 5.2, 4.9, 5.1, 5.3, 4.8), "none", []),
            ((5.0, 5.2, 1.0, 5.1, 5.3, 4.8), "single-target", [2]),
            ((5.0, 1.1, 1.0, 5.1, 5.3, 4.8), "multi-target", [2, 1]),
        ],
    )
    @pytest.mark.parametrize("calibration", [CALIBRATION, None], ids=["calibrated", "not"])
    def test_targets(self, costs: tuple[float, ...], kind: str, targets: list[int], calibration: Calibration | None) -> None:
        found = judge({"patch": shortcut(*costs)}, forgotten(6), calibration, 0.95)
        assert (found.kind, found.targets, found.suspicious) == (kind, targets, kind != "none")
        assert kind in KINDS
        assert math.isnan(found.score) is (calibration is None)

    def test_without_a_calibration_the_line_is_fixed(self) -> None:
        found = judge({"patch": shortcut(1.0, 3.0, 3.0)}, forgotten(3), None, 0.95)
        assert found.signals[0].line == pytest.approx(OUTLIER + math.log(1.0), abs=1e-3)
        assert found.signals[0].values == pytest.approx([math.log(3.0), 0.0, 0.0], abs=1e-3)
        assert found.signals[0].chance is None

    def test_the_oddest_kind_beside_clean_models_gives_the_target(self) -> None:
        """A warp is cheap towards some class of a clean model, too."""
        calibration = Calibration({"patch": Null(0.2, 0.05, 8), "warp": Null(0.6, 0.4, 8)}, Null(0.2, 1.0, 8))
        both = {"patch": shortcut(5, 1, 5, 5), "warp": shortcut(1, 5, 5, 5, kind="warp")}
        found = judge(both, forgotten(4), calibration, 0.95)
        assert (found.by, found.targets) == ("patch", [1])

    def test_what_is_not_available_is_said_by_name(self) -> None:
        few = judge({"patch": shortcut(1, 2, 3)}, forgotten(3, torch.ones(3)), CALIBRATION, 0.95)
        none = judge({"patch": shortcut(1, 2, 3)}, forgotten(3), CALIBRATION, 0.95)
        for found, reason in ((few, "fewer than five"), (none, "no row")):
            rows = next(s for s in found.signals if s.name == "classifier rows")
            assert not rows.values
            assert rows.unavailable.startswith("not available")
            assert reason in rows.unavailable

    def test_rows_that_move_alike_flag_nothing(self) -> None:
        found = judge({"patch": shortcut(*range(1, 11))}, forgotten(10, torch.ones(10)), CALIBRATION, 0.95)
        rows = next(s for s in found.signals if s.name == "classifier rows")
        assert rows.values == [0.0] * 10


class TestActivations:
    def test_the_neuron_that_a_change_reaches_is_told(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].weight[2, 1] = 1.0  # channel 2 alone reads the second input channel
        index = NeuronIndex((NeuronGroup("1", 4, (ParamSlice("1.weight", 0),), "norm"),))
        clean = torch.zeros(3, 2, 5, 5)
        changed = clean.clone()
        changed[:, 1, 0, 0] = 3.0
        found = activation_change(model, index, lambda: model(clean), lambda: model(changed))
        assert found[[0, 1, 3]].tolist() == [0, 0, 0]
        assert found[2] == pytest.approx(3.0, rel=1e-3), "the norm over places of the difference"
        assert not model[1]._forward_hooks

    @pytest.mark.parametrize(("name", "variant"), [(n, v) for n in ("vision", "pointcloud", "video") for v in find("adapter", n).variants])
    def test_every_network_can_be_read(self, name: str, variant: str) -> None:
        adapter = find("adapter", name)()
        tiny = adapter.tiny(variant)
        model, batch = tiny.loaded.model.eval(), tiny.data.batch(torch.arange(4))
        index = adapter.index(tiny.loaded, batch)
        key = next(k for k in batch if k != "labels")
        other = {**batch, key: batch[key] + 0.5 * torch.randn(batch[key].shape, generator=torch.Generator().manual_seed(0))}
        same = activation_change(model, index, lambda: adapter.logits(model, batch), lambda: adapter.logits(model, batch))
        moved = activation_change(model, index, lambda: adapter.logits(model, batch), lambda: adapter.logits(model, other))
        assert same.shape == moved.shape == (len(index),)
        assert not same.any()
        assert (moved > 0).float().mean() > 0.5


class TestRanking:
    def test_features_tell_samples_with_the_trigger_from_genuine_ones_of_its_class(self) -> None:
        draw = torch.Generator().manual_seed(0)
        clean, genuine, triggered = (torch.randn(200, 24, generator=draw) for _ in range(3))
        genuine[:, 0] += 6.0  # what makes the class
        triggered[:, 0] += 5.0  # and is in both
        triggered[:, 1] += 4.0
        scores = log_odds(torch.cat([clean, genuine]), triggered[:50], torch.cat([triggered[50:], genuine]))
        truth = torch.arange(350) < 150
        assert auroc(scores, truth)[0] > 0.95
        assert auroc(torch.cat([triggered[50:], genuine])[:, 0], truth)[0] < 0.5
        assert float((scores[150:] < 0).float().mean()) > 0.9

    def test_features_that_never_differ_say_nothing(self) -> None:
        same = torch.ones(30, 4)
        assert log_odds(same, same[:8], same[:3]).tolist() == [0.0, 0.0, 0.0]

    def test_auroc_of_known_orders(self) -> None:
        truth = torch.tensor([True, True, False, False])
        assert auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), truth) == (1.0, [1.0, 1.0])
        assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), truth)[0] == 0.0
        assert auroc(torch.ones(4), truth)[0] == 0.5
        assert math.isnan(auroc(torch.ones(2), torch.tensor([True, True]))[0])

    def test_the_interval_holds_the_area(self) -> None:
        draw = torch.Generator().manual_seed(0)
        truth = torch.arange(300) < 100
        area, (low, high) = auroc(torch.randn(300, generator=draw) + truth.float(), truth)
        assert low < area < high
        assert 0.6 < area < 0.85


class TestNeurons:
    INDEX = NeuronIndex(tuple(NeuronGroup(n, 40, (ParamSlice(f"{n}.weight", 0),), "norm") for n in ("a", "b")))

    def test_outliers_of_a_layer_are_suspected_and_no_more_than_a_tenth(self) -> None:
        scores = torch.zeros(80)
        scores[:40] = torch.linspace(0, 1, 40)
        scores[5] = 30.0
        flags = suspected(self.INDEX, scores)
        assert flags.nonzero().flatten().tolist() == [5]

    def test_a_layer_without_spread_has_none(self) -> None:
        assert not suspected(self.INDEX, torch.ones(80)).any()

    def test_agreement_is_a_rank_correlation(self) -> None:
        x = torch.arange(80.0)
        found = agreement({"x": x, "cube": x**3, "down": -x, "flat": torch.ones(80)})
        assert found == {"x / cube": 1.0, "x / down": -1.0, "cube / down": -1.0}
