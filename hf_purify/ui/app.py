"""What happens on the page: buttons start and stop runs, the panel follows them, results are shown."""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hf_purify import catalogue
from hf_purify.errors import ConfigError, PurifyError
from hf_purify.ui import commands, parts
from hf_purify.ui.gate import OwnPageOnly
from hf_purify.ui.layout import Page, draw, theme
from hf_purify.ui.results import Ended, buttons, results
from hf_purify.ui.runs import DONE, Run, Runs

EVERY = 0.3  # seconds between two looks at a run
HOUR = 3600
Updates = dict[Any, Any]
STALE = {"scan": ("repair", "again"), "repair": ("again",), "again": ()}  # what is no longer shown when a run of that kind has ended well


def build(runs: Runs) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="hf-purify", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as blocks:
        Events(draw(), runs).connect(blocks)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int | None, browser: bool) -> str:
    """Serve the page; returns its address.

    Raises:
        ConfigError: the port is taken.
    """
    guards = [Middleware(OwnPageOnly)]
    if host == "127.0.0.1":  # a name that a stranger's DNS server leads here is none of ours
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]))
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            app_kwargs={"middleware": guards},
            theme=theme(),
            css=importlib.resources.files("hf_purify.ui").joinpath("style.css").read_text("utf-8"),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            footer_links=[],
        )
    except OSError as error:
        raise ConfigError(f"port {port or 'from 7860 on'} cannot be had: {error}; name another one (--port)") from error
    return address


