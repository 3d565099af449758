"""What is safe to read: safetensors in a local folder; pickles and foreign code are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_purify.errors import ModelError, UnsafeCheckpoint
from hf_purify.hub import ALLOWED, PICKLES, pull

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"  # the smallest valid file, of no tensors


def checkpoint(folder: Path, *files: str, config: dict[str, Any] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_bytes(SAFETENSORS if name.endswith(".safetensors") else b"")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "vit"}))
    return str(folder)


def test_folder_with_safetensors_is_taken_as_it_is(tmp_path: Path) -> None:
    pulled = pull(checkpoint(tmp_path / "model", "model.safetensors", "pytorch_model.bin"))
    assert pulled.folder == tmp_path / "model"
    assert pulled.revision is None


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_alone_are_refused_with_the_way_to_convert(suffix: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", f"weights{suffix}")
    with pytest.raises(UnsafeCheckpoint, match=rf"as pickles only \(weights\{suffix}\)") as caught:
        pull(source)
    assert "safetensors/convert" in str(caught.value)
    assert "weights_only=True" in str(caught.value)


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickle_file_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"")
    with pytest.raises(UnsafeCheckpoint, match="pickles only"):
        pull(str(file))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_foreign_code_is_refused(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "model.safetensors")
    (tmp_path / "model" / name).write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Net"}}))
    with pytest.raises(UnsafeCheckpoint, match=f"wants to run its own code \\({name}: auto_map\\)"):
        pull(source)


@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal", "kernel_config"])
def test_private_keys_that_load_kernels_are_refused(key: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "model.safetensors", config={"model_type": "vit", key: "someone/kernel"})
    with pytest.raises(UnsafeCheckpoint, match=f"private key '{key}'"):
        pull(source)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no weights; expected model\.safetensors"):
        pull(checkpoint(tmp_path / "model"))


def test_broken_config(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"'config\.json' of .* is no valid JSON"):
        pull(source)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "~/no/such/folder", "no-such-model", "a/b/c"])
def test_missing_folder(source: str) -> None:
    with pytest.raises(ModelError, match=r"no folder .* neither a Hub id"):
        pull(source)


def test_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match="expected a checkpoint folder or a Hub id, got the file"):
        pull(str(tmp_path / "notes.txt"))


def test_hub_that_cannot_be_reached_is_a_clear_error() -> None:
    """The tests run offline."""
    with pytest.raises(ModelError, match="cannot read 'owner/model' from the Hub"):
        pull("owner/model")


def test_nothing_that_could_run_is_downloaded() -> None:
    assert not [pattern for pattern in ALLOWED if pattern.endswith((".py", *PICKLES)) or pattern == "*"]
