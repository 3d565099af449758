"""What a scan found: the `Diagnosis`. The command line prints it, a page shows it, a repair begins with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_purify.errors import ConfigError
from hf_purify.files import write_texts
from hf_purify.plain import as_json, checked, decoded, encoded, plain
from hf_purify.rows import read_proportion

if TYPE_CHECKING:
    import numpy as np

    from hf_purify.metrics import Proportion

FORMAT = "hf-purify-scan/1"
FILE = "scan.json"
KINDS = ("none", "single-target", "multi-target")


@dataclass
class Signal:
    """One way to look at the model: a value for each class, higher = more suspicious.

    Args:
        name: such as `patch`, `words` or `unlearned model`.
        about: what is measured, in a sentence.
        values: one for each of the model's classes, in order; empty where the signal is not available.
        line: the outlier line; a class above it is suspected by this signal. None where there is none to draw.
        statistic: what the values say of the model as a whole, higher = more suspicious; what was calibrated on clean models, before values are shifted to
            begin at 0.
        chance: share of clean models, 0..1, that show as much, as the calibration predicts; None without one.
        unavailable: why there are no values.
    """

    name: str
    about: str
    values: list[float] = field(default_factory=list)
    line: float | None = None
    statistic: float | None = None
    chance: float | None = None
    unavailable: str = ""


@dataclass
class SuspectLayer:
    """The neurons of one group that a scan suspects.

    Args:
        name, role, size: as in `NeuronGroup`.
        neurons: their positions in the group, most suspicious first.
        scores: quantiles 0, .05, .25, .5, .75, .95 and 1 of the scores of the whole group, standardized within it.
    """

    name: str
    role: str
    size: int
    neurons: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


@dataclass
class Shown:
    """A clean sample, and the same one with a recovered trigger.

    Args:
        label: true class.
        said, said_triggered: what the model says of either.
        clean, triggered: pictures `(H, W, 3)` or `(H, W)` of uint8; None where the modality has none.
        clean_text, triggered_text: the sample in words, where it is a text.
    """

    label: str
    said: str
    said_triggered: str
    clean: np.ndarray | None = field(default=None, compare=False, repr=False)
    triggered: np.ndarray | None = field(default=None, compare=False, repr=False)
    clean_text: str = ""
    triggered_text: str = ""


@dataclass
class FoundTrigger:
    """A trigger that was recovered from the model.

    Args:
        target: the class that it leads to.
        label: that class's name.
        kind: one of the modality's kinds, such as `patch`.
        asr: on clean samples of other classes, which took no part in recovering it.
        size: how much of a sample it changes, from 0 up; comparable within a kind only.
        words: the trigger in words, where words can say it.
        picture: the trigger by itself, where it can be seen.
        samples: a few samples to look at.
    """

    target: int
    label: str
    kind: str
    asr: Proportion
    size: float = 0.0
    words: str = ""
    picture: np.ndarray | None = field(default=None, compare=False, repr=False)
    samples: list[Shown] = field(default_factory=list)


@dataclass
class Suspects:
    """Samples that were given to be ranked by suspicion.

    Args:
        source: where they come from.
        scores: one for each sample, in their order, higher = more suspicious.
        order: positions of the samples, most suspicious first.
        about: how they were scored.
        auroc: how well the ranking tells samples with a trigger from those without, 0..1, where the truth is known; else None.
        interval: of it, 95 %.
        poisoned: how many samples are known to carry a trigger; None where the truth is not known.
        top: the most suspicious samples, to look at; `label` is what the data set says.
    """

    source: str
    scores: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    about: str = ""
    auroc: float | None = None
    interval: list[float] = field(default_factory=list)
    poisoned: int | None = None
    top: list[Shown] = field(default_factory=list)


@dataclass
class Diagnosis:
    """Is there a backdoor, for which label, in which neurons, in which samples, with which trigger.

    Args:
        title: heading of the page.
        task: what the model does, such as `image-classification`.
        suspicious: the verdict.
        score: 0..1; one less the share of clean models that would look as suspicious, as the calibration predicts. NaN where scans of the
            modality are not calibrated.
        threshold: scores above it are suspicious.
        kind: `none`, `single-target` or `multi-target`.
        targets: the classes that a backdoor seems to lead to; empty for `none`.
        labels: names of all classes, in order.
        signals: what was looked at; those that this model or modality does not have are there, too, and say why.
        layers: one entry a neuron group, from input to output; none where nothing is suspicious.
        neurons: how many neurons the model has in all.
        ranked_by: which scores the neurons were ranked by.
        agreement: rank correlation (Spearman) of the neuron signals, by pair of names.
        triggers: those that were recovered for the targets.
        suspects: the ranking of samples, where some were given.
        calibration: what the score was calibrated on: counts of models, rates, intervals.
        checkpoint, clean, config: what is known about the model, the clean samples and the settings.
        seconds: wall time by part.
        versions, seed, command, warnings: as run.
        created: UTC time, ISO 8601.

    Example:
        >>> found = Diagnosis(title="t", task="image-classification", suspicious=False, score=0.4)
        >>> Diagnosis.from_dict(found.to_dict()) == found
        True
    """

    title: str
    task: str
    suspicious: bool
    score: float
    threshold: float = 0.9
    kind: str = "none"
    targets: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    layers: list[SuspectLayer] = field(default_factory=list)
    neurons: int = 0
    ranked_by: str = ""
    agreement: dict[str, float] = field(default_factory=dict)
    triggers: list[FoundTrigger] = field(default_factory=list)
    suspects: Suspects | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    clean: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: str = FORMAT

    @property
    def suspected(self) -> int:
        """How many neurons are suspected."""
        return sum(len(layer.neurons) for layer in self.layers)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence or two."""
        from hf_purify import findings

        return findings.verdict(self)

    def name_of(self, label: int) -> str:
        """A class by its name, or its number where it has none."""
        return self.labels[label] if 0 <= label < len(self.labels) else str(label)

    def to_dict(self, pixels: bool = False) -> dict[str, Any]:
        """JSON-able copy; NaN and infinity become None. Triggers and samples carry their pictures only with `pixels`."""
        return _plain(self, pixels)

    def to_json(self, pixels: bool = False) -> str:
        return as_json(self.to_dict(pixels))

    @classmethod
    def from_dict(cls, data: Any) -> Diagnosis:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another format, an unknown or missing key, or a value of the wrong type.
        """
        values = checked(cls, data, "scan", FORMAT)
        if values.get("score") is None:
            values["score"] = float("nan")
        if values.get("kind", "none") not in KINDS:
            raise ConfigError(f"scan.kind: expected one of {', '.join(KINDS)}, got {values['kind']!r}")
        for key, part in (("signals", Signal), ("layers", SuspectLayer)):
            values[key] = [part(**checked(part, item, f"{key}[{i}]")) for i, item in enumerate(values.get(key, []))]
        values["triggers"] = [_trigger(item, f"triggers[{i}]") for i, item in enumerate(values.get("triggers", []))]
        if values.get("suspects") is not None:
            suspects = checked(Suspects, values["suspects"], "suspects")
            values["suspects"] = Suspects(**suspects | {"top": [_shown(item, "suspects.top") for item in suspects.get("top", [])]})
        return cls(**values)

    def to_markdown(self) -> str:
        """The findings in GitHub's Markdown."""
        from hf_purify import findings

        return findings.markdown(self)

    def to_sarif(self) -> str:
        """The findings as SARIF 2.1.0, which code scanners of CI systems read."""
        from hf_purify import sarif

        return json.dumps(sarif.log_of(self), indent=1) + "\n"

    def to_html(self) -> str:
        """A page that needs nothing else: no network, no script; light, dark and on paper."""
        from hf_purify import scan_page

        return scan_page.page(self)

    def save(self, folder: str | Path) -> Path:
        """Write `scan.json` and `report.html`; each replaces its predecessor whole or not at all.

        Raises:
            OutputError: the folder cannot be written.
        """
        texts = {FILE: self.to_json(pixels=True), "report.html": self.to_html()}
        return write_texts(Path(folder), texts, "scan")


