"""The Hub's check of a README.md: its front matter, before it is committed and when a client asks for it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
_TASKS = """
any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction image-segmentation
image-text-to-text image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice
object-detection other question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering
table-to-text tabular-classification tabular-regression tabular-to-text text-classification text-generation text-ranking
text-retrieval text-to-3d text-to-audio text-to-image text-to-speech text-to-video time-series-forecasting token-classification
translation unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
zero-shot-object-detection
"""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
SDKS = ("gradio", "streamlit", "docker", "static")
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
EMPTY = "empty or missing yaml metadata in repo card"


class _Loader(yaml.SafeLoader):
    """YAML as the Hub reads it: a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key {twice[0]!r}", node.start_mark)
        return super().construct_mapping(node, deep)


def metadata(content: str) -> Any:
    """What the front matter says; None where a card has none.

    Raises:
        YAMLError: it is no YAML.
    """
    found = REGEX_YAML_BLOCK.search(content)
    return yaml.load(found[2], _Loader) if found else None  # a loader of safe YAML


def check_card(content: str, kind: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Check a card of a model, dataset or space; returns errors and warnings, each as `{"message": ...}`."""
    try:
        data = metadata(content)
    except yaml.YAMLError as error:
        return [{"message": f"invalid YAML: {error}"}], []
    if data is None:
        return [], [{"message": EMPTY}]
    if not isinstance(data, dict):
        return [{"message": f"metadata must be a mapping, got {type(data).__name__}"}], []
    return [{"message": message} for message in _problems(data, kind)], []


def is_repo_id(value: object) -> bool:
    """Whether this can be a repository; a path cannot."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _one_of(data: Mapping[str, Any], key: str, allowed: Sequence[str]) -> Iterator[str]:
    if key in data and (not isinstance(data[key], str) or data[key] not in allowed):
        yield f'"{key}" must be one of [{", ".join(sorted(allowed))}], got {data[key]!r}'


def _list_of_strings(data: Mapping[str, Any], key: str) -> Iterator[str]:
    if key in data and not (isinstance(data[key], list) and all(isinstance(v, str) for v in data[key])):
        yield f'"{key}" must be an array of strings, got {data[key]!r}'


def _problems(data: Mapping[str, Any], kind: str) -> Iterator[str]:
    for value in data["license"] if isinstance(data.get("license"), list) else [data["license"]] if "license" in data else []:
        yield from _one_of({"license": value}, "license", _LICENSES.split())
    for key in ("tags", "metrics", "datasets"):
        yield from _list_of_strings(data, key)
    languages = data.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not isinstance(language, str) or language != language.lower():
            yield f'"language" must only contain lowercase characters, got {language!r}'
    if kind == "model":
        yield from _model_problems(data)
    if kind == "space":
        yield from _space_problems(data)


def _model_problems(data: Mapping[str, Any]) -> Iterator[str]:
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not is_repo_id(base):
            yield f'"base_model" with value {base!r} is not valid. Use a model id from https://hf.co/models'
    for name in data["datasets"] if isinstance(data.get("datasets"), list) else []:
        if not is_repo_id(name):
            yield f'"datasets" with value {name!r} is not valid. Use a dataset id from https://hf.co/datasets'
    yield from _one_of(data, "base_model_relation", RELATIONS)
    yield from _one_of(data, "pipeline_tag", _TASKS.split())
    if not isinstance(data.get("library_name", ""), str):
        yield f'"library_name" must be a string, got {data["library_name"]!r}'
    models = data.get("model-index", [])
    if not isinstance(models, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(models):
        yield from _index_problems(model, f"model-index[{i}]")


def _space_problems(data: Mapping[str, Any]) -> Iterator[str]:
    yield from _one_of(data, "sdk", SDKS)
    yield from _one_of(data, "colorFrom", COLORS)
    yield from _one_of(data, "colorTo", COLORS)
    short = data.get("short_description", "")
    if not isinstance(short, str) or len(short) > 60:
        yield '"short_description" length must be less than or equal to 60 characters long'


def _index_problems(model: object, where: str) -> Iterator[str]:
    """What is wrong with one model's results."""
    name, results = (model.get("name"), model.get("results")) if isinstance(model, dict) else (None, None)
    if not isinstance(name, str) or not name:
        yield f'"{where}.name" is required'
    if not isinstance(results, list):
        yield f'"{where}.results" must be an array'
        return
    for i, result in enumerate(results):
        for path in ("task.type", "dataset.type", "dataset.name"):
            if not isinstance(_at(result, path), str) or not _at(result, path):
                yield f'"{where}.results[{i}].{path}" is required'
        metrics = _at(result, "metrics")
        if not isinstance(metrics, list) or not metrics:
            yield f'"{where}.results[{i}].metrics" must be an array of at least one metric'
            continue
        for j, metric in enumerate(metrics):
            value = _at(metric, "value")
            if not isinstance(_at(metric, "type"), str):
                yield f'"{where}.results[{i}].metrics[{j}].type" is required'
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                yield f'"{where}.results[{i}].metrics[{j}].value" must be a number, got {value!r}'


def _at(data: object, path: str) -> object:
    """The value below a dotted path, None where there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data
