"""Settings that must stand before torch and the Hugging Face libraries are imported, and the data that tests may use."""

from __future__ import annotations

import os

# Read once, at the first import of OpenMP and huggingface_hub: an unreachable Hub costs half a minute of retries a call, and
# threads that wait by spinning take the cores from the other test processes.
os.environ |= {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and weights that `HF_PURIFY_DATA` names; the test is skipped without one."""
    folder = os.environ.get("HF_PURIFY_DATA", "")
    if not folder:
        pytest.skip("needs real data: set HF_PURIFY_DATA to the folder that holds it")
    if not Path(folder).is_dir():
        pytest.fail(f"HF_PURIFY_DATA is '{folder}', which is no folder")
    return Path(folder)
