"""The pictures of a report as PNG bytes: pure functions on figures of their own, so that no global matplotlib state is touched."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_purify.redaction import lines, short

if TYPE_CHECKING:
    from hf_purify.report import NeuronLayer, Sample
    from hf_purify.rows import Row

WIDTH = 10.0
LIMIT = 200_000
SAMPLES = 12


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; the four that carry meaning are from the colour-blind-safe set of Okabe and Ito (2008)."""

    paper: str
    ink: str
    muted: str
    line: str
    before: str
    good: str
    attack: str
    removed: tuple[str, str, str]


LIGHT = Theme("#ffffff", "#1c2430", "#5b6675", "#d5dae1", "#9aa3af", "#0072b2", "#d55e00", ("#7a2500", "#e9a06a", "#edf1f5"))
DARK = Theme("#161b22", "#e6eaf0", "#9aa5b4", "#343c48", "#6b7685", "#56b4e9", "#f0833a", ("#ffb27d", "#8a4a22", "#232b36"))


def bars_figure(rows: Sequence[Row], dark: bool = False) -> bytes:
    """Clean accuracy, of models that have one, and ASR of each row, one panel for each, with 95 % Wilson intervals; the unrepaired model is grey."""
    theme = DARK if dark else LIGHT
    triggers = list(dict.fromkeys(name for row in rows for name in row.asr))
    judged = not triggers or any(row.clean_accuracy is not None for row in rows)
    panels = [("Clean accuracy", theme.good, [row.clean_accuracy for row in rows])] if judged else []
    panels += [(f"ASR, {short(name, 20)}", theme.attack, [row.asr.get(name) for row in rows]) for name in triggers]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(WIDTH, lines * (0.85 + 0.33 * len(rows)), theme)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for ax, (title, color, values) in zip(axes, panels, strict=False):
        _style(ax, theme, title)
        for y, (row, p) in enumerate(zip(rows, values, strict=True)):
            if p is None or not p.n:
                ax.text(1.5, y, "not measured", va="center", color=theme.muted, fontsize=8)
                continue
            first = row.kind == "unrepaired"
            value, low, high = (100 * x for x in (p.value, *p.interval))
            ax.barh(y, value, height=0.62, color=theme.before if first else color)
            whiskers = [[max(0.0, value - low)], [max(0.0, high - value)]]
            ax.errorbar(value, y, xerr=whiskers, color=theme.ink, elinewidth=1.1, capsize=2.5)
            edge = {"xy": (1, y), "xycoords": ax.get_yaxis_transform(), "xytext": (50, 0), "textcoords": "offset points"}
            ax.annotate(f"{value:.1f} %", **edge, va="center", ha="right", color=theme.ink, fontsize=9)
            if first:
                ax.axvline(value, color=theme.muted, linewidth=1, linestyle=":", zorder=0)
        ax.set_yticks(range(len(rows)), [short(row.label, 32, tail=10) for row in rows], color=theme.ink, fontsize=9.5)
        ax.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xticks=(0, 50, 100))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
        ax.grid(axis="x", color=theme.line, linewidth=0.7)
    for ax in axes[len(panels) :]:
        ax.remove()
    return _png(figure)


