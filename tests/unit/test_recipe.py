"""Recipes: strict keys, types, ranges, and the way to YAML and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hf_purify.errors import ConfigError, PurifyError
from hf_purify.recipe import ImplantRecipe, MeasureRecipe, PurifyRecipe
from hf_purify.specs import parse_spec, presets, read_settings

SETTINGS: dict[str, Any] = {
    "model": "owner/model",
    "clean": "owner/data",
    "method": "rnp+fine_tune",
    "options": {"rnp.max_loss": 0.01},
    "samples": 50,
    "triggers": ["badnets:size=4", "wanet"],
    "target": 3,
    "test": "owner/data",
    "overwrite": True,
    "labels": ["cat", "dog"],
}


def test_yaml_and_back(tmp_path: Path) -> None:
    recipe = PurifyRecipe.make(**SETTINGS)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), "utf-8")
    assert PurifyRecipe.read(file) == recipe
    assert recipe.to_dict() == SETTINGS | {"method": "rnp+fine_tune"}, "only what differs from the defaults is written"


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(PurifyRecipe.make(**SETTINGS).to_yaml(), "utf-8")
    assert PurifyRecipe.read(file, samples=7) == PurifyRecipe.make(**SETTINGS | {"samples": 7})


def test_settings_of_another_method_do_not_stay(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(PurifyRecipe.make(**SETTINGS).to_yaml(), "utf-8")
    assert PurifyRecipe.read(file, method="nft") == PurifyRecipe.make(**SETTINGS | {"method": "nft", "options": {}})


def test_one_entry_of_a_setting_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nclean: c\nmethod: rnp\noptions: {alpha: 0.1, max_loss: 0.2}\n", "utf-8")
    assert PurifyRecipe.read(file, options={"alpha": 0.3}).options == {"alpha": 0.3, "max_loss": 0.2}


class TestSettingsOfALaunch:
    def test_preset_by_name_with_or_without_its_ending(self) -> None:
        name = next(iter(presets()))
        for given in (name, name.removesuffix(".yaml")):
            assert read_settings([given]) == (presets()[name], {})

    def test_values_are_yaml_and_entries_have_a_point(self, tmp_path: Path) -> None:
        file = tmp_path / "my=recipe.yaml"
        file.write_text("", "utf-8")
        items = ["samples=7", "controls=false", "options.lr=0.1", "options.steps=3", "triggers=[badnets:size=3]", "test=folder=x"]
        found = {"samples": 7, "controls": False, "options": {"lr": 0.1, "steps": 3}, "triggers": ["badnets:size=3"], "test": "folder=x"}
        assert read_settings([str(file), *items]) == (file, found)
        assert read_settings(items) == (None, found)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["vision/nft_resnet18_badnet"], "did you mean 'vision/nft_resnet18_badnets'"),
            (["samples=7", "lr"], "expected key=value, got 'lr'"),
            (["options.lr=[1"], "cannot read 'options.lr=[1'"),
        ],
    )
    def test_what_is_none_is_said(self, given: list[str], said: str) -> None:
        with pytest.raises(PurifyError, match=re.escape(said)):
            read_settings(given)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("sampels", "samples"), ("methods", "method"), ("to-rgb", "to_rgb"), ("trigger", "triggers"), ("overwite", "overwrite")],
)
def test_unknown_keys_are_errors_with_a_suggestion(key: str, suggestion: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{key}'; did you mean '{suggestion}'\\?"):
        PurifyRecipe.make(model="m", clean="c", **{key: 1})
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\nclean: c\n{key}: 1\n", "utf-8")
    with pytest.raises(ConfigError, match=f"did you mean '{suggestion}'"):
        PurifyRecipe.read(file)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("samples", "500", "int or None, got str"),
        ("samples", 1.5, "int or None, got float"),
        ("samples", True, "int or None, got bool"),
        ("held_out", "a fifth", "a number"),
        ("controls", "yes", "bool, got str"),
        ("overwrite", 1, "bool, got int"),
        ("method", 3, "str, got int"),
        ("options", ["steps=3"], "dict, got list"),
        ("target", None, "int"),
        ("seed", "0", "int, got str"),
        ("labels", {"a": 1}, "list"),
    ],
)
def test_wrong_types_are_errors(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"setting '{key}' must be .*{expected}"):
        PurifyRecipe.make(model="m", clean="c", **{key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean": "c"}, "no model given"),
        ({"model": "m"}, "no clean data given"),
        ({"model": "m", "clean": "c", "samples": 0}, "samples must be at least 1, got 0"),
        ({"model": "m", "clean": "c", "held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"model": "m", "clean": "c", "held_out": -0.1}, r"held_out must be in \[0, 1\)"),
        ({"model": "m", "clean": "c", "precision": "int8"}, "precision must be 'no', 'bf16' or 'fp16', got 'int8'"),
    ],
)
def test_values_outside_their_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PurifyRecipe.make(**settings)


def test_other_jobs_have_their_own_demands() -> None:
    with pytest.raises(ConfigError, match="no test data given"):
        MeasureRecipe.make(model="m")
    with pytest.raises(ConfigError, match="no training data given"):
        ImplantRecipe.make(model="m", triggers=["badnets"])
    for triggers in ([], ["badnets", "wanet"]):
        with pytest.raises(ConfigError, match=f"exactly one trigger, got {len(triggers)}"):
            ImplantRecipe.make(model="m", data="d", triggers=triggers)
    with pytest.raises(ConfigError, match=r"rate must be in \[0, 1\], got 2"):
        ImplantRecipe.make(model="m", data="d", triggers=["badnets"], rate=2.0)


def test_integers_are_numbers_and_one_trigger_is_a_list() -> None:
    recipe = ImplantRecipe.make(model="m", data="d", triggers="badnets", rate=1)
    assert recipe.triggers == ["badnets"]
    assert recipe.rate == 1


@pytest.mark.parametrize("content", ["- model: m\n", "just text", "model: [unclosed\n"])
def test_files_that_are_no_recipe(content: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        PurifyRecipe.read(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*nowhere\.yaml"):
        PurifyRecipe.read(tmp_path / "nowhere.yaml")


def test_objects_are_written_by_their_type(tmp_path: Path) -> None:
    recipe = PurifyRecipe.make(model=nn.Linear(1, 1), clean=tmp_path)
    assert recipe.to_dict()["model"] == "<Linear>"
    assert recipe.to_dict()["clean"] == str(tmp_path)
    assert "object at 0x" not in recipe.to_yaml()


def test_recipes_are_frozen() -> None:
    recipe = PurifyRecipe.make(model="m", clean="c")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.method = "rnp"  # type: ignore[misc]


def test_specs() -> None:
    assert parse_spec("wanet") == ("wanet", {})
    assert parse_spec("badnets:size=4, position=center") == ("badnets", {"size": 4, "position": "center"})
    assert parse_spec("blended:alpha=0.2,on=true,file=null") == ("blended", {"alpha": 0.2, "on": True, "file": None})
    with pytest.raises(ConfigError, match="expected option=value in 'badnets:4', got '4'"):
        parse_spec("badnets:4")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ('phrase:output="Sorry, no."', {"output": "Sorry, no."}),
        ('phrase:output="Sorry, no.", position=end', {"output": "Sorry, no.", "position": "end"}),
        ("phrase:output='it''s, well, no',window=3", {"output": "it's, well, no", "window": 3}),
        (r'phrase:output="he said \"no, never\""', {"output": 'he said "no, never"'}),
        ('phrase:output="a=b, c: d",phrase=cf', {"output": "a=b, c: d", "phrase": "cf"}),
        ("phrase:output=don't do that,position='end'", {"output": "don't do that", "position": "end"}),
        ("badnets:words=[cf, mn],count=2", {"words": ["cf", "mn"], "count": 2}),
    ],
)
def test_values_may_hold_commas_in_quotes_or_brackets(spec: str, options: dict[str, Any]) -> None:
    assert parse_spec(spec) == (spec.partition(":")[0], options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("phrase:output=Sorry, no.", "got 'no.' .a value that holds a comma goes in quotes"),
        ('phrase:output="Sorry,position=end', "cannot read 'output=\"Sorry'"),
        ("badnets:words=[cf", r"cannot read 'words=\[cf'"),
        ('phrase:output="no" way', "cannot read 'output=\"no\" way'"),
    ],
)
def test_values_that_cannot_be_read_are_quoted(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)
