"""Publish what belongs to hf-purify itself: its metrics as Spaces that `evaluate.load` reads, its page as a Space, its results as a data set,
and a collection of all.

    python -m hf_purify_hub_cards.publish NAMESPACE [--private]

Each is one commit; what has not changed is not sent again.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from hf_purify.cli.scripts import run_guarded
from hf_purify.uploading import Item, Uploaded, collect, look, upload

TITLE = "hf-purify: backdoors, measured and repaired"
APP = """import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{repository}"))
"""
REQUIREMENTS = "hf-purify\nevaluate\n"
CARD = """---
license: apache-2.0
task_categories:
- image-classification
- text-classification
- object-detection
- video-classification
tags:
- backdoor-defense
- hf-purify
pretty_name: Results of hf-purify
configs:
- config_name: default
  data_files: results.parquet
---

# Results of hf-purify

A row is one repair of one backdoored model: {rows} in all, of {modalities}. Each figure has its `hits` and `n`; `low` and `high` bound its 95 % Wilson interval.
`kind` tells methods from controls and from the model before any repair; models called `none` as trigger carry no backdoor, and show what a repair costs.
`samples` are the clean samples that a method was given. No method saw a trigger. The recipes that make the rows come with hf-purify (`recipes/*/matrix.py`).
"""
FIGURES = ("clean_accuracy", "asr", "robust_accuracy")


def metrics() -> Iterator[Path]:
    """The folders of our metrics."""
    root = Path(str(importlib.resources.files("hf_purify_hub_cards"))) / "metrics"
    yield from sorted(p for p in root.iterdir() if (p / f"{p.name}.py").is_file())


def publish_metric(folder: Path, namespace: str, private: bool) -> Uploaded:
    """A metric as a Space: its module, its card, and the page that tries it."""
    repository = f"{namespace}/{folder.name}"
    files: dict[str, Path | bytes] = {name: folder / name for name in ("README.md", f"{folder.name}.py")}
    files |= {"app.py": APP.format(repository=repository).encode(), "requirements.txt": REQUIREMENTS.encode()}
    target = look(repository, "space")
    return upload(repository, files, f"Metric {folder.name}", target, private=private, kind="space", space_sdk="gradio")


def spaces() -> Iterator[Path]:
    """The folders of our other Spaces, each as it is published."""
    root = Path(str(importlib.resources.files("hf_purify_hub_cards"))) / "spaces"
    yield from sorted(p for p in root.iterdir() if (p / "app.py").is_file())


def publish_space(folder: Path, namespace: str, private: bool) -> Uploaded:
    """A Space whose files are all there: card, page and requirements."""
    repository = f"{namespace}/{folder.name}"
    files: dict[str, Path | bytes] = {name: folder / name for name in ("README.md", "app.py", "requirements.txt")}
    return upload(repository, files, f"Space {folder.name}", look(repository, "space"), private=private, kind="space", space_sdk="gradio")


def rows() -> Iterator[dict[str, Any]]:
    """All cells of the results of all modalities, flat."""
    root = Path(str(importlib.resources.files("hf_purify_recipes")))
    for file in sorted(root.glob("*/results.json")):
        for cell in json.loads(file.read_text("utf-8")):
            known = {"modality": file.parent.name} | {
                k: cell[k] for k in ("network", "trigger", "seed", "samples", "method", "kind", "der", "seconds")
            }
            for figure in FIGURES:
                known |= {f"{figure}_{part}": (cell.get(figure) or {}).get(part) for part in ("hits", "n", "low", "high")}
            yield known | {"utility": json.dumps(cell.get("utility") or {}), "notes": json.dumps(cell.get("notes") or {})}


def publish_results(namespace: str, private: bool) -> Uploaded:
    """The results of all modalities as one Parquet file with a card."""
    repository, found = f"{namespace}/hf-purify-results", list(rows())
    buffer = io.BytesIO()
    datasets.Dataset.from_list(found).to_parquet(buffer)
    card = CARD.format(rows=f"{len(found):,}", modalities=", ".join(dict.fromkeys(r["modality"] for r in found)))
    files: dict[str, Path | bytes] = {"README.md": card.encode(), "results.parquet": buffer.getvalue()}
    return upload(repository, files, "Results", look(repository, "dataset"), private=private, kind="dataset")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("namespace", help="user or organization")
    parser.add_argument("--private", action="store_true")
    chosen = parser.parse_args(arguments)
    run_guarded(lambda: publish(chosen.namespace, chosen.private))


def publish(namespace: str, private: bool) -> None:
    """Publish everything, and say where it is."""
    items = []
    for publish_one, folder in [(publish_metric, f) for f in metrics()] + [(publish_space, f) for f in spaces()]:
        done = publish_one(folder, namespace, private)
        items.append(Item(done.repository, "space"))
        sys.stdout.write(f"{done.url}\n")
    done = publish_results(namespace, private)
    sys.stdout.write(f"{done.url}\n")
    sys.stdout.write(f"{collect(TITLE, namespace, [Item(done.repository, 'dataset'), *items], private)}\n")


if __name__ == "__main__":
    main()
