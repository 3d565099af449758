"""What there is to see and to fetch of runs that ended well, and which buttons there are then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from hf_purify.diagnosis import FILE, Diagnosis, read_diagnosis
from hf_purify.errors import PurifyError
from hf_purify.report import read_report
from hf_purify.ui import parts
from hf_purify.ui.layout import Page
from hf_purify.ui.runs import Run

REPORT = "report.html"


@dataclass(frozen=True)
class Ended:
    """The runs of a session that ended well, each the last of its kind.

    Args:
        scan: of the model as it came.
        repair: of that model.
        again: the scan of what the repair made.
    """

    scan: Run | None = None
    repair: Run | None = None
    again: Run | None = None


def results(page: Page, ended: Ended) -> dict[Any, Any]:
    """What the panels show."""
    return {
        page.scan.result: _shown(ended.scan, _scanned),
        page.scan.page: _download(page.scan.page, ended.scan, REPORT),
        page.scan.findings: _download(page.scan.findings, ended.scan, FILE),
        page.repair.result: _shown(ended.repair, _repaired),
        page.repair.page: _download(page.repair.page, ended.repair, REPORT),
        page.repair.checkpoint: gr.update(value=None, label="Download the checkpoint (zip)", interactive=False),
        page.compare.scans: _shown(
            ended.scan or ended.again, lambda _: parts.side_by_side(_diagnosis(ended.scan), _diagnosis(ended.again))
        ),
        page.compare.table: _shown(ended.repair, lambda run: parts.before_and_after(read_report(run.output))),
    }


def buttons(page: Page, ended: Ended, busy: bool) -> dict[Any, Any]:
    """Which buttons can be pressed.

    Args:
        busy: a run of this session is under way.
    """
    begin = gr.update(interactive=True) if ended.scan else gr.update(interactive=False, value=False)
    return {
        page.scan.button: gr.update(interactive=not busy),
        page.repair.button: gr.update(interactive=not busy),
        page.repair.begin: begin,
        page.repair.pack: gr.update(interactive=ended.repair is not None),
        page.compare.button: gr.update(interactive=ended.repair is not None and not busy),
    }


def _shown(run: Run | None, show: Callable[[Run], Markup]) -> Markup:
    """What there is to see of a run; one that cannot be read says why."""
    if run is None:
        return Markup("")
    try:
        return show(run)
    except (PurifyError, OSError) as error:
        return parts.refused(str(error), "The result cannot be read.")


def _scanned(run: Run) -> Markup:
    found = read_diagnosis(run.output)
    return parts.sentence(found.verdict, found.suspicious) + parts.frame(run.output / REPORT, "What the scan found")


def _repaired(run: Run) -> Markup:
    report = read_report(run.output)
    return parts.sentence(report.verdict) + parts.before_and_after(report) + parts.frame(run.output / REPORT, "Report of the repair")


def _diagnosis(run: Run | None) -> Diagnosis | None:
    return read_diagnosis(run.output) if run else None


def _download(button: gr.DownloadButton, run: Run | None, name: str) -> Any:
    """A button for a file of a run, which is copied to where the server may read."""
    file = run.output / name if run else None
    if file is None or not file.is_file():
        return gr.update(value=None, interactive=False)
    return gr.update(value=button.move_resource_to_block_cache(file), interactive=True)
