"""What a repair did, before and after: the `Report`. The command line prints it, a Hub card shows it, and nothing else is shown."""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_purify.errors import ConfigError, ModelError, OutputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from hf_purify.metrics import Proportion
    from hf_purify.neurons import NeuronGroup

FORMAT = "hf-purify-report/1"
KINDS = ("unrepaired", "method", "control", "oracle", "other")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
REMOVED = 0.01
BINS = 256
TEXT_COLUMNS = ("Model", "Trigger")
DASH = "\u2013"


@dataclass
class Row:
    """One line of the table: a model and how it fared.

    Args:
        name: `none`, or the name of the method or control.
        kind: `unrepaired`, `method`, `control`, `oracle` (chosen with the trigger known) or `other`.
        clean_accuracy: on clean test samples.
        asr: attack success rate by trigger name; empty where no trigger is known.
        robust_accuracy: share of triggered samples given their true label, by trigger name.
        der: defense effectiveness rating in 0..1 by trigger name; empty in the unrepaired row.
        seconds: wall time of the repair.
        notes: what else is known: the chosen threshold, where it stopped, `mcnemar_p` against the unrepaired model.
    """

    name: str
    kind: str
    clean_accuracy: Proportion | None = None
    asr: dict[str, Proportion] = field(default_factory=dict)
    robust_accuracy: dict[str, Proportion] = field(default_factory=dict)
    der: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"row '{self.name}': unknown kind '{self.kind}'{did_you_mean(self.kind, KINDS)} (known: {', '.join(KINDS)})")

    @property
    def label(self) -> str:
        """The name, with the kind where it is not an ordinary method."""
        return self.name if self.kind in ("method", "other") else f"{self.name} ({self.kind})"

    @classmethod
    def from_dict(cls, data: Any, where: str = "row") -> Row:
        values = _checked(cls, data, where)
        if values.get("clean_accuracy") is not None:
            values["clean_accuracy"] = _proportion(values["clean_accuracy"], f"{where}.clean_accuracy")
        for key in ("asr", "robust_accuracy"):
            values[key] = {name: _proportion(p, f"{where}.{key}.{name}") for name, p in values.get(key, {}).items()}
        return cls(**values)


@dataclass
class NeuronLayer:
    """One neuron group, summarised.

    Args:
        name, role, block, size: as in `NeuronGroup`.
        removed: neurons whose mask is at most 0.01.
        mean_mask: mean of the mask, 0..1.
        mask: the mask, or means over at most 256 runs of neighbouring neurons.
        scores: quantiles 0, .05, .25, .5, .75, .95 and 1 of the scores; empty where none is finite.
    """

    name: str
    role: str
    block: int
    size: int
    removed: int
    mean_mask: float
    mask: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, group: NeuronGroup, mask: Any, scores: Any) -> NeuronLayer:
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
        )


@dataclass
class Sample:
    """One sample as a person would look at it: clean and triggered, with the predictions before and after the repair.

    Args:
        trigger: name of the trigger.
        label, target: true class and the class that the attacker wants.
        clean_before, clean_after, triggered_before, triggered_after: predicted classes.
        clean, triggered: pictures `(H, W, 3)` or `(H, W)` of uint8; None where the modality has none.
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

    def to_dict(self, pixels: bool = False) -> dict[str, Any]:
        """JSON-able; with `pixels` the pictures come along as base64 PNG."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("clean", "triggered")}
        pictures = {"clean": self.clean, "triggered": self.triggered} if pixels else {}
        return out | {name: _encode(picture) for name, picture in pictures.items() if picture is not None}

    @classmethod
    def from_dict(cls, data: Any, where: str = "sample") -> Sample:
        values = _checked(cls, data, where)
        pictures = {k: _decode(values[k], f"{where}.{k}") for k in ("clean", "triggered") if values.get(k) is not None}
        return cls(**values | pictures)


