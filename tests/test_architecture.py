"""The rules that hold the tree together: which way imports run, one training loop, and what every plugin brings with it.

Everything is read from the files on disk; no list of plugins is kept here.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "hf_purify"
ADAPTERS = ROOT / "adapters"
METHODS = CORE / "methods"
IMPORT_NAMES = {
    "hf_purify": "hf_purify",
    "hf_purify_adapters": "adapters",
    "hf_purify_recipes": "recipes",
    "hf_purify_hub_cards": "hub_cards",
}

# A module imports from its own layer and from those below it. What is not named is APART: it serves the purifier, and no part of
# the method stack imports it.
LAYERS = [
    {"redaction"},
    {"errors", "files"},
    {"plain"},
    {"filenames", "headers", "limits"},
    {"configs"},
    {"weights"},
    {"room"},
    {"calibration", "neurons", "sharding"},
    {"metrics", "stand_in", "tracing", "twins"},
    {"adapter", "checkpointing", "discovery", "masks"},
    {"resuming", "sharing", "states", "tracking"},
    {"salience", "task", "triggers"},
    {"loop"},
    {"inversion", "routines"},
    {"method"},
    {"methods"},
    {"APART", "catalogue", "hub", "output", "pictures", "recipe", "registry", "rendering", "report", "specs", "tables"}
    | {"diagnosis", "findings", "sarif", "scan_page", "scan_pictures"},
    {"session"},
    {"bench", "clean"},
    {"comparison"},
    {"reporting"},
    {"purifier", "scanner"},
    {"callbacks", "demo", "sweep", "verification"},
    {"ui"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is `a.b` and `c`; `import a.b` is `a.b` and an empty name."""

    module: str
    name: str
    line: int
    typing_only: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    def within(self, *packages: str) -> bool:
        return any(f"{self.full}.".startswith(f"{p}.") for p in packages)


def python_files(*folders: Path) -> list[Path]:
    return sorted(f for folder in folders for f in folder.rglob("*.py"))


