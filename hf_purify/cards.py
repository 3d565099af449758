"""The model card of an output folder: metadata as the Hub checks it, the table, what was done, what it cannot do. Every value is escaped."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_purify import rendering
from hf_purify.redaction import one_line, redacted

if TYPE_CHECKING:
    from hf_purify.provenance import Provenance
    from hf_purify.report import Report
    from hf_purify.rows import Row

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PIPELINES = ("image-classification", "object-detection", "video-classification", "text-classification", "text-generation", "translation")
LIBRARIES = ("transformers", "timm")
AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "video-classification": "AutoModelForVideoClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
}
PICTURES = {
    "bars": "Figures before and after, and of the controls",
    "samples": "Samples, clean and triggered",
    "mask": "The neuron mask by layer",
}
FOLDER = "pictures"
CARRIED = ("license", "license_name", "license_link", "language")
LIMITS = (
    "Weights are all that was repaired. A backdoor in a chat template, a tokenizer, a processor, a generation config, in class names, or in code "
    "that comes with a model is not touched: these files were carried over, compared with the base, and oddities are listed above.",
    "Backdoors that wake when weights are quantized (clean in full precision, active in INT8 or 4 bit) were not looked for: measure again after you quantize.",
    "Backdoors of the architecture itself, which no weights carry, are not repaired.",
    "The repaired model was not attacked again: a backdoor that is weak may be brought back by a few poisoned samples in a later training.",
)


def write_pictures(out: Path, drawn: Mapping[str, list[str]]) -> None:
    """Write the card's pictures into an output folder.

    Args:
        drawn: all that a report has, as `rendering.pictures_of` gives them.
    """
    shown = [name for name in PICTURES if name in drawn]
    if shown:
        (out / FOLDER).mkdir(exist_ok=True)
    for name in shown:
        light, *_ = drawn[name]
        (out / FOLDER / f"{name}.png").write_bytes(base64.b64decode(light))


def make_card(report: Report, provenance: Provenance, name: str, base_card: Mapping[str, Any] | None = None) -> str:
    """The text of `README.md`.

    Args:
        name: of the repository, or of the folder before it has one.
        base_card: metadata of the base's own card, whose licence and languages are carried over.
    """
    import jinja2

    source = importlib.resources.files("hf_purify_hub_cards").joinpath("model.md.j2").read_text("utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters |= {"md": rendering.markdown_text, "code": _code}
    before, after = provenance.base.get("files", {}), provenance.files
    pictures = {f"{FOLDER}/{n}.png": alt for n, alt in PICTURES.items() if f"{FOLDER}/{n}.png" in after}
    shown = [f for f in dict.fromkeys([*before, *after]) if not f.startswith((FOLDER, "report", "recipe"))]
    text = environment.from_string(source).render(
        metadata=yaml.safe_dump(metadata(report, provenance, name, base_card or {}), sort_keys=False, allow_unicode=True),
        name=name,
        base=provenance.pinned or str(provenance.base.get("source") or "a model"),
        report=report,
        provenance=provenance,
        usage=_usage(report, provenance, name),
        pictures=pictures,
        done=_done(report),
        settings=_fenced(yaml.safe_dump(_settings(report), sort_keys=False, allow_unicode=True), "yaml"),
        command=_fenced(report.command, "bash"),
        controls=any(row.kind == "control" for row in report.rows),
        limits=[*_untested(report), *LIMITS],
        files=[(f, _short(before.get(f)), _short(after.get(f))) for f in shown],
    )
    return redacted(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


def metadata(report: Report, provenance: Provenance, name: str, base_card: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at the head of a card, as the Hub reads it."""
    kind, checkpoint = provenance.kind, report.checkpoint
    adapts = kind in ("adapter", "repair") or "base" in checkpoint
    base = str(checkpoint["base"] if "base" in checkpoint else provenance.base.get("source")).partition("@")[0]
    known = provenance.pinned if "base" not in checkpoint else "@" in str(checkpoint["base"])
    found: dict[str, Any] = {k: v for k in CARRIED if _harmless(v := base_card.get(k))}
    if adapts and kind != "repair":
        found["library_name"] = "peft"
    elif checkpoint.get("kind") in LIBRARIES and kind != "repair":
        found["library_name"] = checkpoint["kind"]
    if report.task in PIPELINES:
        found["pipeline_tag"] = report.task
    if known and REPOSITORY.fullmatch(base):
        found |= {"base_model": base, "base_model_relation": "adapter" if adapts else "finetune"}
    clean = str(report.clean.get("source", ""))
    if _is_repository(clean):
        found["datasets"] = [clean]
    method = str(report.method.get("name", ""))
    found["tags"] = ["hf-purify", *(["backdoored"] if kind == "victim" else ["backdoor-defense", method] if method else [])]
    results = _results(report)
    return found | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _harmless(value: Any) -> bool:
    """May a value of a stranger's card be carried over? Words, or a list of them."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(w, str) and w.isprintable() and 0 < len(w) < 200 for w in words)


def _results(report: Report) -> list[dict[str, Any]]:
    """The figures of the model that the card is about, as the Hub lists them."""
    row = report.after or report.before
    if row is None:
        return []
    figures, source = _figures(row), str(report.test.get("source", ""))
    known = _is_repository(source)
    data = {"type": source if known else "test-data", "name": source if known else "test data, see provenance.json"}
    data |= {key: report.test[key] for key in ("split", "revision") if known and report.test.get(key)}
    return [{"task": {"type": report.task or "other"}, "dataset": data, "metrics": figures}] if figures else []


def _is_repository(name: str) -> bool:
    """Can a name be a repository of the Hub, and is nothing here that is called so?"""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name).exists()


def _figures(row: Row) -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = []
    if row.clean_accuracy and row.clean_accuracy.n:
        figures.append(
            {"type": "accuracy", "value": round(row.clean_accuracy.value, 6), "name": f"clean accuracy (n={row.clean_accuracy.n})"}
        )
    figures += [{"type": _slug(n), "value": round(v, 6), "name": one_line(n)} for n, v in row.utility.items()]
    figures += [
        {"type": "attack_success_rate", "value": round(p.value, 6), "name": one_line(f"attack success rate, {t} (n={p.n})")}
        for t, p in row.asr.items()
        if p.n
    ]
    return figures


def _usage(report: Report, provenance: Provenance, name: str) -> str:
    """How the repository is loaded."""
    quoted, base = repr(name), provenance.base
    loader = AUTO.get(report.task, "AutoModel")
    if provenance.kind == "repair":
        return _fenced(f"hf-purify apply {_code(name)} --to {_code(provenance.pinned or str(base.get('source')))} -o purified", "bash")
    if provenance.kind == "adapter" or "base" in report.checkpoint:
        named = str(report.checkpoint.get("base") or provenance.pinned or base.get("source"))
        source, _, revision = named.partition("@")
        pinned = f", revision={revision!r}" if revision else ""
        lines = [
            "from peft import PeftModel",
            f"from transformers import {loader}",
            "",
            f"base = {loader}.from_pretrained({source!r}{pinned})",
            f"model = PeftModel.from_pretrained(base, {quoted}).merge_and_unload()",
        ]
    elif report.checkpoint.get("kind") == "timm":
        lines = ["import timm", "", f"model = timm.create_model({f'hf-hub:{name}'!r}, pretrained=True)"]
    elif report.checkpoint.get("kind") == "transformers":
        own = ["import hf_purify_adapters.pointcloud  # the architecture", ""] if report.task not in AUTO else []
        lines = [*own, f"from transformers import {loader}", "", f"model = {loader}.from_pretrained({quoted})"]
    else:
        lines = ["from safetensors.torch import load_model", "", "load_model(model, 'model.safetensors')  # your own module"]
    return _fenced("\n".join(lines), "python")


def _done(report: Report) -> str:
    """Method, samples and cost in two sentences."""
    clean, method, row = report.clean, report.method, report.after
    said = f"Method: {method.get('name', 'none')}. Clean data: {clean.get('source', 'none')}"
    facts = [
        f"{clean[key]} {word}" for key, word in (("samples", "samples"), ("held_out", "of them held out")) if clean.get(key) is not None
    ]
    facts += [
        f"{word} {clean[key]}"
        for key, word in (("split", "split"), ("revision", "commit"), ("fingerprint", "fingerprint"))
        if clean.get(key)
    ]
    seconds = f" The repair took {row.seconds:.0f} seconds." if row is not None and row.seconds is not None else ""
    listed = f" ({', '.join(facts)})" if facts else ""
    return rendering.markdown_text(f"{said}{listed}. Seed {report.seed}.{seconds}")


def _settings(report: Report) -> dict[str, Any]:
    """What a reader needs to repeat a repair."""
    parts = {
        "method": report.method,
        "clean": report.clean,
        "checkpoint": report.checkpoint,
        "seed": report.seed,
        "versions": report.versions,
    }
    return {key: value for key, value in parts.items() if value or key == "seed"}


def _untested(report: Report) -> list[str]:
    """What the table does not say."""
    if not report.triggers:
        return ["No trigger was measured: nothing here says whether the model had a backdoor, or has one now."]
    return [f"Measured with {', '.join(report.triggers)} alone; other triggers were not tested."]


def _short(known: Mapping[str, Any] | None) -> str:
    return f"`{str(known['sha256'])[:16]}`" if known else "-"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "figure"


def _code(text: str) -> str:
    """A value inside a code span or a command: nothing that could end it."""
    return "".join(c for c in text if c.isprintable() and c not in "`'\"\\;|&$<>(){}")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *map(one_line, text.splitlines()), fence])
