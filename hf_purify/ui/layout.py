"""What is on the page: fields, buttons and panels, without what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from hf_purify import catalogue
from hf_purify.ui import parts

INTRO = (
    "Look for a backdoor in a model, repair it with a few clean samples, and compare. Weights are read from Safetensors only; "
    "no code of a model is run."
)
METHOD = "neural_cleanse"
RULES = ["all-to-one", "all-to-all", "clean-label"]


@dataclass(frozen=True)
class Inputs:
    """Model and data, and what belongs to both scan and repair."""

    model: Any
    clean: Any
    samples: Any
    split: Any
    device: Any


@dataclass(frozen=True)
class Panel:
    """The run that is under way."""

    status: Any
    stop: Any
    log: Any


@dataclass(frozen=True)
class ScanTab:
    suspects: Any
    button: Any
    result: Any
    page: Any
    findings: Any


@dataclass(frozen=True)
class RepairTab:
    method: Any
    about: Any
    settings: Any
    controls: Any
    begin: Any
    test: Any
    trigger: Any
    target: Any
    rule: Any
    button: Any
    result: Any
    page: Any
    pack: Any
    checkpoint: Any


@dataclass(frozen=True)
class CompareTab:
    button: Any
    scans: Any
    table: Any


@dataclass(frozen=True)
class Page:
    """All components; `session` keeps the names of the runs in the browser, so that a page that is loaded again goes on."""

    session: Any
    inputs: Inputs
    panel: Panel
    scan: ScanTab
    repair: RepairTab
    compare: CompareTab


def theme() -> gr.Theme:
    """Fonts of the system, so that nothing is fetched, and colors that are read easily in light and dark."""
    made = gr.themes.Default(primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return made.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
    )


def draw() -> Page:
    """Make the components, in the order in which they are seen."""
    session = gr.BrowserState({}, storage_key="hf-purify")
    gr.HTML(Markup("<h1>hf-purify</h1><p>{}</p>").format(INTRO))
    inputs = _inputs()
    panel = _panel()
    with gr.Tabs():
        with gr.Tab("1. Scan"):
            scan = _scan()
        with gr.Tab("2. Repair"):
            repair = _repair()
        with gr.Tab("3. Compare"):
            compare = _compare()
    return Page(session, inputs, panel, scan, repair, compare)


def _inputs() -> Inputs:
    with gr.Group():
        with gr.Row():
            model = gr.Textbox(label="Model", info="Checkpoint folder, or owner/name on the Hub", max_lines=1)
            clean = gr.Textbox(label="Clean data", info="Data set on the Hub, folder of images, or Parquet file", max_lines=1)
        with gr.Row():
            samples = gr.Number(label="Clean samples", info="Drawn class-balanced", value=500, precision=0, minimum=1, min_width=140)
            split = gr.Textbox(label="Split", info="Chosen by itself if empty", max_lines=1, min_width=140)
            device = gr.Dropdown(["", "cpu", "cuda"], label="Device", info="Chosen by itself if empty", value="", min_width=140)
    return Inputs(model, clean, samples, split, device)


def _panel() -> Panel:
    with gr.Row(elem_id="run"):
        status = gr.HTML(parts.IDLE, elem_id="status")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(label="Last lines of the run", lines=8, max_lines=16, interactive=False, elem_classes="hp-log")
    return Panel(status, stop, log)


def _scan() -> ScanTab:
    with gr.Accordion("I have samples to check", open=False):
        suspects = gr.Textbox(label="Suspects", info="Data whose samples are ranked by suspicion", max_lines=1)
    button = gr.Button("Scan", variant="primary")
    result = gr.HTML()
    with gr.Row():
        page = gr.DownloadButton("Download the page", interactive=False)
        findings = gr.DownloadButton("Download scan.json", interactive=False)
    return ScanTab(suspects, button, result, page, findings)


def _repair() -> RepairTab:
    with gr.Row():
        methods = catalogue.methods()
        method = gr.Dropdown(list(methods), label="Method", value=METHOD, info="What it does is said below")
        settings = gr.Textbox(label="Settings of the method", info="As name=value, one a line", lines=1, max_lines=6)
    about = gr.HTML(parts.text(methods[METHOD]), padding=True)
    with gr.Row():
        begin = gr.Checkbox(label="Begin with what the scan found", value=False, interactive=False)
        controls = gr.Checkbox(label="Show controls beside it", value=True)
    with gr.Accordion("I know the trigger", open=False):
        with gr.Row():
            test = gr.Textbox(label="Test data", info="Labelled; for the figures alone, no method sees it", max_lines=1)
            trigger = gr.Textbox(label="Trigger", info="As name or name:option=value,...", max_lines=1)
        with gr.Row():
            target = gr.Number(label="Target label", value=0, precision=0, minimum=0)
            rule = gr.Dropdown(RULES, label="Rule", value=RULES[0])
    button = gr.Button("Repair", variant="primary")
    result = gr.HTML()
    with gr.Row():
        page = gr.DownloadButton("Download the report", interactive=False)
        pack = gr.Button("Pack the repaired checkpoint", interactive=False)
        checkpoint = gr.DownloadButton("Download the checkpoint (zip)", interactive=False)
    return RepairTab(method, about, settings, controls, begin, test, trigger, target, rule, button, result, page, pack, checkpoint)


def _compare() -> CompareTab:
    gr.HTML("<p>Scan the repaired checkpoint with the same clean data, and see both scans side by side.</p>")
    button = gr.Button("Scan again", variant="primary", interactive=False)
    scans = gr.HTML()
    table = gr.HTML()
    return CompareTab(button, scans, table)
