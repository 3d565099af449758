"""Commands that meet the Hub: push a repair, lay one on its base, check one that somebody published."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_purify.cli.options import AsJson, Rule, Target, Test, Trigger
from hf_purify.cli.terminal import errors, quiet
from hf_purify.redaction import one_line

if TYPE_CHECKING:
    from hf_purify.uploading import Uploaded
    from hf_purify.verification import Verification

app = typer.Typer(no_args_is_help=True)
MANY = 20


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Output folder of `hf-purify purify`.")],
    repository: Annotated[str, typer.Argument(help="Where to: owner/name. It is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is made.")] = True,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request on a repository that exists.")] = False,
    repair_only: Annotated[bool, typer.Option("--repair-only", help="Push the mask without the weights: a few kilobytes.")] = False,
    backdoored: Annotated[bool, typer.Option("--backdoored", help="Push a victim of `implant`, which has a backdoor on purpose.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Push a repair that cost more than the tolerance.")] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Points of clean accuracy, or percent of another figure, that a repair may have cost.")
    ] = 2.0,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Push a repaired checkpoint to the Hub, with its card and proofs, in one commit. The token is that of `hf auth login` or HF_TOKEN.

    `hf-purify push purified me/model-purified`
    """
    with errors():
        quiet(as_json)
        from hf_purify import publishing

        settings: dict[str, Any] = {
            "private": private,
            "create_pr": create_pr,
            "repair_only": repair_only,
            "backdoored": backdoored,
            "force": force,
            "tolerance": tolerance,
            "message": message,
        }
        show_upload(publishing.push(folder, repository, **settings), as_json)


@app.command()
def apply(
    repair: Annotated[str, typer.Argument(help="A pushed repair: Hub id or folder.")],
    to: Annotated[str, typer.Option("--to", help="The base that it belongs to: id@commit, or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the repaired checkpoint.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the repair.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Lay a repair of a few kilobytes on the base that it belongs to.

    `hf-purify apply me/repair --to some-org/model@COMMIT -o purified`
    """
    with errors():
        quiet(False)
        from hf_purify import verification

        written = verification.apply(repair, to, output, revision=revision, overwrite=overwrite)
        typer.echo(f"written to {written}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A repaired checkpoint: Hub id or folder.")],
    base: Annotated[str | None, typer.Option("--base", help="What it was made from, if not what it names: id@commit, or a folder.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model.")] = None,
    test: Test = None,
    test_split: Annotated[str | None, typer.Option("--test-split", help="Split of the test data.")] = None,
    trigger: Trigger = None,
    rule: Rule = "all-to-one",
    target: Target = 0,
    as_json: AsJson = False,
) -> None:
    """Check a published repair against its base: which tensors changed, by what, and whether mask and base make it. Exit code 7 if not.

    `hf-purify verify me/model-purified`
    """
    with errors():
        quiet(as_json)
        from hf_purify import verification

        settings = {"test_split": test_split, "triggers": trigger or [], "rule": rule, "target": target}
        found = verification.verify(model, base=base, revision=revision, test=test, **(settings if test else {}))
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1))
        else:
            show_verification(found)
        if found.verdict == verification.DIFFERS:
            raise typer.Exit(7)


def show_upload(done: Uploaded, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), indent=1))
        return
    typer.echo(f"pushed to {done.url} (commit {done.commit[:12]})")
    if done.removed:
        typer.echo(f"the commit takes away what still held the old weights: {', '.join(done.removed)}")


def show_verification(found: Verification) -> None:
    """The verdict, the tensors in question, and what lies beside the weights."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    style = {"identical": "bold green", "consistent": "bold"}.get(found.verdict, "bold red")
    said = {
        "identical": "base and mask make these weights, bit for bit",
        "consistent": "the files are the recorded ones; the repair trained weights, so the mask alone does not make them",
        "differs": "this is not what its provenance says",
    }[found.verdict]
    console.print(f"[{style}]{found.verdict}[/]: {said}")
    console.print(f"{shown(found.model)}{f'@{found.revision}' if found.revision else ''} against {shown(found.base)}")
    console.print(f"{len(found.changed)} tensors changed; {found.removed:,} of {found.neurons:,} masked neurons removed")
    tensors = found.differing or found.changed
    if tensors:
        table = Table(
            "tensor", "what", "values", "of", "relative", show_edge=False, title="that differ" if found.differing else "that changed"
        )
        for key, d in list(tensors.items())[:MANY]:
            table.add_row(shown(key), d.what, f"{d.values:,}", f"{d.of:,}", "-" if d.relative is None else f"{d.relative:.3g}")
        console.print(table)
        if len(tensors) > MANY:
            console.print(f"and {len(tensors) - MANY} more (--json lists all)")
    for name in found.files:
        console.print(f"[red]not as recorded:[/] {shown(name)}")
    for name, what in found.companions.items():
        console.print(f"beside the weights, {shown(what)}: {shown(name)}")
    for oddity in found.oddities:
        console.print(f"to look at: {shown(oddity)}")
    for name, (recorded, measured) in found.figures.items():
        console.print(f"{shown(name)}: recorded {'-' if recorded is None else f'{recorded:.4f}'}, measured {measured:.4f}")


def shown(text: str) -> str:
    """A stranger's words on the terminal: no escapes, and no markup of ours."""
    from rich.markup import escape

    return escape(one_line(text))
