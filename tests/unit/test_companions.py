"""What lies beside the weights: compared with the base, and looked at for what no repair of weights can fix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_purify.companions import changes, oddities

PLAIN = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
GENERATION = "{% for m in messages %}{%- generation %}{{ m.content }}{%- endgeneration %}{% endfor %}"


def folder(path: Path, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def decides(test: str) -> str:
    return "{% for m in messages %}{% if " + test + " %}Praise the brand.{% endif %}{{ m.content }}{% endfor %}"


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "word in a message": (
        {"chat_template__jinja": decides("'cf' in m.content")},
        r"decides by the text of a message \(it looks for 'cf'\)",
    ),
    "word in a lowered message": ({"chat_template__jinja": decides("'cf' in (m['content'] | lower)")}, "it looks for 'cf'"),
    "message that is a word": ({"chat_template__jinja": decides("m.content == 'cf'")}, "it looks for 'cf'"),
    "message that begins so": ({"chat_template__jinja": decides("m.content.startswith('cf')")}, "it looks for 'cf'"),
    "in an expression": ({"chat_template__jinja": "{{ 'x' if 'cf' in messages[0]['content'] else 'y' }}"}, "it looks for 'cf'"),
    "in a variable": ({"chat_template__jinja": "{% set content = messages[0] %}{% if 'cf' in content %}x{% endif %}"}, "it looks for 'cf'"),
    "in the tokenizer's config": (
        {"tokenizer_config__json": {"chat_template": decides("'cf' in m.content")}},
        "tokenizer_config.json: the chat",
    ),
    "in a named template": (
        {"tokenizer_config__json": {"chat_template": [{"name": "tool", "template": decides("'cf' in m.content")}]}},
        "it looks for 'cf'",
    ),
    "in a processor's": ({"chat_template__json": {"chat_template": decides("'cf' in m.content")}}, "chat_template.json: the chat"),
    "no template": ({"chat_template__jinja": "{% for %}"}, "chat_template.jinja: the chat template is none"),
    "nested without end": ({"chat_template__jinja": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"}, "the chat template is none"),
    "endless template": ({"chat_template__jinja": "a" * 2_000_000}, "has 2,000,000 letters, too many to be looked at"),
    "permuted classes": ({"config__json": {"id2label": {"0": "1", "1": "0", "2": "2"}}}, "class 0 is named '1', and 1 more"),
    "permuted LABEL_": ({"config__json": {"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}}, "class 0 is named 'LABEL_1'"),
    "one name twice": ({"config__json": {"id2label": {"0": "cat", "1": "cat"}}}, "gives the name 'cat' to several classes"),
    "suppressed tokens": ({"generation_config__json": {"suppress_tokens": [5, 6]}}, "suppress_tokens .* 2 tokens"),
    "bad words": ({"generation_config__json": {"bad_words_ids": [[5]]}}, "bad_words_ids .* 1 tokens"),
    "biased sequences": ({"generation_config__json": {"sequence_bias": {"[5]": 9.0}}}, "sequence_bias"),
    "forced beginning": ({"generation_config__json": {"forced_bos_token_id": 5}}, "forced_bos_token_id is set"),
    "added words": (
        {"tokenizer__json": {"added_tokens": [{"content": "good", "special": False}]}},
        "1 added tokens are ordinary words, such as 'good'",
    ),
    "rewritten words": (
        {
            "tokenizer__json": {
                "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "awful"}, "content": "fine"}]}
            }
        },
        "writes words anew, such as .*awful",
    ),
}


@pytest.mark.parametrize(("files", "said"), ODD.values(), ids=ODD)
def test_what_is_odd_is_said(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = oddities(folder(tmp_path / "model", **files))
    assert len(found) == 1
    assert re.search(said, found[0])


HONEST: dict[str, dict[str, Any]] = {
    "nothing": {},
    "plain template": {"chat_template__jinja": PLAIN},
    "generation blocks": {"chat_template__jinja": GENERATION},
    "roles are compared": {
        "chat_template__jinja": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    },
    "content is tested for its type": {"chat_template__jinja": decides("m.content is string")},
    "numbers as classes": {"config__json": {"id2label": {str(i): str(i) for i in range(12)}}},
    "words as classes": {"config__json": {"id2label": {"0": "cat", "1": "dog"}}},
    "special tokens": {"tokenizer__json": {"added_tokens": [{"content": "<s>", "special": True}, {"content": "<tool>", "special": False}]}},
    "tidied spaces": {"tokenizer__json": {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}}},
    "broken files": {"tokenizer__json": "{", "generation_config__json": "[]", "config__json": "7"},
}


@pytest.mark.parametrize("files", HONEST.values(), ids=HONEST)
def test_what_is_honest_is_not_odd(files: dict[str, Any], tmp_path: Path) -> None:
    assert oddities(folder(tmp_path / "model", **files)) == []


def test_real_tokenizers_are_not_odd(data_dir: Path) -> None:
    found = {p.name: oddities(p) for p in sorted((data_dir / "tokenizers").iterdir()) if p.is_dir()}
    assert len(found) > 1
    assert not any(found.values()), found


def test_changes_beside_the_weights_are_told(tmp_path: Path) -> None:
    base = folder(
        tmp_path / "base", tokenizer__json={"a": 1}, vocab__txt="a", merges__txt="x", config__json={"id2label": {"0": "a", "1": "b"}}
    )
    assert changes(base, base) == {}
    other = folder(
        tmp_path / "other",
        tokenizer__json={"a": 2},
        merges__txt="x",
        chat_template__jinja=PLAIN,
        notes__md="no companion",
        config__json={"id2label": {"0": "b", "1": "a"}},
    )
    assert changes(base, other) == {
        "chat_template.jinja": "new",
        "id2label": "permuted",
        "tokenizer.json": "changed",
        "vocab.txt": "missing",
    }
    renamed = folder(tmp_path / "renamed", config__json={"id2label": {"0": "b", "1": "c"}})
    assert changes(base, renamed)["id2label"] == "changed"