class Events:
    """What the buttons of a page do.

    Args:
        page: its components.
        runs: where runs are started.
    """

    def __init__(self, page: Page, runs: Runs) -> None:
        self.page, self.runs = page, runs

    def connect(self, blocks: gr.Blocks) -> None:
        page, panel, about = self.page, self.page.panel, catalogue.methods()
        given = {page.session, *vars(page.inputs).values(), page.scan.suspects}
        given |= {getattr(page.repair, name) for name in ("method", "settings", "controls", "begin", "test", "trigger", "target", "rule")}
        outputs = [page.session, *vars(panel).values(), page.scan.button, page.scan.result, page.scan.page, page.scan.findings]
        outputs += [getattr(page.repair, name) for name in ("begin", "button", "result", "page", "pack", "checkpoint")]
        outputs += vars(page.compare).values()
        how: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        for button, begin in ((page.scan.button, self.scan), (page.repair.button, self.repair), (page.compare.button, self.again)):
            button.click(begin, given, outputs, **how)
        panel.stop.click(self.stop, page.session, panel.stop, **how)
        page.repair.pack.click(self.pack, page.session, page.repair.checkpoint, **how | {"show_progress": "full"})
        blocks.load(self.resume, page.session, [*outputs, *vars(page.inputs).values()], **how)
        page.repair.method.change(lambda name: parts.text(about[name]), page.repair.method, page.repair.about, **how)

    async def scan(self, values: Updates) -> AsyncIterator[Updates]:
        async for update in self._begin("scan", values, self._scan):
            yield update

    async def repair(self, values: Updates) -> AsyncIterator[Updates]:
        async for update in self._begin("repair", values, self._purify):
            yield update

    async def again(self, values: Updates) -> AsyncIterator[Updates]:
        async for update in self._begin("again", values, self._scan_again):
            yield update

    def stop(self, session: Any) -> Updates:
        if run := self._found(session, "current"):
            run.stop()
        return gr.update(interactive=False)

    def pack(self, session: Any) -> Any:
        """Put the repaired checkpoint into a zip; weights do not shrink, so nothing is compressed."""
        run, button = self._found(session, "repair"), self.page.repair.checkpoint
        if run is None:
            raise gr.Error("There is no repaired checkpoint; repair a model first.")
        with tempfile.TemporaryDirectory(dir=self.runs.folder, prefix=".zip-") as folder:
            packed = Path(folder) / f"{run.output.name}.zip"
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(run.output.rglob("*")):
                    archive.write(file, Path(run.output.name) / file.relative_to(run.output))
            size = packed.stat().st_size
            copied = button.move_resource_to_block_cache(packed)
        return gr.update(value=copied, label=f"Download {run.output.name}.zip ({size / 1e6:,.1f} MB)", interactive=True)

    def _request(self, values: Updates) -> commands.Request:
        given = {name: values[field] for name, field in vars(self.page.inputs).items()}
        return commands.Request(**given | {"device": given["device"] or ""}).checked(self.runs.public)

    def _scan(self, values: Updates, output: Path) -> list[str]:
        return commands.scan(self._request(values), output, values[self.page.scan.suspects], self.runs.public)

    def _purify(self, values: Updates, output: Path) -> list[str]:
        tab, request = self.page.repair, self._request(values)
        known = commands.KnownTrigger(values[tab.test], values[tab.trigger], values[tab.target], values[tab.rule])
        scanned = self._found(values[self.page.session], "scan") if values[tab.begin] else None
        if scanned and scanned.model != request.model:
            raise ConfigError(
                f"the scan is one of '{scanned.model}': scan '{request.model}' first, or do not begin with what the scan found"
            )
        begin = scanned.output if scanned else None
        given = known.arguments(self.runs.public)
        return commands.purify(request, output, values[tab.method], values[tab.settings], given, begin, values[tab.controls])

    def _scan_again(self, values: Updates, output: Path) -> list[str]:
        repaired = self._found(values[self.page.session], "repair")
        if repaired is None:
            raise ConfigError("there is no repaired checkpoint to scan; repair a model first")
        request = self._request(values)
        return commands.scan(commands.Request(str(repaired.output), request.clean, request.samples, request.split, request.device), output)

    def _found(self, session: Any, kind: str) -> Run | None:
        """A run of this session. What the browser sends may be anything."""
        return self.runs.find(session.get(kind)) if isinstance(session, dict) else None

    async def _begin(self, kind: str, values: Updates, command: Callable[[Updates, Path], list[str]]) -> AsyncIterator[Updates]:
        """Start a run and follow it to its end; what cannot be run is said in the panel."""
        values = {field: "" if value is None and isinstance(field, gr.Textbox) else value for field, value in values.items()}
        session = values[self.page.session]
        going = self._found(session, "current")
        try:
            if going and not going.ended:
                raise ConfigError("a run of this page is under way: wait for its end, or stop it")
            run = self.runs.start(kind, values[self.page.inputs.model].strip(), functools.partial(command, values))
        except PurifyError as error:
            yield {self.page.panel.status: parts.refused(str(error)), self.page.panel.log: ""}
            return
        given = [values[field] for field in vars(self.page.inputs).values()]
        async for update in self.follow({**(session if isinstance(session, dict) else {}), "current": run.name, "given": given}):
            yield update

    async def resume(self, session: Any) -> AsyncIterator[Updates]:
        """Show a page that is loaded again what its session has, and follow its run."""
        given = session.get("given") if isinstance(session, dict) else None
        fields = dict(zip(vars(self.page.inputs).values(), given, strict=False)) if isinstance(given, list) else {}
        ended = self._ended(session)
        yield {**fields, **results(self.page, ended), **buttons(self.page, ended, busy=False)}
        async for update in self.follow(session):
            yield update

    async def follow(self, session: Any) -> AsyncIterator[Updates]:
        """Show the run of a session until it ends, and then what there is to see."""
        page, panel, run, seen = self.page, self.page.panel, self._found(session, "current"), None
        if run is None:
            return
        yield {page.session: session, **buttons(page, self._ended(session), busy=True)}
        while not run.ended:
            now = parts.status(run, self.runs.ahead(run)), "\n".join(run.screen.lines), gr.update(interactive=not run.stopping)
            if now != seen:
                yield dict(zip((panel.status, panel.log, panel.stop), now, strict=True))
            seen = now
            await asyncio.sleep(EVERY)
        if run.state == DONE:
            session = {k: v for k, v in session.items() if k not in STALE[run.kind]} | {run.kind: run.name}
        over = {panel.status: parts.status(run), panel.log: "\n".join(run.screen.lines), panel.stop: gr.update(interactive=False)}
        ended = self._ended(session)
        yield {page.session: session, **over, **results(page, ended), **buttons(page, ended, busy=False)}

    def _ended(self, session: Any) -> Ended:
        return Ended(*(self._found(session, kind) for kind in ("scan", "repair", "again")))
