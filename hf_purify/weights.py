"""The safetensors of a checkpoint's folder: each file's header checked, and the index of a sharded checkpoint held against them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_purify.configs import read_json
from hf_purify.errors import ModelError, UnsafeCheckpoint, shown
from hf_purify.filenames import check_name
from hf_purify.headers import Header, read_header

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 128 * 2**20  # bytes: a name of 100 characters for each of a million tensors


def check_weights(folder: Path, source: str) -> dict[str, Header]:
    """The headers of a checkpoint's weights, by the names of their files: the whole model, or its shards.

    Every safetensors file of the folder is checked, and every index; an index that nothing is loaded by may name files that are gone.

    Raises:
        UnsafeCheckpoint: a file that is no safetensors but a pickle, a hostile header, or an index that leads elsewhere.
        ModelError: a broken file, or shards that are not what the index says.
    """
    headers = {file.name: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    maps = {file.name: read_index(file, source) for file in sorted(folder.glob("*.index.json"))}
    if WHOLE in headers:
        return {WHOLE: headers[WHOLE]}
    if INDEX in maps:
        return _held_against(maps[INDEX], headers, source)
    return headers


def read_index(file: Path, source: str) -> dict[str, str]:
    """Names of tensors and of the shards that hold them.

    Raises:
        UnsafeCheckpoint: a shard outside the folder, or one that is no safetensors file.
        ModelError: it is no index.
    """
    content: dict[str, Any] = read_json(file, source, LARGEST_INDEX)
    found = content.get("weight_map")
    if not isinstance(found, dict):
        raise ModelError(f"'{file.name}' of '{source}' has no weight_map, which would say what shard holds which tensor")
    ending = ".safetensors" if file.name.endswith(".safetensors.index.json") else ""
    for shard in {str(s): s for s in found.values()}.values():
        check_name(shard, f"'{file.name}' of '{source}'")
        if not shard.endswith(ending):
            raise UnsafeCheckpoint(f"'{file.name}' of '{source}' names {shown(shard)}; expected safetensors files alone")
    return found


def _held_against(index: Mapping[str, str], headers: Mapping[str, Header], source: str) -> dict[str, Header]:
    """The shards that an index names, which hold exactly what it says."""
    shards = sorted(set(index.values()))
    for shard in shards:
        if shard not in headers:
            raise ModelError(f"{INDEX} of '{source}' names {shown(shard)}, which is not there; download the checkpoint again")
    for name, shard in index.items():
        if name not in headers[shard].tensors:
            raise ModelError(f"{INDEX} of '{source}' says that '{shard}' holds {shown(name)}, which it does not")
    for shard in shards:
        for name in headers[shard].tensors:
            if index.get(name) != shard:
                raise ModelError(f"'{shard}' of '{source}' holds {shown(name)}, which {INDEX} does not say")
    return {shard: headers[shard] for shard in shards}
