"""Options that commands share, and how what was given on the command line becomes settings of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_purify.errors import ConfigError
from hf_purify.recipe import SINGULAR
from hf_purify.specs import parse_value

Test = Annotated[str | None, typer.Option("--test", help="Labelled test data for the figures. No method ever sees it.")]
Trigger = Annotated[
    list[str] | None,
    typer.Option("--trigger", "-t", help="Trigger to measure with, as name or name:option=value,... Repeatable. No method ever sees it."),
]
Rule = Annotated[str, typer.Option("--rule", help="Target rule: all-to-one, all-to-all or clean-label.")]
Target = Annotated[int, typer.Option("--target", help="Target class of the attack.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]

PLURALS = {option: setting for setting, option in SINGULAR.items()}


def _shared(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for the result; written under another name and renamed when complete.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe; options given on the command line win.", exists=True, dir_okay=False)
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="For a LoRA its base model: folder or Hub id, or id@revision.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the clean or training data.")] = None,
    test_split: Annotated[str | None, typer.Option("--test-split", help="Split of the test data.")] = None,
    test_samples: Annotated[
        int | None, typer.Option("--test-samples", help="Test samples at most, class-balanced; all if not given.")
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read data as streams: nothing is downloaded but what is looked at.")
    ] = False,
    stream_rows: Annotated[int, typer.Option("--stream-rows", help="Rows of a stream to look at, at most.")] = 100_000,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Modality; told by the checkpoint if not given.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="A column, where several could be meant, as role=name: label=target. Repeatable.")
    ] = None,
    to_rgb: Annotated[bool, typer.Option("--to-rgb", help="Repeat grey images over three channels.")] = False,
    template: Annotated[str | None, typer.Option("--template", help="What stands around a text, with {text} in it.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens of a text at most.")] = None,
    cut: Annotated[int | None, typer.Option("--cut", help="Words of a plain text that are the prompt of a causal model.")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; chosen by accelerate if not given.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="no, bf16 or fp16; as accelerate was launched if not given.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run torch.compile on the model.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Lay images out channels-last.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Run layers again in the backward pass: less memory, more time.")
    ] = False,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Parts that a batch is run in, one after the other: less memory.")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", help="Steps between checkpoints beside the output; the same command goes on from the last."),
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option("--tracker", help="Experiment tracker: tensorboard, trackio, wandb, ... Repeatable.")
    ] = None,
    logging_dir: Annotated[str, typer.Option("--logging-dir", help="Folder of trackers that write files.")] = "logs",
    as_json: AsJson = False,
) -> None:
    """The options that jobs share; never called, only its signature is read."""


def with_shared(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command's `**shared` stand for the options of `_shared`, but for those named: typer sees one signature with all of them."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        shared = inspect.signature(_shared, eval_str=True).parameters
        before = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = own.replace(parameters=before + [p for n, p in shared.items() if n not in without])  # type: ignore[attr-defined]
        return command

    return extend


def _options(items: list[str]) -> dict[str, Any]:
    """Read `name=value` items; values are YAML scalars."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"expected name=value, got '{item}'")
        found[key.strip()] = parse_value(value, item)
    return found


def given_settings(context: typer.Context, arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line; all others come from the recipe file, or are the recipe's defaults."""
    given = {}
    for name, value in arguments.items():
        source = context.get_parameter_source(name)
        if value is not None and source is not None and source.name != "DEFAULT":
            given[PLURALS.get(name, name)] = _options(value) if name in ("option", "model_option", "column") else value
    return given