def samples_figure(samples: Sequence[Sample], dark: bool = False) -> bytes:
    """Pairs of pictures, clean and triggered, each with the prediction before and after; twelve pairs at most."""
    theme = DARK if dark else LIGHT
    samples = [s for s in samples if s.clean is not None and s.triggered is not None][:SAMPLES]
    names = [name for s in samples for name in (s.clean_before, s.clean_after, s.triggered_before, s.triggered_after)]
    columns, gap = 4 if max(map(len, names), default=0) <= 10 else 3, 0.08
    edge = (WIDTH / columns - gap - 0.22) / 2
    cell, lines = (WIDTH / columns, edge + 1.0), math.ceil(len(samples) / columns)
    width, height = WIDTH, lines * cell[1] + 0.35
    letters = int((edge - 0.5) / 0.06)
    figure = _figure(width, height, theme, layout=None)

    def write(x: float, y: float, text: str, color: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, color=color, va="top", **style)

    for i, sample in enumerate(samples):
        left, top = 0.05 + (i % columns) * cell[0], 0.08 + (i // columns) * cell[1]
        write(left, top, short(sample.label, 32), theme.ink, fontsize=10, fontweight="bold")
        pairs = (
            (sample.clean, "clean", sample.clean_before, sample.clean_after),
            (sample.triggered, sample.trigger, sample.triggered_before, sample.triggered_after),
        )
        for x, (picture, name, before, after) in zip((left, left + edge + gap), pairs, strict=True):
            write(x, top + 0.2, short(name, 19), theme.muted, fontsize=8.5)
            box = (x / width, 1 - (top + 0.38 + edge) / height, edge / width, edge / height)
            _show(figure.add_axes(box), np.asarray(picture))
            for y, when, prediction in ((0.44, "before", before), (0.61, "after", after)):
                sign, color = _sign(prediction, sample, theme)
                write(x, top + edge + y, when, theme.muted, fontsize=8)
                write(x + 0.41, top + edge + y, f"{sign} {short(prediction, letters)}", color, fontsize=8)
    write(0.05, height - 0.24, "✓ true class     ▲ the attacker's target     ✗ another class", theme.muted, fontsize=8.5)
    return _png(figure)


def curve_figure(curve: Sequence[dict[str, Any]], chosen: float | None = None, dark: bool = False) -> bytes:
    """Held-out clean accuracy against the threshold, with the chosen one marked; neurons removed on the second axis."""
    theme = DARK if dark else LIGHT
    points = sorted((p for p in curve if _finite(p.get("threshold"))), key=lambda p: p["threshold"])
    x = [p["threshold"] for p in points]
    marker = "o" if len(x) <= 40 else None
    figure = _figure(WIDTH, 3.7, theme)
    ax = figure.add_subplot()
    _style(ax, theme)
    second = ax.twinx()
    _style(second, theme)
    ax.set_zorder(second.get_zorder() + 1)
    ax.patch.set_visible(False)
    second.fill_between(x, [_value(p, "removed") for p in points], step="post", color=theme.muted, alpha=0.22, linewidth=0)
    second.set_ylim(bottom=0)
    second.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    second.set_ylabel("neurons removed (shaded)", color=theme.muted)
    accuracy = [100 * _value(p, "held_out_accuracy") for p in points]
    ax.plot(x, accuracy, color=theme.good, marker=marker, markersize=4, linewidth=2, clip_on=False, label="held-out clean accuracy")
    if any("asr_oracle" in p for p in points):
        asr = [100 * _value(p, "asr_oracle") for p in points]
        label = "ASR (oracle, not used for the choice)"
        ax.plot(x, asr, color=theme.attack, marker=marker, markersize=4, linestyle="--", clip_on=False, label=label)
    if chosen is not None and math.isfinite(chosen):
        ax.axvline(chosen, color=theme.ink, linewidth=1.3, linestyle=":", label=f"chosen: {chosen:g}")
    ax.set(ylim=(0, 104), xlabel="threshold")
    ax.set_ylabel("held-out accuracy", color=theme.ink)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    ax.grid(color=theme.line, linewidth=0.7)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9.5, labelcolor=theme.ink)
    return _png(figure)


def mask_figure(layers: Sequence[NeuronLayer], dark: bool = False) -> bytes:
    """The mask as a heat map: a line is a layer, along it its neurons; a removed neuron is dark, in the dark theme bright."""
    theme = DARK if dark else LIGHT
    colors = LinearSegmentedColormap.from_list("mask", theme.removed)
    figure = _figure(WIDTH, _height(layers), theme)
    legend, ax = figure.subplots(2, 1, height_ratios=(0.11, 0.21 * len(layers)))
    _style(ax, theme)
    for y, layer in enumerate(layers):
        strip = np.array([layer.mask or [1.0]], dtype=float)
        shown = ax.imshow(strip, cmap=colors, vmin=0, vmax=1, aspect="auto", extent=(0, 1, y + 0.44, y - 0.44), interpolation="nearest")
        style = {"color": theme.ink, "fontweight": "bold"} if layer.removed else {"color": theme.muted}
        ax.text(1.01, y, f"{layer.removed} of {layer.size}", va="center", fontsize=8.5, **style)
    ax.set(xlim=(0, 1), xticks=[], xlabel="neurons of the layer, in order")
    _layer_axis(ax, layers, theme)
    bar = figure.colorbar(shown, cax=legend, orientation="horizontal", ticklocation="top")
    bar.set_ticks([0, 0.5, 1], labels=["0: removed", "0.5", "1: kept"], color=theme.muted, fontsize=9)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    return _png(figure)


