"""From signals to a verdict: how odd the model is beside clean ones, and which classes stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_purify.calibration import Calibration
from hf_purify.diagnosis import Signal
from hf_purify.forgetting import Forgotten
from hf_purify.salience import mad_scores
from hf_purify.shortcuts import Shortcut

OUTLIER = math.log(1 / 0.5)  # without a calibration, a class that costs half of the third cheapest is suspected
ROWS_CUT = 3.5  # ULRL's
SHORTCUT = "How cheap a trigger of the kind '{kind}' towards a class is, by itself and beside one towards the third cheapest class, as a logarithm, above the class farthest away. The cheapest classes were looked at more closely."
TRIED = "How much cheaper the best trigger of the kind '{kind}' among those tried is towards a class than towards the third cheapest class, as a logarithm, above the class farthest away."
SHARES = "Share of the errors that fall to a class while the clean task is unlearned."
ROWS = "How far unlearning moves the classifier's row of a class beside the others, in robust standard deviations (ULRL)."


@dataclass(frozen=True)
class Judgement:
    """The verdict of a scan.

    Args:
        suspicious, score, kind, targets, signals: as in `Diagnosis`.
        by: the kind of trigger that is the oddest.
    """

    suspicious: bool
    score: float
    kind: str
    targets: list[int] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    by: str = ""


def judge(shortcuts: dict[str, Shortcut], forgotten: Forgotten, calibration: Calibration | None, threshold: float) -> Judgement:
    """Judge a model by what triggers cost; what unlearning shows is reported beside it.

    Args:
        calibration: what clean models look like; without one the verdict goes by a fixed line, and there is no score.
    """
    statistics = {kind: found.statistic for kind, found in shortcuts.items()}
    lines = {kind: calibration.line(kind, threshold) if calibration else None for kind in shortcuts}
    if calibration:
        score = calibration.score(statistics)
        suspicious = score > threshold
        odd = {kind: calibration.signals[kind].z(value) if kind in calibration.signals else -math.inf for kind, value in statistics.items()}
    else:
        score = math.nan
        odd = {kind: float(found.relative.max()) for kind, found in shortcuts.items()}
        suspicious = max(odd.values()) > OUTLIER
    by = max(odd, key=lambda kind: odd[kind])
    targets = _targets(shortcuts[by], lines[by]) if suspicious else []
    signals = [_shortcut(found, lines[kind], calibration) for kind, found in shortcuts.items()]
    kind = "none" if not suspicious else "single-target" if len(targets) == 1 else "multi-target"
    return Judgement(suspicious, score, kind, targets, [*signals, *_unlearned(forgotten)], by)


def _targets(found: Shortcut, line: float | None) -> list[int]:
    """The cheapest class, and the second one where it is beyond the line, too, and half as far out; two at most, since they are seen beside the third.

    Args:
        line: of the calibration; without one the fixed line is drawn.
    """
    relative, values = found.relative, found.values
    order = relative.argsort(descending=True).tolist()
    far = [k for k in order[1:2] if float(relative[k]) > float(relative[order[0]]) / 2]
    return [order[0], *(k for k in far if (float(relative[k]) > OUTLIER if line is None else float(values[k]) > line))]


def _shortcut(found: Shortcut, line: float | None, calibration: Calibration | None) -> Signal:
    null = calibration.signals.get(found.kind) if calibration else None
    values = found.values if calibration else found.relative
    lowest = float(values[values.isfinite()].min())  # bars begin at the class farthest away
    statistic = float(values.max())
    return Signal(
        name=found.kind,
        about=(TRIED if found.tried or not calibration else SHORTCUT).format(kind=found.kind),
        values=[round(max(float(v) - lowest, 0.0), 4) for v in values],
        line=round((OUTLIER if line is None else line) - lowest, 4),
        statistic=round(statistic, 4),
        chance=round(null.chance(statistic), 6) if null else None,
    )


def _unlearned(forgotten: Forgotten) -> list[Signal]:
    """What the unlearned model shows by class. Both stand out on some clean models, too, and take no part in the verdict."""
    shares = Signal(
        "unlearned model", SHARES, [round(float(s), 4) for s in forgotten.shares], statistic=round(float(forgotten.shares.max()), 4)
    )
    if forgotten.rows is None:
        return [shares, Signal("classifier rows", ROWS, unavailable="not available: this model's classifier has no row for each class")]
    if len(forgotten.rows) < 5:
        return [shares, Signal("classifier rows", ROWS, unavailable="not available with fewer than five classes: no row can stand out")]
    scores = mad_scores(forgotten.rows)
    return [shares, Signal("classifier rows", ROWS, [round(float(s), 4) for s in scores], ROWS_CUT, round(float(scores.max()), 4))]