def ident(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression; calls and subscripts inside are looked through."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
        case ast.Call():
            return dotted(node.func)
        case ast.Subscript():
            return dotted(node.value)
    return ""


def module_name(path: Path) -> str:
    """The name under which a file of the checkout is imported."""
    names = {folder: name for name, folder in IMPORT_NAMES.items()}
    head, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([names[head], *(p for p in rest if p != "__init__")])


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Everything a file imports, also inside functions, and by `import_module` with a literal name."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[Import] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        match node:
            case ast.Import():
                found.extend(Import(a.name, "", node.lineno, typing_only) for a in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found.extend(Import(module, a.name, node.lineno, typing_only) for a in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if dotted(node.func).endswith(("import_module", "__import__")):
                found.append(Import(name, "", node.lineno, typing_only))
            case ast.If() if dotted(node.test).endswith("TYPE_CHECKING"):
                for child in node.body:
                    visit(child, True)
                for child in node.orelse:
                    visit(child, typing_only)
                return
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(tree(path), False)
    return tuple(found)


def core_module(found: Import) -> str | None:
    """The module of the core that an import means: `from hf_purify import hub` is `hub`, `hf_purify.methods.nft` is `methods`."""
    parts = found.full.split(".")
    if parts[0] != "hf_purify":
        return None
    if len(parts) > 1 and ((CORE / f"{parts[1]}.py").is_file() or (CORE / parts[1]).is_dir()):
        return parts[1]
    return "__init__"


def own_module(path: Path) -> str:
    """The module of the core that a file belongs to."""
    return path.relative_to(CORE).with_suffix("").parts[0]


def say(path: Path, problems: list[tuple[int, str]]) -> str:
    return "\n".join(f"{ident(path)}:{line}: {what}" for line, what in problems)


def check(path: Path, problems: Iterator[tuple[int, str]] | list[tuple[int, str]]) -> None:
    problems = list(problems)
    assert not problems, "\n" + say(path, problems)


CORE_FILES = python_files(CORE)
ADAPTER_FILES = python_files(ADAPTERS)
LIBRARY_FILES = CORE_FILES + ADAPTER_FILES
METHOD_FILES = [f for f in sorted(METHODS.glob("*.py")) if not f.name.startswith("_")]
SHIPPED_FILES = LIBRARY_FILES + python_files(ROOT / "recipes", ROOT / "hub_cards")

core_file = pytest.mark.parametrize("path", CORE_FILES, ids=ident)
adapter_file = pytest.mark.parametrize("path", ADAPTER_FILES, ids=ident)
library_file = pytest.mark.parametrize("path", LIBRARY_FILES, ids=ident)
method_file = pytest.mark.parametrize("path", METHOD_FILES, ids=ident)
shipped_file = pytest.mark.parametrize("path", SHIPPED_FILES, ids=ident)


class TestImportDirections:
    @core_file
    def test_core_imports_downwards(self, path: Path) -> None:
        own = own_module(path)
        rank = RANK.get(own, RANK["APART"])

        def problems() -> Iterator[tuple[int, str]]:
            for found in imports(path):
                other = core_module(found)
                if other and other != own and not found.typing_only and RANK.get(other, RANK["APART"]) > rank:
                    yield found.line, f"imports {found.full}, which lies above {own} (LAYERS in {Path(__file__).name})"

        check(path, problems())

    def test_core_has_no_import_cycle(self) -> None:
        graph: dict[str, set[str]] = {}
        for path in CORE_FILES:
            others = {core_module(found) for found in imports(path) if not found.typing_only}
            graph.setdefault(own_module(path), set()).update(o for o in others if o and o != own_module(path))
        graph.pop("__init__", None)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"modules of hf_purify import each other in a circle: {' <- '.join(error.args[1])}")

    @core_file
    def test_core_imports_no_adapter(self, path: Path) -> None:
        check(path, ((i.line, f"imports {i.full}; use the registry") for i in imports(path) if i.within("hf_purify_adapters")))

    @method_file
    def test_method_imports_no_modality_no_metrics_no_other_method(self, path: Path) -> None:
        above = [name for layer in LAYERS[LAYERS.index({"methods"}) + 1 :] for name in layer if name != "__init__"]
        closed = "adapter", "methods", "metrics", "triggers", *above
        forbidden = ["hf_purify_adapters", "transformers", "timm", "evaluate", "datasets", *(f"hf_purify.{name}" for name in closed)]
        check(path, ((i.line, f"a method must not import {i.full}") for i in imports(path) if i.within(*forbidden)))

    @adapter_file
    def test_adapter_imports_little_of_the_core(self, path: Path) -> None:
        allowed = {"calibration", "errors", "neurons", "discovery", "triggers", "metrics", "adapter", "stand_in", "tables", "room"}

        def problems() -> Iterator[tuple[int, str]]:
            for found in imports(path):
                module = core_module(found)
                if module and module not in allowed:
                    yield found.line, f"an adapter must not import {found.full}; it may use {', '.join(sorted(allowed))}"

        check(path, problems())

    @core_file
    def test_only_hub_reaches_the_network(self, path: Path) -> None:
        if path in (CORE / "hub.py", CORE / "tables.py", CORE / "uploading.py"):
            return
        closed = "huggingface_hub", "requests", "httpx", "urllib.request", "http.client", "socket"
        loads = re.compile(r"(^|\.)(from_pretrained|hf_hub_download|snapshot_download|load_dataset|create_model)$")
        calls = ((n.lineno, dotted(n.func)) for n in ast.walk(tree(path)) if isinstance(n, ast.Call))
        problems = [
            (i.line, f"imports {i.full}; only hub.py, uploading.py, tables.py and adapters may") for i in imports(path) if i.within(*closed)
        ]
        check(
            path,
            problems
            + [
                (line, f"calls {name}; only hub.py, uploading.py, tables.py and adapters may") for line, name in calls if loads.search(name)
            ],
        )

    @library_file
    def test_only_the_command_line_talks_to_a_terminal(self, path: Path) -> None:
        if path.is_relative_to(CORE / "cli"):
            return
        shows = [CORE / f"{name}.py" for name in ("findings", "rendering", "report")]
        renderables = ("rich.table", "rich.text", "rich.box", "rich.console.Group") if path in shows else ()

        def problems() -> Iterator[tuple[int, str]]:
            for found in imports(path):
                if found.within("typer", "click", "argparse", "rich") and not found.within(*renderables):
                    yield found.line, f"imports {found.full}; only the command line may"
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Call) and dotted(node.func) in {"print", "input", "exit", "quit", "pprint", "pprint.pprint"}:
                    yield node.lineno, f"calls {dotted(node.func)}(); only the command line may"
                if isinstance(node, ast.Call) and dotted(node.func) == "sys.exit" and path.name != "__main__.py":
                    yield node.lineno, "calls sys.exit(); only the command line may"
                if isinstance(node, ast.Attribute) and dotted(node) in {"sys.stdout", "sys.stderr", "sys.argv"}:
                    yield node.lineno, f"uses {dotted(node)}; only the command line may"

        check(path, problems())

    @pytest.mark.parametrize("module", ["hf_purify", "hf_purify.cli"])
    def test_import_is_light(self, module: str, tmp_path: Path) -> None:
        file = ROOT / module.replace(".", "/")
        if not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
            pytest.skip(f"there is no {module}")
        heavy = ["torch", "torchvision", "transformers", "timm", "accelerate", "peft", "datasets", "evaluate", "matplotlib", "scipy"]
        code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stdout.split(), f"`import {module}` imports {done.stdout.strip()}"


class TestOneTrainingLoop:
    @shipped_file
    def test_only_the_loop_steps_an_optimizer(self, path: Path) -> None:
        nodes = list(ast.walk(tree(path)))
        optimizer = re.compile(r"optim|(^|\.)opt$", re.IGNORECASE)
        bound = {
            dotted(target)
            for node in nodes
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and optimizer.search(dotted(node.value))
            for target in node.targets
        }
        steps = [
            (node.lineno, f"calls {dotted(node.func)}(); train() in hf_purify/loop.py is the only training loop")
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
            if optimizer.search(dotted(node.func.value)) or dotted(node.func.value) in bound
        ]
        if path == CORE / "loop.py":
            assert len(steps) == 1, f"loop.py must step an optimizer at one place, not {len(steps)}"
        else:
            check(path, steps)


class TestTree:
    def test_folders_that_are_packages(self) -> None:
        assert not (ADAPTERS / "__init__.py").exists(), "adapters/__init__.py would shadow AdapterHub's `adapters` from the repository root"
        for folder in ("recipes", "hub_cards"):
            assert (ROOT / folder / "__init__.py").is_file(), f"{folder} needs an __init__.py: importlib.resources in an editable install"

    def test_no_module_for_leftovers(self) -> None:
        folders = [ROOT / f for f in (*IMPORT_NAMES.values(), "benchmarks", "tests")]
        leftovers = {"common", "helper", "helpers", "misc", "util", "utils"}
        found = [ident(p) for f in folders for p in f.rglob("*") if p.stem.strip("_") in leftovers and (p.is_dir() or p.suffix == ".py")]
        assert not found, f"name modules after what they hold: {found}"


class TestHygiene:
    @library_file
    def test_no_asserts_no_pickles_no_remote_code_no_swallowed_errors(self, path: Path) -> None:
        def problems() -> Iterator[tuple[int, str]]:
            for found in imports(path):
                if found.within("pickle", "dill", "cloudpickle", "joblib"):
                    yield found.line, f"imports {found.full}: unpickling runs code"
            for node in ast.walk(tree(path)):
                match node:
                    case ast.Assert():
                        yield node.lineno, "assert is for tests; raise an error that says what to do"
                    case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                        yield node.value.lineno, "weights_only=False runs code from the file"
                    case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                        yield node.value.lineno, "trust_remote_code=True runs code from the Hub"
                    case ast.ExceptHandler(type=None):
                        yield node.lineno, "except without a type also swallows Ctrl-C"
                    case ast.ExceptHandler(body=[ast.Pass()]) if dotted(node.type) in {"Exception", "BaseException"}:
                        yield node.lineno, f"except {dotted(node.type)}: pass hides every error"

        check(path, problems())


def method_classes(path: Path) -> list[ast.ClassDef]:
    """Public classes of a method's file that are no configs: those with a `purify`, or a base whose name says method."""
    classes = [n for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    return [c for c in classes if any(isinstance(n, ast.FunctionDef) and n.name == "purify" for n in c.body)]


def recipe_methods() -> set[str]:
    """The methods that recipes name, each for itself."""
    contents = (yaml.safe_load(f.read_text("utf-8")) for f in (ROOT / "recipes").rglob("*.yaml"))
    return {str(c["method"]) for c in contents if isinstance(c, dict) and "method" in c}


class TestEveryMethod:
    @method_file
    def test_names_its_paper(self, path: Path) -> None:
        classes = method_classes(path)
        assert classes, f"{ident(path)} holds no class with a `purify`"
        paper = re.compile(r"arxiv[:.\s/\w]*\d{4}\.\d{4,5}|\bdoi\b|doi\.org/|\bReference:", re.IGNORECASE)
        check(
            path, [(c.lineno, f"{c.name}: the docstring names no paper") for c in classes if not paper.search(ast.get_docstring(c) or "")]
        )

    @method_file
    def test_has_a_card(self, path: Path) -> None:
        card = path.with_suffix(".md")
        assert card.is_file(), f"{ident(path)} needs a card: {ident(card)}"
        assert card.read_text("utf-8").lstrip().startswith("#"), f"{ident(card)} must begin with a heading"

    @method_file
    def test_has_a_recipe(self, path: Path) -> None:
        assert path.stem in recipe_methods(), f"no recipe under recipes/ says `method: {path.stem}`"

    def test_every_card_belongs_to_a_method(self) -> None:
        orphans = [ident(f) for f in METHODS.glob("*.md") if not f.with_suffix(".py").is_file()]
        assert not orphans, f"cards without a method: {orphans}"


class TestNoHandKeptList:
    @pytest.mark.parametrize(("kind", "folder"), [("method", METHODS), ("adapter", ADAPTERS)])
    def test_names_are_the_files_on_disk(self, kind: str, folder: Path) -> None:
        if not (CORE / "registry.py").is_file():
            pytest.skip("there is no hf_purify.registry")
        from hf_purify import registry

        modules = {f.stem for f in folder.glob("*.py")} | {f.parent.name for f in folder.glob("*/__init__.py")}
        on_disk = {m for m in modules if not m.startswith("_")}
        declared = {e.name for e in entry_points(group=f"hf_purify.{kind}s")}
        assert set(registry.names(kind)) == on_disk | declared

    @pytest.mark.parametrize("path", sorted({*SHIPPED_FILES, *python_files(ROOT / "tests" / "contract")}), ids=ident)
    def test_no_literal_lists_the_methods(self, path: Path) -> None:
        methods = {f.stem for f in METHOD_FILES}

        def problems() -> Iterator[tuple[int, str]]:
            for node in ast.walk(tree(path)):
                parts = node.keys if isinstance(node, ast.Dict) else node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else []
                named = {p.value for p in parts if isinstance(p, ast.Constant)} & methods
                if len(named) > 2:
                    yield node.lineno, f"lists methods by hand ({', '.join(sorted(named))}); use names('method')"

        check(path, problems())
