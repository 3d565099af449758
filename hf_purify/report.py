"""What a repair did, before and after: the `Report`. The command line prints it, a Hub card shows it, and nothing else is shown.

Here are the figures; `plain` is their way into JSON and back, `rendering` makes text, tables and the page of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_purify import rendering
from hf_purify.errors import ConfigError, ModelError
from hf_purify.files import write_texts
from hf_purify.plain import as_json, checked, decoded, encoded, plain
from hf_purify.rows import Row

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from hf_purify.neurons import NeuronGroup
    from hf_purify.uploading import Uploaded

FORMAT = "hf-purify-report/1"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
REMOVED = 0.01
BINS = 256


@dataclass
class NeuronLayer:
    """One neuron group, summarised.

    Args:
        name, role, block, size: as in `NeuronGroup`.
        removed: neurons whose mask is at most 0.01.
        mean_mask: mean of the mask, 0..1.
        mask: the mask, or means over at most 256 runs of neighbouring neurons.
        scores: quantiles 0, .05, .25, .5, .75, .95 and 1 of the scores; empty where none is finite.
        change: `||after - before|| / ||before||` of the weights that the neurons own; None where training moved none.
    """

    name: str
    role: str
    block: int
    size: int
    removed: int
    mean_mask: float
    mask: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    change: float | None = None

    @classmethod
    def of(cls, group: NeuronGroup, mask: Any, scores: Any, change: float | None = None) -> NeuronLayer:
        """Summarise a group with its part of the mask `(size,)` and of the scores `(size,)`, as `NeuronIndex.split` gives them."""
        import numpy as np

        kept, score = (np.asarray(x.tolist(), dtype=float) for x in (mask, scores))
        score = score[np.isfinite(score)]
        binned = [part.mean() for part in np.array_split(kept, min(BINS, len(kept)))] if len(kept) else []
        return cls(
            name=group.name,
            role=group.role,
            block=group.block,
            size=group.size,
            removed=int((kept <= REMOVED).sum()),
            mean_mask=round(float(kept.mean()), 4) if len(kept) else 1.0,
            mask=[round(float(m), 4) for m in binned],
            scores=[float(f"{q:.6g}") for q in np.quantile(score, QUANTILES)] if len(score) else [],
            change=None if change is None else float(f"{change:.6g}"),
        )


@dataclass
class Sample:
    """One sample as a person would look at it: clean and triggered, with the predictions before and after the repair.

    Args:
        trigger: name of the trigger.
        label, target: true class and the class that the attacker wants.
        clean_before, clean_after, triggered_before, triggered_after: predicted classes.
        clean, triggered: pictures `(H, W, 3)` or `(H, W)` of uint8; None where the modality has none.
        clean_text, triggered_text: the sample in words, where it is a text.
    """

    trigger: str
    label: str
    target: str
    clean_before: str
    clean_after: str
    triggered_before: str
    triggered_after: str
    clean: np.ndarray | None = field(default=None, compare=False, repr=False)
    triggered: np.ndarray | None = field(default=None, compare=False, repr=False)
    clean_text: str = ""
    triggered_text: str = ""

    def to_dict(self, pixels: bool = False) -> dict[str, Any]:
        """JSON-able; with `pixels` the pictures come along as base64 PNG."""
        out = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("clean", "triggered")}
        pictures = {"clean": self.clean, "triggered": self.triggered} if pixels else {}
        return out | {name: encoded(picture) for name, picture in pictures.items() if picture is not None}

    @classmethod
    def from_dict(cls, data: Any, where: str = "sample") -> Sample:
        values = checked(cls, data, where)
        pictures = {k: decoded(values[k], f"{where}.{k}") for k in ("clean", "triggered") if values.get(k) is not None}
        return cls(**values | pictures)


@dataclass
class Report:
    """Before and after: figures, pictures and provenance of one repair.

    Args:
        title: heading of the page.
        task: what the model does, such as `image-classification`.
        checkpoint, clean, test: what is known about the model, the clean data and the test data: name, revision, sizes.
        method: `name` and `config` of the method that the report is about.
        rows: the table.
        layers: one entry a neuron group, from input to output.
        curve: held-out accuracy by threshold: dicts with `threshold`, `removed`, `held_out_accuracy` and, where the
            trigger is known, `asr_oracle`.
        curve_chosen: the threshold that was chosen.
        samples: a few samples to look at.
        versions: version by package.
        seed, command, warnings: as run.
        created: UTC time, ISO 8601.

    Example:
        >>> report = Report(title="t", task="image-classification", rows=[Row("none", "unrepaired")])
        >>> Report.from_dict(report.to_dict()) == report
        True
    """

    title: str
    task: str
    checkpoint: dict[str, Any] = field(default_factory=dict)
    clean: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    layers: list[NeuronLayer] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    curve_chosen: float | None = None
    samples: list[Sample] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: str = FORMAT

    def to_dict(self, pixels: bool = False) -> dict[str, Any]:
        """JSON-able copy; NaN and infinity become None. The samples carry their pictures only with `pixels`."""
        samples = [s.to_dict(pixels) for s in self.samples]
        return {f.name: samples if f.name == "samples" else plain(getattr(self, f.name)) for f in fields(self)}

    def to_json(self, pixels: bool = False) -> str:
        return as_json(self.to_dict(pixels))

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another format, an unknown or missing key, or a value of the wrong type.
        """
        values = checked(cls, data, "report", FORMAT)
        for key, part in (("rows", Row.from_dict), ("samples", Sample.from_dict), ("layers", _layer)):
            values[key] = [part(item, f"{key}[{i}]") for i, item in enumerate(values.get(key, []))]
        return cls(**values)

    def attach(self, model: Any, index: Any = None, result: Any = None, push: Any = None) -> Report:
        """Keep the repaired model, its neuron index, the method's verdict and what pushes them with the report; none of it is saved."""
        self.__dict__["_live"] = (model, index, result, push)
        return self

    def push_to_hub(self, repository: str, **settings: Any) -> Uploaded:
        """Push the repaired checkpoint with its card and proofs; see `hf_purify.publishing.PushConfig` for the settings.

        Raises:
            ModelError: the report was read from a file; `hf_purify.push(folder, repository)` pushes its folder.
            PublishError: it should not be pushed, or cannot be.
        """
        return self._attached(3)(repository, **settings)

    @property
    def model(self) -> Any:
        """The model that the report is about.

        Raises:
            ModelError: the report was read from a file.
        """
        return self._attached(0)

    @property
    def index(self) -> Any:
        """The neuron index that `mask` and `scores` are aligned with."""
        return self._attached(1)

    @property
    def mask(self) -> Any:
        """What the method did to each neuron, `(N,)`."""
        return self._attached(2).mask

    @property
    def scores(self) -> Any:
        """Suspicion of each neuron, `(N,)`, higher = more suspicious."""
        return self._attached(2).scores

    def _attached(self, position: int) -> Any:
        value = self.__dict__.get("_live", (None,) * 4)[position]
        if value is None:
            raise ModelError("this report carries no model: it was read from a file, or no repair was run")
        return value

    @property
    def ordered(self) -> list[Row]:
        """The rows, the unrepaired model first."""
        return sorted(self.rows, key=lambda row: row.kind != "unrepaired")

    @property
    def triggers(self) -> list[str]:
        """Names of the triggers measured, in order of appearance."""
        return list(dict.fromkeys(name for row in self.ordered for part in (row.asr, row.robust_accuracy, row.der) for name in part))

    @property
    def before(self) -> Row | None:
        """The unrepaired row."""
        return next((row for row in self.rows if row.kind == "unrepaired"), None)

    @property
    def after(self) -> Row | None:
        """The row of the method that the report is about."""
        methods = [row for row in self.rows if row.kind == "method"]
        return next((row for row in methods if row.name == self.method.get("name")), methods[0] if methods else None)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence. A rate is said to be lowered only where the two 95 % intervals do not meet."""
        return rendering.verdict(self)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, every interval beside its figure."""
        return rendering.markdown(self)

    def table(self) -> Table:
        """The table for a terminal; it fits 80 columns with one trigger."""
        return rendering.terminal_table(self)

    def to_html(self) -> str:
        """A page that needs nothing else: no network, no script; light, dark and on paper."""
        return rendering.page(self)

    def save(self, folder: str | Path, pictures: Mapping[str, list[str]] | None = None) -> Path:
        """Write `report.json` and `report.html`; each replaces its predecessor whole or not at all.

        Args:
            pictures: what `rendering.pictures_of` has drawn, where that was done before.

        Raises:
            OutputError: the folder cannot be written.
        """
        texts = {"report.json": self.to_json(), "report.html": rendering.page(self, pictures)}
        return write_texts(Path(folder), texts, "report")


def read_report(folder: Path) -> Report:
    """The report in a folder.

    Raises:
        ConfigError: there is none, or it is none.
    """
    try:
        return Report.from_dict(json.loads((folder / "report.json").read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{folder}' has no readable report.json: {error}") from error


def _layer(data: Any, where: str) -> NeuronLayer:
    return NeuronLayer(**checked(NeuronLayer, data, where))
