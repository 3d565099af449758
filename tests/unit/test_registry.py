"""Names: what lies in the tree, what other packages declare, and what is neither or both."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_purify import registry
from hf_purify.errors import ConfigError, PurifyError, UnknownName
from hf_purify.method import Context, Method, Sequential, Verdict
from hf_purify.registry import find, find_trigger, make_method, names


class Stranger(Method):
    """A method of another package."""

    name = "stranger"

    def purify(self, ctx: Context) -> Verdict:
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)))


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution that declares entry points, as pip would leave it."""

    def install(group: str, **points: str) -> None:
        module = types.ModuleType("stranger_package")
        module.Stranger, module.helper = Stranger, len  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stranger_package", module)
        folder = tmp_path / "stranger_package-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-package\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_built_in_names_are_the_files() -> None:
    folder = Path(sys.modules[Method.__module__].__file__ or "").parent / "methods"
    assert {f.stem for f in folder.glob("*.py") if not f.name.startswith("_")} <= set(names("method"))
    assert {"nft", "rnp", "ulrl", "wiper", "fine_tune", "norm_refresh", "random_mask"} <= set(names("method"))
    assert "vision" in names("adapter")


@pytest.mark.parametrize("kind", ["method", "adapter"])
def test_every_name_finds_a_class_of_that_name(kind: str) -> None:
    for name in names(kind):
        assert find(kind, name).name == name


def test_unknown_names_come_with_a_suggestion_and_the_list() -> None:
    with pytest.raises(UnknownName, match=r"unknown method 'ntf'; did you mean 'nft'\? \(known: .*nft, norm_refresh"):
        find("method", "ntf")
    with pytest.raises(UnknownName, match="unknown adapter 'visoin'; did you mean 'vision'"):
        find("adapter", "visoin")
    for private in ("__init__", "_hidden", "../nft", ""):
        with pytest.raises(UnknownName):
            find("method", private)


def test_plugin_of_another_package_is_found(declare: Callable[..., None]) -> None:
    declare("hf_purify.methods", stranger="stranger_package:Stranger")
    assert "stranger" in names("method")
    assert find("method", "stranger") is Stranger
    assert isinstance(make_method("stranger+fine_tune"), Sequential)


def test_name_in_both_places_is_an_error(declare: Callable[..., None]) -> None:
    declare("hf_purify.methods", nft="stranger_package:Stranger")
    with pytest.raises(ConfigError, match=r"method 'nft' exists twice.*stranger_package:Stranger; rename the plugin"):
        find("method", "nft")


def test_plugin_must_keep_the_contract(declare: Callable[..., None]) -> None:
    declare("hf_purify.methods", helper="stranger_package:helper")
    with pytest.raises(ConfigError, match=r"entry point hf_purify\.methods:helper .* must be a subclass of Method; got <built-in"):
        find("method", "helper")


def test_adapters_are_not_methods(declare: Callable[..., None]) -> None:
    declare("hf_purify.adapters", stranger="stranger_package:Stranger")
    assert "stranger" not in names("method")
    with pytest.raises(ConfigError, match="must be a subclass of Adapter"):
        find("adapter", "stranger")


def test_plugin_that_does_not_import_is_named(declare: Callable[..., None]) -> None:
    declare("hf_purify.methods", broken="no_such_package:Method")
    with pytest.raises((PurifyError, ImportError), match="no_such_package"):
        find("method", "broken")


def test_file_without_its_method_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_in_tree", lambda kind: ["hollow"])
    monkeypatch.setitem(sys.modules, "hf_purify.methods.hollow", types.ModuleType("hf_purify.methods.hollow"))
    with pytest.raises(ConfigError, match=r"hf_purify\.methods\.hollow must define a subclass of Method whose name is 'hollow'"):
        find("method", "hollow")


def test_options_reach_their_method() -> None:
    assert make_method("nft", steps=7).config.steps == 7
    sequence = make_method("rnp + fine_tune", **{"rnp.max_loss": 0.5, "fine_tune.epochs": 3})
    assert sequence.name == "rnp+fine_tune"
    assert [m.config for m in sequence.methods] == [
        find("method", "rnp")(max_loss=0.5).config,
        find("method", "fine_tune")(epochs=3).config,
    ]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nft", {"stpes": 3}, "nft has no option 'stpes'; did you mean 'steps'"),
        ("nft", {"steps": 0}, "steps must be at least 1, got 0"),
        ("nft", {"steps": 1.5}, r"steps must be int, got float \(1.5\)"),
        ("fine_tune", {"epochs": True}, r"epochs must be int, got bool \(True\)"),
        ("rnp", {"max_loss": "x"}, r"max_loss must be a number, got str \('x'\)"),
        ("rnp", {"unlearn_lr": "nan"}, "unlearn_lr is not a number"),
        ("rnp+fine_tune", {"epochs": 3}, r"'epochs' of the sequence 'rnp\+fine_tune' must be written method\.option"),
        ("rnp+fine_tune", {"nft.steps": 3}, r"must be written method\.option, for example rnp\.nft\.steps"),
        ("rnp+fine_tune", {"rnp.epoch": 3}, "rnp has no option 'epoch'"),
        ("norm_refresh", {"steps": 3}, r"no option 'steps' \(options: none\)"),
    ],
)
def test_impossible_options(spec: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(spec, **options)


def test_numbers_that_yaml_reads_as_texts() -> None:
    assert make_method("rnp", unlearn_lr="1e-4").config.unlearn_lr == 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", ["rnp+", "+", "rnp+ntf", ""])
def test_broken_sequences(spec: str) -> None:
    with pytest.raises(UnknownName, match="unknown method"):
        make_method(spec)


def test_empty_sequence() -> None:
    with pytest.raises(ConfigError, match="at least one method"):
        Sequential([])


def test_triggers_by_name() -> None:
    adapter = find("adapter", "vision")()
    for name, kind in adapter.triggers().items():
        assert kind.name == name
    assert find_trigger(adapter, "badnets", size=4).size == 4
    with pytest.raises(UnknownName, match="unknown trigger 'badnet'; did you mean 'badnets'"):
        find_trigger(adapter, "badnet")
    with pytest.raises(PurifyError, match="unknown option of trigger 'badnets': 'sise'; did you mean 'size'"):
        find_trigger(adapter, "badnets", sise=4)
    with pytest.raises(ConfigError, match="size must be"):
        find_trigger(adapter, "badnets", size=0)
