"""What the documents say is true of the code: commands, options, links, cards, recipes, and the method shown in CONTRIBUTING.

`python tests/unit/test_docs.py` writes the README's table of methods anew from the methods' cards.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate import Accelerator

import hf_purify
import hf_purify.methods
from hf_purify.cli import app
from hf_purify.cli.options import PLURALS
from hf_purify.method import Context
from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe, Recipe
from hf_purify.registry import find, find_trigger, make_method, names
from hf_purify.specs import parse_spec, presets

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RECIPES = sorted(presets().values())
CARDS = {name: ROOT / "hf_purify" / "methods" / f"{name}.md" for name in names("method")}
CARDS = {name: card for name, card in CARDS.items() if card.with_suffix(".py").is_file()}  # not those of other packages
DOCUMENTS = [README, CONTRIBUTING, *(card for card in CARDS.values() if card.is_file())]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MARKED = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
NETWORKS = [(adapter, variant) for adapter in names("adapter") for variant in find("adapter", adapter).variants]

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
recipe_file = pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
method_name = pytest.mark.parametrize("name", CARDS)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for found, text in FENCE.findall(path.read_text("utf-8")) if found == language]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each `hf-purify` command line in a document's shell blocks, without the program's name."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "hf-purify":
                yield words[1:]


def method_table() -> str:
    """A row a method, read from its card; methods first, controls last."""
    lines = ["| Method | Changes | Trains | Cost |", "| --- | --- | --- | --- |"]
    for name in sorted(CARDS, key=lambda n: (find("method", n).control, n)):
        text = CARDS[name].read_text("utf-8")
        parts = [re.search(rf"^- \*\*{head}:\*\* (.+)$", text, re.MULTILINE) for head in ("Changes", "Trains", "Cost")]
        kind = " (control)" if find("method", name).control else ""
        cells = [part.group(1) if part else "?" for part in parts]
        lines.append(f"| [`{name}`](hf_purify/methods/{name}.md){kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_method_table() -> None:
    README.write_text(MARKED.sub(lambda m: m[1] + method_table() + m[2], README.read_text("utf-8")), "utf-8")


class TestCommandLines:
    @document
    def test_commands_and_options_exist(self, path: Path) -> None:
        for words in commands(path):
            self.check(words)

    def test_readme_shows_every_command(self) -> None:
        known = {name for name, command in typer.main.get_command(app).commands.items() if not command.hidden}  # type: ignore[attr-defined]
        shown = {words[0] for words in commands(README)}
        assert known <= shown, f"README shows no example of: {', '.join(sorted(known - shown))}"

    @pytest.mark.parametrize(("name", "recipe"), [("purify", PurifyRecipe), ("implant", ImplantRecipe), ("measure", MeasureRecipe)])
    def test_defaults_shown_are_those_of_the_recipe(self, name: str, recipe: type[Recipe]) -> None:
        """An option that is not given takes the recipe's default, so that is what `--help` must say."""
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        options = {p.name: p.default for p in command.params if p.name not in ("recipe", "as_json", "help")}

        defaults = {f.name: f.default for f in dataclasses.fields(recipe)}
        assert {PLURALS.get(o, o) for o in options} <= set(defaults)
        assert {o: d for o, d in options.items() if o not in PLURALS} == {o: defaults[o] for o in options if o not in PLURALS}

    @recipe_file
    def test_recipe_says_how_to_run(self, path: Path) -> None:
        lines = re.findall(r"^# \w+: hf-purify (.+)$", path.read_text("utf-8"), re.MULTILINE)
        assert lines, f"{path.name}: a comment line on top must say how to run it: `# Run: hf-purify ...`"
        for line in lines:
            self.check(shlex.split(line))

    @staticmethod
    def check(words: list[str]) -> None:
        """Parse a command line as typer does, without running it; settings of methods and triggers too."""
        line = shlex.join(["hf-purify", *words])
        group = typer.main.get_command(app)
        if words[0].startswith("--"):
            known = {option for parameter in group.params for option in parameter.opts}
            assert words[0] in known | {"--help"}, f"`{line}`: no option {words[0]}"
            return
        assert words[0] in group.commands, f"`{line}`: no command '{words[0]}'"  # type: ignore[attr-defined]
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        try:
            with command.make_context(words[0], words[1:]) as context:
                given: dict[str, Any] = context.params
        except Exception as error:
            pytest.fail(f"`{line}`: {getattr(error, 'message', error)}")
        known = [find("adapter", n)() for n in ([given["adapter"]] if given.get("adapter") else names("adapter"))]
        for spec in given.get("trigger") or ():
            name, settings = parse_spec(spec)
            fitting = [
                a for a in known if name in a.triggers() and settings.keys() <= inspect.signature(a.triggers()[name]).parameters.keys()
            ]
            assert fitting, f"`{line}`: no modality has a trigger {spec}"
            find_trigger(fitting[0], name, **settings)
        if "method" in given:
            options = dict(item.split("=", 1) for item in given.get("option") or ())
            for part in given["method"].split("+"):
                fields = {f.name for f in dataclasses.fields(find("method", part).config_class)}
                mine = {key.removeprefix(f"{part}.") for key in options if "+" not in given["method"] or key.startswith(f"{part}.")}
                assert mine <= fields, f"`{line}`: {part} has no option {', '.join(sorted(mine - fields))}"


