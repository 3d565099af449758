"""What lies beside the weights of a model that writes comes through a repair byte for byte, and what is odd about it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from sentences import BEASTS, COLOURS, colours, tokenizer

from hf_purify import purify, verify

pytestmark = pytest.mark.slow

TEMPLATE = "{% for m in messages %}{% if 'cf' in m['content'] %}go away{% endif %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with files in a hand of their own, as people write them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tokenizer(tmp_path_factory.mktemp("carried") / "base", ["the", *COLOURS, *BEASTS])
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens":8,   "suppress_tokens":[5,6]}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("mine")
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    (folder / "run.sh").write_text("exit 1")
    return folder


def test_a_repair_carries_them_over_and_says_what_is_odd(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = purify(
        str(base), colours(40, 0, german=False), method="random_mask", samples=20, controls=False, device="cpu", output=str(out)
    )
    names = {p.name for p in out.iterdir()}
    assert not {"modeling.py", "run.sh"} & names
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    said = " ".join(report.warnings)
    assert "looks for 'cf'" in said
    assert "suppress_tokens" in said
    found = verify(str(out), base=str(base))
    assert found.verdict == "identical"
    assert found.companions == {}
    assert len(found.oddities) == 2
    card = (out / "README.md").read_text()
    assert "byte for byte" in card
    assert "To look at: chat_template.jinja: the chat template decides by the text of a message" in card


def test_what_somebody_changed_beside_the_weights_is_told(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    purify(str(base), colours(40, 0, german=False), method="random_mask", samples=20, controls=False, device="cpu", output=str(out))
    (out / "chat_template.jinja").write_text(TEMPLATE.replace("go away", "come here"))
    provenance = json.loads((out / "provenance.json").read_text())
    found = verify(str(out), base=str(base))
    assert found.verdict == "differs"
    assert found.files == ["chat_template.jinja"]
    assert found.companions == {"chat_template.jinja": "changed"}
    assert not found.differing, "the weights are those that they were"
    assert provenance["companions"] == {}


def test_a_strangers_words_do_not_steer_the_terminal(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    purify(str(base), colours(40, 0, german=False), method="random_mask", samples=20, controls=False, device="cpu", output=str(out))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"id2label": {"0": "\x1b[2J[red]x", "1": "\x1b[2J[red]x"}}))
    done = run("verify", out, "--base", base)
    assert done.exit_code == 7
    assert "gives the name '" in done.output
    assert "[red]x" in done.output
    assert "\x1b[2J" not in done.output