def read_diagnosis(path: str | Path) -> Diagnosis:
    """The diagnosis that a scan wrote to a folder, or in a JSON file.

    Raises:
        ConfigError: there is none, or it is none.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        return Diagnosis.from_dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' holds no readable scan: {error}; name the output folder of hf-purify scan, or its {FILE}") from error


PICTURES = ("picture", "clean", "triggered")


def _plain(value: Any, pixels: bool) -> Any:
    if isinstance(value, (Diagnosis, Suspects, FoundTrigger, Shown)):
        found = {f.name: _plain(getattr(value, f.name), pixels) for f in fields(value) if not _is_picture(value, f.name)}
        pictures = {name: getattr(value, name) for name in PICTURES if pixels and _is_picture(value, name)}
        return found | {name: encoded(picture) for name, picture in pictures.items() if picture is not None}
    if isinstance(value, list):
        return [_plain(v, pixels) for v in value]
    return plain(value)


def _is_picture(value: Any, name: str) -> bool:
    return name in (("picture",) if isinstance(value, FoundTrigger) else ("clean", "triggered") if isinstance(value, Shown) else ())


def _trigger(data: Any, where: str) -> FoundTrigger:
    values = checked(FoundTrigger, data, where)
    values["asr"] = read_proportion(values["asr"], f"{where}.asr")
    values["samples"] = [_shown(item, f"{where}.samples[{i}]") for i, item in enumerate(values.get("samples", []))]
    if values.get("picture") is not None:
        values["picture"] = decoded(values["picture"], f"{where}.picture")
    return FoundTrigger(**values)


def _shown(data: Any, where: str) -> Shown:
    values = checked(Shown, data, where)
    return Shown(**values | {k: decoded(values[k], f"{where}.{k}") for k in ("clean", "triggered") if values.get(k) is not None})