class TestPython:
    @document
    def test_imports_and_settings_exist(self, path: Path) -> None:
        settings = {"purify": PurifyRecipe, "implant": ImplantRecipe, "measure": MeasureRecipe}
        for block in blocks(path, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_purify"):
                    module = importlib.import_module(node.module or "")
                    missing = [a.name for a in node.names if not hasattr(module, a.name)]
                    assert not missing, f"{path.name}: {node.module} has no {', '.join(missing)}"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in settings:
                    known = {f.name for f in dataclasses.fields(settings[node.func.id])}
                    strange = {k.arg for k in node.keywords if k.arg} - known
                    assert not strange, f"{path.name}: {node.func.id}() has no setting {', '.join(sorted(strange))}"

    def test_public_names_are_importable(self) -> None:
        assert all(hasattr(hf_purify, name) for name in hf_purify.__all__)


class TestLinks:
    @document
    def test_relative_links_exist(self, path: Path) -> None:
        links = [link.partition("#")[0] for link in LINK.findall(path.read_text("utf-8")) if not re.match(r"[a-z]+:|#", link)]
        missing = [link for link in links if not (path.parent / link).exists()]
        assert not missing, f"{path.name} links to what is not there: {', '.join(missing)}"

    def test_picture_is_small(self) -> None:
        assert (ROOT / "docs" / "demo.png").stat().st_size < 200_000


class TestRecipes:
    @recipe_file
    def test_reads_and_builds_its_method(self, path: Path) -> None:
        recipe = PurifyRecipe.read(path)
        assert make_method(recipe.method, **recipe.options).name == recipe.method
        adapter = find("adapter", recipe.adapter or path.parent.name)()
        for spec in recipe.triggers:
            name, settings = parse_spec(spec)
            find_trigger(adapter, name, **settings)


class TestCards:
    @method_name
    def test_every_method_has_a_card(self, name: str) -> None:
        assert CARDS[name].is_file(), f"{name} needs a card: hf_purify/methods/{name}.md"
        text = CARDS[name].read_text("utf-8")
        for head in ("- **Changes:** ", "- **Trains:** ", "- **Cost:** ", "## Attribution"):
            assert head in text, f"{CARDS[name].name} must contain '{head}'"
        assert find("method", name).card() == text

    @method_name
    def test_settings_of_the_card_exist(self, name: str) -> None:
        cells = re.findall(r"^\| (`[^|]+) \|", CARDS[name].read_text("utf-8"), re.MULTILINE)
        named = {setting for cell in cells for setting in re.findall(r"`(\w+)`", cell)}
        strange = named - {f.name for f in dataclasses.fields(find("method", name).config_class)}
        assert not strange, f"{CARDS[name].name} speaks of settings that {name} has not: {', '.join(sorted(strange))}"

    def test_readme_table_is_that_of_the_cards(self) -> None:
        found = MARKED.search(README.read_text("utf-8"))
        assert found, "README must hold <!-- methods --> ... <!-- /methods -->"
        assert method_table() in found[0], "the README's table of methods is old: run `python tests/unit/test_docs.py`"


@pytest.fixture(scope="module")
def own_method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The method of CONTRIBUTING, dropped as one file, with its card, into a folder of the methods' package."""
    section = CONTRIBUTING.read_text("utf-8").partition("## Your own method in one file")[2]
    fenced = dict(reversed(FENCE.findall(section)))  # the first of each language
    name = re.search(r'^    name = "(\w+)"$', fenced["python"], re.MULTILINE)
    assert name, "the method in CONTRIBUTING has no name"
    folder = tmp_path_factory.mktemp("methods")
    for suffix, language in ((".py", "python"), (".md", "markdown"), (".yaml", "yaml")):
        (folder / f"{name[1]}{suffix}").write_text(fenced[language], "utf-8")
    hf_purify.methods.__path__.append(str(folder))
    importlib.invalidate_caches()
    yield name[1]
    hf_purify.methods.__path__.remove(str(folder))
    sys.modules.pop(f"hf_purify.methods.{name[1]}", None)
    vars(hf_purify.methods).pop(name[1], None)


class TestOwnMethod:
    @pytest.mark.parametrize(("adapter", "variant"), NETWORKS)
    def test_runs_on_every_network(self, own_method: str, adapter: str, variant: str) -> None:
        modality = find("adapter", adapter)()
        tiny = modality.tiny(variant)
        model, data = tiny.loaded.model, tiny.data
        index = modality.index(tiny.loaded, data.batch(torch.arange(2)))
        generator = torch.Generator().manual_seed(0)
        context = Context(model, modality, data, generator, Accelerator(cpu=True), "none", index, data, modality.outcomes(tiny.loaded))
        verdict = make_method(own_method)(context)
        assert verdict.scores.shape == verdict.mask.shape == (len(index),)
        assert set(verdict.mask.tolist()) <= {0.0, 1.0}
        assert verdict.notes["removed"] == int((verdict.mask == 0).sum())

    def test_is_found_with_card_and_recipe(self, own_method: str) -> None:
        method = find("method", own_method)
        folder = Path(sys.modules[method.__module__].__file__ or "").parent
        assert own_method in names("method")
        assert method.card().startswith("# ")
        recipe = PurifyRecipe.read(folder / f"{own_method}.yaml")
        assert make_method(recipe.method, **recipe.options).config.max_loss == 0.03  # type: ignore[attr-defined]

    def test_does_not_exist_already(self) -> None:
        code = blocks(CONTRIBUTING, "python")[0]
        assert not any(f'name = "{name}"' in code for name in CARDS), "CONTRIBUTING shows a method that the tree has; show another"


if __name__ == "__main__":
    write_method_table()
