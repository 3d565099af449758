"""The built wheel, installed into an empty environment outside the checkout, holds everything: code, cards, recipes, the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# What a user needs at run time; results and pictures of the documentation may stay behind.
DATA = {"hf_purify": "*.md", "hf_purify_recipes": "*.yaml", "hf_purify_hub_cards": "*"}

LOOK = """
import importlib, importlib.resources, json, sys

def walk(folder, prefix=""):
    for item in folder.iterdir():
        yield from walk(item, f"{prefix}{item.name}/") if item.is_dir() else [prefix + item.name]

modules = {name: importlib.import_module(name) for name in json.loads(sys.argv[1])}
print(json.dumps({
    "files": {name: getattr(m, "__file__", None) or list(m.__path__)[0] for name, m in modules.items()},
    "data": {name: sorted(walk(importlib.resources.files(name))) for name in json.loads(sys.argv[2])},
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as a stranger would: no PYTHONPATH, not in the checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves its folders in the tree that it builds."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder)  # with __pycache__, as in a checkout that was used
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", copy, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel alone; its dependencies are borrowed, but no editable install comes with them."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("\n".join(borrowed) + "\n")  # its own .pth files are not read
    return home


def packages() -> list[str]:
    """Import names of all regular packages in the checkout."""
    inits = [
        (name, init.parent.relative_to(ROOT / folder)) for name, folder in FOLDERS.items() for init in (ROOT / folder).rglob("__init__.py")
    ]
    return sorted({".".join([name, *below.parts]) for name, below in inits} | set(FOLDERS))


def shipped(name: str, pattern: str) -> set[str]:
    folder = ROOT / FOLDERS[name]
    return {f.relative_to(folder).as_posix() for f in folder.rglob(pattern) if f.is_file() and "__pycache__" not in f.parts}


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not re.match(r"[^/]+\.dist-info/", n)}
    code = {f"{name}/{f}" for name in FOLDERS for f in shipped(name, "*.py")}
    assert code <= names, f"not in the wheel: {sorted(code - names)}"
    assert {n.split("/")[0] for n in names} == set(FOLDERS)
    assert not [n for n in names if n.endswith(".pyc")]
    assert "hf_purify_adapters/__init__.py" not in names
    assert "hf_purify/py.typed" in names


def test_wheel_is_found_with_its_cards_and_recipes(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    seen = json.loads(run(python, "-c", LOOK, json.dumps(packages()), json.dumps(list(DATA)), cwd=tmp_path))
    strangers = {name: file for name, file in seen["files"].items() if not Path(file).is_relative_to(environment)}
    assert not strangers, f"imported from elsewhere: {strangers}"
    for name, pattern in DATA.items():
        missing = shipped(name, pattern) - set(seen["data"][name])
        assert not missing, f"{name} lacks {sorted(missing)}"


def test_command_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    methods = {f.stem for f in (ROOT / "hf_purify" / "methods").glob("*.py") if not f.name.startswith("_")}
    for command in (["python", "-m", "hf_purify"], ["hf-purify"]):
        listed = run(environment / "bin" / command[0], *command[1:], "list", "methods", cwd=tmp_path)
        assert methods <= set(re.findall(r"[\w.]+", listed)), listed
    assert not list(tmp_path.iterdir())