class Cell(NamedTuple):
    """A figure and, beside or below it in smaller type, its interval."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


@dataclass
class Report:
    """Before and after: figures, pictures and provenance of one repair.

    Args:
        title: heading of the page.
        task: what the model does, such as `image-classification`.
        checkpoint, clean: what is known about the model and about the clean data: name, revision, sizes.
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
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: str = FORMAT

    def to_dict(self, pixels: bool = False) -> dict[str, Any]:
        """JSON-able copy; NaN and infinity become None. The samples carry their pictures only with `pixels`."""
        samples = [s.to_dict(pixels) for s in self.samples]
        return {f.name: samples if f.name == "samples" else _plain(getattr(self, f.name)) for f in fields(self)}

    def to_json(self, pixels: bool = False) -> str:
        return json.dumps(self.to_dict(pixels), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another format, an unknown or missing key, or a value of the wrong type.
        """
        if isinstance(data, Mapping) and data.get("format") != FORMAT:
            raise ConfigError(f"report: expected format '{FORMAT}', got {data.get('format')!r}; was it written by another version?")
        values = _checked(cls, data, "report")
        for key, part in (("rows", Row.from_dict), ("samples", Sample.from_dict), ("layers", _layer)):
            values[key] = [part(item, f"{key}[{i}]") for i, item in enumerate(values.get(key, []))]
        return cls(**values)

    def attach(self, model: Any, index: Any = None, result: Any = None) -> Report:
        """Keep the repaired model, its neuron index and the method's verdict with the report, for Python users; none of it is saved."""
        self.__dict__["_live"] = (model, index, result)
        return self

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
        value = self.__dict__.get("_live", (None, None, None))[position]
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
        before, after = self.before, self.after
        if before is None:
            return "The unrepaired model was not measured, so nothing is compared."
        if after is None:
            return _state(before)
        name = _display(after.name)
        pairs = [(t, before.asr.get(t), after.asr.get(t)) for t in self.triggers]
        attacks = [_attack_change(t, old, new) for t, old, new in pairs if old and new and old.n and new.n]
        accuracy = _accuracy_change(before.clean_accuracy, after.clean_accuracy)
        if attacks:
            others = ["; it " + attack.replace("the attack success rate", "that", 1) for attack in attacks[1:]]
            return f"{name} {attacks[0]}{''.join(others)}{'; it' if others else ' and'} {accuracy}."
        return f"{name} {accuracy}. No trigger was measured, so nothing is said here about a backdoor."

    def grid(self) -> tuple[list[str], list[tuple[Row, list[list[Cell]]]]]:
        """Headings and, for each row, its lines of cells: one line, or one a trigger where there are several."""
        triggers, rows = self.triggers, self.ordered
        many = len(triggers) > 1
        n_clean = _common(row.clean_accuracy for row in rows)
        n_asr, n_robust = (_common(p for row in rows for p in getattr(row, key).values()) for key in ("asr", "robust_accuracy"))
        heads = ["Model", f"Clean accuracy{_n(n_clean)}"]
        if triggers:
            of = "" if many else f" {_line(triggers[0])}"
            heads += ["Trigger"] * many + [f"ASR{of}{_n(n_asr)}", f"Robust accuracy{_n(n_robust)}", "DER"]
        heads.append("Seconds")
        lines = []
        for row in rows:
            kind = "" if row.label == row.name else f"({row.kind})"
            first, last = [Cell(_line(row.name), kind), _share(row.clean_accuracy, n_clean)], Cell(_number(row.seconds, ".1f"))
            attacks = [
                [Cell(_line(t))] * many
                + [_share(row.asr.get(t), n_asr), _share(row.robust_accuracy.get(t), n_robust), Cell(_percent(row.der.get(t)))]
                for t in triggers
            ]
            lines.append((row, [[*first, *attack, last] for attack in attacks or [[]]]))
        return heads, lines

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, every interval beside its figure."""
        heads, rows = self.grid()
        rule = ["---" if head in TEXT_COLUMNS else "---:" for head in heads]
        lines = [[str(cell) for cell in line] for _, lines in rows for line in lines]
        table = [[_markdown(cell) for cell in cells] for cells in (heads, *lines)]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (table[0], rule, *table[1:]))

    def table(self) -> Table:
        """The table for a terminal; it fits 80 columns with one trigger."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        heads, rows = self.grid()
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for head in heads:
            text = head in TEXT_COLUMNS
            words = Text(head.replace(" ", "\n"))
            table.add_column(words, justify="left" if text else "right", no_wrap=not text, min_width=12 if text else None, overflow="fold")
        for row, lines in rows:
            style = "bold" if row is self.after else ""
            for i, line in enumerate(lines):
                shown = [c if i == 0 or 2 <= j < len(line) - 1 else Cell("") for j, c in enumerate(line)]
                details = ["\n" + c.detail.replace(" (", "\n(") if c.detail else "" for c in shown]
                table.add_row(*(Text.assemble((c.text, style), (detail, "dim")) for c, detail in zip(shown, details, strict=True)))
        return table

    def to_html(self) -> str:
        """A page that needs nothing else: no network, no script; light, dark and on paper."""
        import jinja2

        source = importlib.resources.files("hf_purify_hub_cards").joinpath("report.html.j2").read_text("utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        heads, rows = self.grid()
        page = environment.from_string(source)
        return page.render(report=self, facts=_plain(self), heads=heads, rows=rows, pictures=_pictures(self), zip=zip)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html`; each replaces its predecessor whole or not at all.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        texts = {"report.json": self.to_json(), "report.html": self.to_html()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                _replace(folder / name, text)
        except OSError as error:
            raise OutputError(f"cannot write the report to '{folder}': {error}; name another folder") from error
        return folder


def _checked(cls: type, data: Any, where: str) -> dict[str, Any]:
    """Return a mapping's entries if they are fields of a dataclass and of the right plain types, else raise `ConfigError`."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")
    plain: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "list": list, "dict": dict}
    for key, f in known.items():
        if key not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{where}: missing key '{key}'")
            continue
        kind = str(f.type).partition("[")[0].partition(" ")[0]
        nullable = kind == "float"  # NaN is written as null
        if kind in plain and not (isinstance(data[key], plain[kind]) or (nullable and data[key] is None)):
            raise ConfigError(f"{where}.{key}: expected {f.type}, got {type(data[key]).__name__}")
    return dict(data)


def _layer(data: Any, where: str) -> NeuronLayer:
    return NeuronLayer(**_checked(NeuronLayer, data, where))


def _proportion(data: Any, where: str) -> Proportion:
    from hf_purify.metrics import Proportion

    derived = ("value", "low", "high")
    counts = {k: v for k, v in data.items() if k not in derived} if isinstance(data, Mapping) else data
    proportion = Proportion(**_checked(Proportion, counts, where))
    if not 0 <= proportion.hits <= proportion.n:
        raise ConfigError(f"{where}: expected 0 <= hits <= n, got hits={proportion.hits}, n={proportion.n}")
    return proportion


def _plain(value: Any) -> Any:
    """Only what JSON knows: tensors and arrays become lists, NaN and infinity None, anything else its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [_plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _encode(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _decode(text: Any, where: str) -> np.ndarray:
    import numpy as np
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: expected a PNG in base64; {error}") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(text: str) -> str:
    """One printable line: no line breaks, no terminal escapes."""
    return "".join(c if c.isprintable() else " " for c in text)


def _markdown(text: str) -> str:
    r"""Escape what Markdown or HTML would read: `a|b` becomes `a\|b`; `[93.5, 94.8]` is no link and stays as it is."""
    text = html.escape(text, quote=False)
    return re.sub(r"([\\`*|]|\](?=[(\[:]))", r"\\\1", text)


def _number(value: float | None, spec: str) -> str:
    return DASH if value is None or not math.isfinite(value) else format(value, spec)


def _percent(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _common(proportions: Iterable[Proportion | None]) -> int | None:
    """The number of samples, where it is one and the same everywhere."""
    counts = {p.n for p in proportions if p is not None}
    return counts.pop() if len(counts) == 1 else None


def _n(n: int | None) -> str:
    return "" if n is None else f" (n={n})"


def _share(p: Proportion | None, n: int | None) -> Cell:
    """A proportion with its interval, and with its n unless the heading has it."""
    if p is None or not p.n:
        return Cell(DASH)
    low, high = p.interval
    return Cell(_percent(p.value), f"[{100 * low:.1f}, {100 * high:.1f}]{'' if n else _n(p.n)}")


def _display(name: str) -> str:
    """Short method names are acronyms: `nft+fine_tune` reads `NFT+fine_tune`."""
    return "+".join(part.upper() if len(part) <= 4 else part for part in _line(name).split("+"))


def _state(row: Row) -> str:
    attacks = [f"{_line(t)} succeeds on {_percent(p.value)} of triggered samples{_n(p.n)}" for t, p in row.asr.items() if p.n]
    accuracy = row.clean_accuracy
    known = [f"classifies {_percent(accuracy.value)} of clean samples correctly{_n(accuracy.n)}"] if accuracy and accuracy.n else []
    return f"The unrepaired model {'; '.join(known + attacks) or 'was not measured'}."


def _attack_change(trigger: str, before: Proportion, after: Proportion) -> str:
    old, new, of = _percent(before.value), _percent(after.value), f"the attack success rate of {_line(trigger)}"
    if after.interval[1] < before.interval[0]:
        return f"lowered {of} from {old} to {new}{_n(after.n)}"
    if after.interval[0] > before.interval[1]:
        return f"raised {of} from {old} to {new}{_n(after.n)}"
    return f"did not measurably change {of} ({old} before, {new} after, n={after.n})"


def _accuracy_change(before: Proportion | None, after: Proportion | None) -> str:
    if not (before and after and before.n and after.n):
        return "was not measured on clean samples"
    points = 100 * (after.value - before.value)
    if abs(points) < 0.05:
        return "left clean accuracy as it was"
    return f"{'gained' if points > 0 else 'cost'} {abs(points):.1f} points of clean accuracy"


def _pictures(report: Report) -> dict[str, list[str]]:
    """What there is to show: name -> base64 PNG, light and dark."""
    from hf_purify import pictures

    rows = [row for row in report.ordered if row.clean_accuracy or row.asr]
    samples = [s for s in report.samples if s.clean is not None and s.triggered is not None]
    scored = [layer for layer in report.layers if layer.scores]
    draw = {
        "bars": partial(pictures.bars_figure, rows) if rows else None,
        "samples": partial(pictures.samples_figure, samples) if samples else None,
        "curve": partial(pictures.curve_figure, report.curve, report.curve_chosen) if report.curve else None,
        "mask": partial(pictures.mask_figure, report.layers) if report.layers else None,
        "scores": partial(pictures.salience_figure, scored) if scored else None,
    }
    return {name: [base64.b64encode(figure(dark=dark)).decode() for dark in (False, True)] for name, figure in draw.items() if figure}
