"""A Hub on the loopback for unit tests, and the real client in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub_server import TOKEN, Hub, running
from huggingface_hub import HfApi, close_session, constants


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """The client of the Hub's user, who may write. What the client reads from the environment at its import is set again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    )
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    yield HfApi(endpoint=hub.endpoint, token=TOKEN)
    close_session()