def salience_figure(layers: Sequence[NeuronLayer], dark: bool = False) -> bytes:
    """Scores by layer, drawn from their quantiles: box (25 to 75 %), median, whiskers (5 to 95 %), extremes."""
    theme = DARK if dark else LIGHT
    figure = _figure(WIDTH, _height(layers), theme)
    ax = figure.add_subplot()
    _style(ax, theme)
    for y, layer in enumerate(layers):
        if not layer.scores:
            continue
        lowest, low, first, median, third, high, highest = layer.scores
        ax.plot([low, high], [y, y], color=theme.good, linewidth=1.3)
        ax.barh(y, third - first, left=first, height=0.58, color=theme.good, alpha=0.45)
        ax.plot([median, median], [y - 0.29, y + 0.29], color=theme.ink, linewidth=1.6)
        ax.plot([lowest], [y], "o", color=theme.muted, markersize=3)
        ax.plot([highest], [y], "o", color=theme.attack, markersize=4)
    ax.use_sticky_edges = False
    _scale(ax, [q for layer in layers for q in layer.scores])
    ax.set_xlabel("score (higher: more suspicious)")
    ax.grid(axis="x", color=theme.line, linewidth=0.7)
    _layer_axis(ax, layers, theme)
    return _png(figure)


def change_figure(layers: Sequence[NeuronLayer], dark: bool = False) -> bytes:
    """How far training moved the weights of each layer, as a bar and a figure."""
    theme = DARK if dark else LIGHT
    figure = _figure(WIDTH, _height(layers), theme)
    ax = figure.add_subplot()
    _style(ax, theme)
    values = [100 * layer.change if layer.change is not None and math.isfinite(layer.change) else math.nan for layer in layers]
    ax.barh(range(len(layers)), values, height=0.58, color=theme.good)
    for y, value in enumerate(values):
        digits = ".2g" if value < 1 else ".1f" if value < 10 else ".0f"
        shown = f"{value:{digits}} %" if math.isfinite(value) else "from zero"
        ax.text(1.01, y, shown, va="center", color=theme.ink, fontsize=8.5, transform=ax.get_yaxis_transform())
    ax.set_xlim(left=0)
    ax.set_xlabel("change of the layer's weights, as a share of their norm")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    ax.grid(axis="x", color=theme.line, linewidth=0.7)
    _layer_axis(ax, layers, theme)
    return _png(figure)


def _figure(width: float, height: float, theme: Theme, layout: Literal["constrained"] | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), facecolor=theme.paper, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _style(ax: Axes, theme: Theme, title: str = "") -> None:
    ax.set_facecolor(theme.paper)
    ax.set_title(title, loc="left", color=theme.ink, fontsize=11, fontweight="bold")
    ax.tick_params(colors=theme.muted, labelsize=9, length=0)
    ax.xaxis.label.set_color(theme.muted)
    ax.spines[:].set_visible(False)
    ax.set_axisbelow(True)


def _height(layers: Sequence[NeuronLayer]) -> float:
    return 1.1 + 0.21 * len(layers)


def _layer_axis(ax: Axes, layers: Sequence[NeuronLayer], theme: Theme) -> None:
    ax.set_ylim(len(layers) - 0.4, -0.6)
    ax.set_yticks(range(len(layers)), [short(layer.name, 42, tail=20) for layer in layers], color=theme.ink, fontsize=8.5)


def _scale(ax: Axes, scores: Sequence[float]) -> None:
    """Linear, unless a few extremes would press everything else onto one line."""
    sizes = sorted(abs(s) for s in scores if s)
    if sizes and sizes[-1] > 50 * (typical := sizes[len(sizes) // 2]):
        ax.set_xscale("symlog", linthresh=typical)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _show(ax: Axes, picture: np.ndarray) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    ax.set_anchor("NW")
    ax.set_axis_off()


def _sign(prediction: str, sample: Sample, theme: Theme) -> tuple[str, str]:
    if prediction == sample.label:
        return "✓", theme.good
    return ("▲", theme.attack) if prediction == sample.target else ("✗", theme.ink)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _value(point: dict[str, Any], key: str) -> float:
    return float(point[key]) if _finite(point.get(key)) else math.nan


def _literal(artist: Artist) -> bool:
    """Take labels literally: a `$` in a class name is no formula, and a token is not shown."""
    if isinstance(artist, Text):
        artist.set_text(lines(artist.get_text()))
        artist.set_parse_math(False)
        artist.set_usetex(False)
    return False


def _png(figure: Figure) -> bytes:
    """Render; where the file would be large, with 256 colours and then with fewer dots."""
    from PIL import Image

    figure.findobj(_literal)
    for dpi in (120, 100, 80, 60):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
        if buffer.tell() > LIMIT:
            picture = Image.open(buffer).convert("RGB").quantize(256)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= LIMIT:
            break
    return buffer.getvalue()
