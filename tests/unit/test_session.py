"""One process, several jobs: accelerate keeps device and precision once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_purify.errors import ConfigError
from hf_purify.recipe import PurifyRecipe
from hf_purify.session import make_accelerator


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made(precision: str | None = None, device: str | None = None) -> str:
    return make_accelerator(PurifyRecipe(model="m", clean="c", precision=precision, device=device)).mixed_precision


def test_each_job_has_the_precision_that_it_asks_for() -> None:
    assert [made(p) for p in ("bf16", None, "no", "bf16", None)] == ["bf16", "no", "no", "bf16", "no"]


def test_precision_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert [made(), made("no"), made()] == ["bf16", "no", "bf16"]


def test_the_callers_accelerator_is_respected() -> None:
    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    assert made() == "bf16"
    with pytest.raises(ConfigError, match="has an Accelerator already, which does not go with device=None, precision='no'; leave them out"):
        made("no")
    assert theirs.mixed_precision == "bf16"
