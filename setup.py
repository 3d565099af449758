"""The packages of the wheel, found on disk: `pyproject.toml` can map folders to import names, but not search through the map."""

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup

PROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def packages() -> list[str]:
    """Every mapped folder and every folder below it, under its import name."""
    below = ((name, sub) for name, folder in FOLDERS.items() for sub in find_namespace_packages(folder))
    return [*FOLDERS, *(f"{name}.{sub}" for name, sub in below if "__pycache__" not in sub)]


setup(packages=packages())
