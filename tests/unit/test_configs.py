"""Configs that a stranger wrote: what asks for code, for other files or for more than any machine has is refused; what is odd passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_purify.configs import DEEPEST, LARGEST_CONFIG, safe_config
from hf_purify.errors import ModelError, PurifyError, UnsafeCheckpoint
from hf_purify.hub import check_folder, pull_config


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels > 1 else {}


def written(folder: Path, content: Any, name: str = "config.json") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 16, "num_hidden_layers": 2}
TOKENIZER = "tokenizer_config.json"
Row = tuple[str, Any, type[PurifyError], str]
CODE = "wants to run its own code"
BAD: dict[str, Row] = {
    # what is no config
    "broken off": ("config.json", b'{"model_type": "v', ModelError, "is no valid JSON"),
    "empty": ("config.json", b"", ModelError, "is no valid JSON"),
    "no UTF-8": ("config.json", b'{"a": "\xff"}', ModelError, "is no valid JSON.*utf-8"),
    "a list": ("config.json", [], ModelError, "must hold a JSON object, got list"),
    "too large": ("config.json", b" " * (LARGEST_CONFIG + 1), UnsafeCheckpoint, f"expected at most {LARGEST_CONFIG}"),
    "too deep": ("config.json", nested(DEEPEST + 2), UnsafeCheckpoint, "nested more than 32 levels"),
    "far too deep": ("config.json", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", UnsafeCheckpoint, "nested more than 32"),
    "a key twice": (
        "config.json",
        b'{"model_type": "vit", "auto_map": 1, "model_type": "x"}',
        UnsafeCheckpoint,
        "the key 'model_type' twice",
    ),
    "a key twice inside": ("config.json", b'{"a": [{"b": 1, "b": 2}]}', UnsafeCheckpoint, "the key 'b' twice"),
    "a number of thousands of digits": ("config.json", b'{"a": ' + b"9" * 6000 + b"}", ModelError, "is no valid JSON"),
    # code
    "remote code": ("config.json", {"auto_map": {"AutoModel": "modeling.Net"}}, UnsafeCheckpoint, rf"{CODE} \(config.json: auto_map\)"),
    "remote code of a part": ("config.json", {"text_config": {"auto_map": {}}}, UnsafeCheckpoint, rf"{CODE} .*text_config.auto_map"),
    "remote code in a list": ("config.json", {"parts": [{}, [{"auto_map": {}}]]}, UnsafeCheckpoint, rf"{CODE} .*parts.auto_map"),
    "remote code of a tokenizer": (TOKENIZER, {"auto_map": {"AutoTokenizer": ["a.B", None]}}, UnsafeCheckpoint, CODE),
    "remote code of a processor": ("processor_config.json", {"image_processor": {"auto_map": {}}}, UnsafeCheckpoint, CODE),
    "a pipeline of its own": (
        "config.json",
        {"custom_pipelines": {"x": {"impl": "pipe.X"}}},
        UnsafeCheckpoint,
        rf"{CODE} .*custom_pipelines",
    ),
    "trust": ("generation_config.json", {"trust_remote_code": True}, UnsafeCheckpoint, rf"{CODE} .*trust_remote_code"),
    "a private key": ("config.json", {"_attn_implementation": "org/kernel"}, UnsafeCheckpoint, "the private key '_attn_implementation'"),
    "the one of CVE-2026-4372": ("config.json", {"_attn_implementation_internal": "org/k"}, UnsafeCheckpoint, "can load foreign code"),
    "a private key of a part": (
        "config.json",
        {"a": {"_attn_implementation": "x"}},
        UnsafeCheckpoint,
        "private key 'a._attn_implementation'",
    ),
    "a private key of experts": ("config.json", {"_experts_implementation": "x"}, UnsafeCheckpoint, "private key"),
    "a kernel by the public key": ("config.json", {"attn_implementation": "org/kernel@v1:fn"}, UnsafeCheckpoint, "sets the key 'attn_impl"),
    "a kernel for one part": ("config.json", {"attn_implementation": {"vision_config": "org/kernel"}}, UnsafeCheckpoint, "sets the key"),
    "a kernel behind a word": ("config.json", {"attn_implementation": "paged|org/kernel"}, UnsafeCheckpoint, "sets the key"),
    "a kernel's config": (
        "config.json",
        {"kernel_config": {"RMSNorm": "org/kernel:Norm"}},
        UnsafeCheckpoint,
        "private key 'kernel_config'",
    ),
    "kernels": ("config.json", {"use_kernels": True}, UnsafeCheckpoint, "sets the key 'use_kernels'"),
    # other files and repositories
    "a vocabulary elsewhere": (TOKENIZER, {"vocab_file": "/etc/passwd"}, UnsafeCheckpoint, r"\(vocab_file\) names the file '/etc/passwd'"),
    "a vocabulary above": (TOKENIZER, {"merges_file": "../../secret.txt"}, UnsafeCheckpoint, "goes up by '..'"),
    "a tokenizer elsewhere": (TOKENIZER, {"tokenizer_file": "/root/tokenizer.json"}, UnsafeCheckpoint, "it is absolute"),
    "a list of tokenizers": (TOKENIZER, {"fast_tokenizer_files": ["tokenizer.json", "../x.json"]}, UnsafeCheckpoint, "goes up by"),
    "Marian's vocabulary": (TOKENIZER, {"source_spm": "/a.spm"}, UnsafeCheckpoint, "it is absolute"),
    "weights elsewhere": ("config.json", {"transformers_weights": "../other/model.safetensors"}, UnsafeCheckpoint, "goes up by '..'"),
    "statistics of an adapter": ("adapter_config.json", {"corda_config": {"cache_file": "/tmp/x.pt"}}, UnsafeCheckpoint, "it is absolute"),
    "a template by address": (
        TOKENIZER,
        {"chat_template_file": "https://evil.example/t"},
        UnsafeCheckpoint,
        "is the address 'https://evil",
    ),
    "a vocabulary by address": (TOKENIZER, {"vocab_file": "http://169.254.169.254/"}, UnsafeCheckpoint, "would be fetched or opened"),
    "a file's address": ("processor_config.json", {"example": {"image_url": "file:///etc/passwd"}}, UnsafeCheckpoint, "example.image_url"),
    "an inline file": ("preprocessor_config.json", {"image": "DATA:image/png;base64,AAAA"}, UnsafeCheckpoint, "is the address"),
    "addresses in a list": ("preprocessor_config.json", {"images": ["a.png", "ftp://evil.example/x"]}, UnsafeCheckpoint, "is the address"),
    "timm's weights elsewhere": (
        "config.json",
        {"model_args": {"checkpoint_path": "/x.pth"}},
        UnsafeCheckpoint,
        r"elsewhere \(checkpoint_path\)",
    ),
    "timm's weights of the network": (
        "config.json",
        {"backbone_kwargs": {"pretrained": True}},
        UnsafeCheckpoint,
        r"elsewhere \(pretrained\)",
    ),
    "a backbone of another repository": ("config.json", {"backbone": "org/other"}, UnsafeCheckpoint, "'org/other', another repository"),
    "the same by timm's name": ("config.json", {"backbone_config": {"backbone": "hf-hub:org/x"}}, UnsafeCheckpoint, "another repository"),
    "an architecture in a folder": ("config.json", {"architecture": "local-dir:/tmp/x"}, UnsafeCheckpoint, "another repository or folder"),
    "a part of no known type": (
        "config.json",
        {"text_config": {"model_type": "brt"}},
        ModelError,
        "models of type 'brt', which text_config.model_type",
    ),
    "a part whose type is a list": ("config.json", {"text_config": {"model_type": ["bert"]}}, ModelError, "models of type"),
    # sizes
    "a billion layers": ("config.json", VIT | {"num_hidden_layers": 10**9}, ModelError, "num_hidden_layers = 1000000000: it is too large"),
    "a billion layers of a part": ("config.json", {"a_config": {"n_layer": 10**9}}, ModelError, "a_config.n_layer = 1000000000"),
    "layers below zero": ("config.json", VIT | {"num_hidden_layers": -1}, ModelError, "num_hidden_layers = -1: it is too small"),
    "no width": ("config.json", VIT | {"hidden_size": 0}, ModelError, "hidden_size = 0: it is too small; expected a whole number from 1"),
    "a switch as a width": ("config.json", VIT | {"hidden_size": True}, ModelError, "hidden_size = True: it is no number"),
    "a text as a width": ("config.json", VIT | {"hidden_size": "16"}, ModelError, "hidden_size = '16': it is no number"),
    "a width of 10**30": ("config.json", VIT | {"hidden_size": 10**30}, ModelError, "it is too large"),
    "no finite width": ("config.json", b'{"hidden_size": NaN}', ModelError, "it is no finite number"),
    "infinite layers": ("config.json", b'{"num_layers": Infinity}', ModelError, "it is no finite number"),
    "heads below zero": ("config.json", VIT | {"num_attention_heads": -2}, ModelError, "num_attention_heads = -2"),
    "no patches": ("config.json", VIT | {"patch_size": 0}, ModelError, "patch_size = 0: it is too small"),
    "a vocabulary of 10**12": ("config.json", {"vocab_size": 10**12}, ModelError, "vocab_size = 1000000000000"),
    "10**9 classes": ("config.json", {"num_labels": 10**9}, ModelError, "num_labels = 1000000000"),
    "stages of too many layers": ("config.json", {"depths": [4000, 4000]}, ModelError, "those are 8000 together"),
    "a stage below zero": ("config.json", {"depths": [2, -2]}, ModelError, "it is too small"),
    "too many stages": ("config.json", {"hidden_sizes": [1] * 5000}, ModelError, "those are 5000 values"),
    "an image of no pixels": ("config.json", VIT | {"image_size": 0}, ModelError, "image_size = 0"),
    "an image of 10**9 pixels a side": ("preprocessor_config.json", {"size": {"height": 10**9}}, ModelError, "size.height = 1000000000"),
    "timm's layers": ("config.json", {"model_args": {"layers": [10**9]}}, ModelError, "model_args.layers"),
    "no rank": ("adapter_config.json", {"r": 0}, ModelError, "r = 0: it is too small"),
    "a rank of 10**9": ("adapter_config.json", {"r": 10**9}, ModelError, "r = 1000000000"),
}


@pytest.mark.parametrize(("name", "content", "error", "words"), BAD.values(), ids=BAD)
def test_bad_config_is_refused_with_the_reason(name: str, content: Any, error: type[PurifyError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        safe_config(written(tmp_path, content, name), "org/model")
    assert type(caught.value) is error
    assert "'org/model'" in str(caught.value)
    assert name in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_a_config_says_cannot_steer_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpoint) as caught:
        safe_config(written(tmp_path, {"\x1b[2J": {"auto_map": {}}}), "m")
    assert str(caught.value).isprintable()


GOOD: dict[str, tuple[str, Any]] = {
    "a plain one": ("config.json", VIT),
    "Infinity, as Python writes it": ("config.json", b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}'),
    "a parts' type that transformers has": ("config.json", {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}),
    "a part without a type": ("config.json", {"ffn_config": {"model_type": ""}}),
    "an attention that transformers has": ("config.json", VIT | {"attn_implementation": "sdpa"}),
    "no trust": ("config.json", VIT | {"trust_remote_code": False, "use_kernels": False}),
    "labels of any name": ("config.json", VIT | {"id2label": {"0": "auto_map"}, "label2id": {"auto_map": 0, "num_layers": 1, "url": 2}}),
    "addresses that nobody opens": (
        "config.json",
        VIT | {"license_link": "https://example.org/license", "homepage": "https://example.org"},
    ),
    "where it was once": ("config.json", VIT | {"_name_or_path": "/home/someone/model", "name_or_path": "../model"}),
    "a log of its training": ("config.json", VIT | {"log_file": "/home/someone/train.log", "path": "https://example.org"}),
    "where its tokens were once": (TOKENIZER, {"special_tokens_map_file": "/root/.cache/special_tokens_map.json", "name_or_path": "/x"}),
    "a plain vocabulary": (TOKENIZER, {"vocab_file": "vocab.txt", "merges_file": None, "model_max_length": 10**30}),
    "a template that names an address": (TOKENIZER, {"chat_template": "{# see https://example.org #}{{ messages }}"}),
    "a backbone of timm": ("config.json", {"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": True}),
    "arguments of timm": ("config.json", {"architecture": "resnet18", "model_args": {"layers": [1, 1], "pretrained": False}}),
    "timm's own address": (
        "config.json",
        {"architecture": "resnet18", "pretrained_cfg": {"url": "https://example.org/r.pth", "input_size": [3, 8, 8]}},
    ),
    "switches that sound like sizes": (
        "config.json",
        {"freeze_text_layers": True, "fixed_input_size": False, "cross_attn_all_layers": True},
    ),
    "negative numbers that are words": ("config.json", {"max_relative_positions": -1, "vision_feature_layer": -2, "chunk_size": -1}),
    "no layers of one kind": ("config.json", {"encoder_layers": 0, "type_vocab_size": 0, "num_feature_levels": 0}),
    "large figures that nothing is made of": ("config.json", {"num_train_samples": 10**12, "rope_theta": 10**9, "seed": 2**63}),
    "what hf-purify wrote": ("config.json", VIT | {"hf_purify_backdoor": {"trigger": {"size": -1, "image": "https://example.org/a.png"}}}),
}


@pytest.mark.parametrize(("name", "content"), GOOD.values(), ids=GOOD)
def test_good_and_odd_configs_pass(name: str, content: Any, tmp_path: Path) -> None:
    file = written(tmp_path, content, name)
    assert str(safe_config(file, "org/model")) == str(json.loads(file.read_text()))


def test_tokenizer_elsewhere_passes_where_the_one_that_is_read_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert safe_config(written(tmp_path, {"tokenizer_file": "/root/tokenizer.json"}, TOKENIZER), "m")


def test_config_given_by_itself_is_checked_as_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers = 1000000000"):
        pull_config(str(written(tmp_path, {"num_hidden_layers": 10**9}, "mine.json")))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        TOKENIZER,
        "adapter_config.json",
        "hf_purify.json",
    ],
)
def test_every_config_of_a_folder_is_checked(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    check_folder(tmp_path, "m")
    written(tmp_path, {"deep": [{"auto_map": {}}]}, name)
    with pytest.raises(UnsafeCheckpoint, match=CODE):
        check_folder(tmp_path, "m")


def test_tokenizer_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**28 + 1)  # takes no space on the disk
    with pytest.raises(UnsafeCheckpoint, match=r"'tokenizer.json' of 'm' has 268435457 bytes"):
        check_folder(tmp_path, "m")
