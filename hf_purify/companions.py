"""What lies beside a checkpoint's weights and shapes what it does: tokenizer, chat template, processor and generation configs.

No repair of weights touches these, and any of them can carry a backdoor of its own (of chat templates: arXiv:2602.04653). So they are
carried over as they are, compared with the base, and what is odd about them is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.txt", "*.model"),
    *("chat_template.jinja", "chat_template.json", "*preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json")
SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_decoder_ids")
LONGEST = 2**20  # letters of a template
SEARCHES = ("startswith", "endswith", "find", "rfind", "index", "count")
FORCING = ("forced_bos_token_id", "forced_eos_token_id")


def companions(folder: Path) -> list[Path]:
    """The files beside the weights that shape what a model does, by name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in PATTERNS))


def changes(base: Path, result: Path) -> dict[str, str]:
    """Companions that are not the same in two folders, each with what became of it: `changed`, `missing` or `new`.

    Class names are compared too, as `id2label`.
    """
    before, after = ({p.name: p for p in companions(f)} for f in (base, result))
    found = {name: "missing" for name in before.keys() - after.keys()} | {name: "new" for name in after.keys() - before.keys()}
    found |= {n: "changed" for n in before.keys() & after.keys() if before[n].read_bytes() != after[n].read_bytes()}
    old, new = (_labels(_read(f / "config.json")) for f in (base, result))
    if old and new and old != new:
        found["id2label"] = "permuted" if sorted(old.values()) == sorted(new.values()) else "changed"
    return dict(sorted(found.items()))


def oddities(folder: Path) -> list[str]:
    """What a reader should look at in the companions of a checkpoint, each in a sentence; most have an honest reason."""
    found = [f"{name}: {remark}" for name, text in _templates(folder) for remark in _template_remarks(text)]
    found += _label_remarks(_labels(_read(folder / "config.json")))
    generation = _read(folder / "generation_config.json")
    for key in SUPPRESSING:
        if value := generation.get(key):
            size = len(value) if isinstance(value, (list, dict)) else 1
            found.append(f"generation_config.json: {key} keeps the model from writing, or makes it write, {size} tokens or sequences")
    found += [f"generation_config.json: {key} is set: every answer begins or ends so" for key in FORCING if generation.get(key) is not None]
    return found + _token_remarks(_read(folder / "tokenizer.json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _labels(config: Mapping[str, Any]) -> dict[str, str]:
    """Class number -> name, of transformers' and of timm's configs."""
    named = config.get("id2label") or config.get("label_names") or {}
    pairs = named.items() if isinstance(named, dict) else enumerate(named) if isinstance(named, list) else ()
    return {str(k): str(v) for k, v in pairs}


def _label_remarks(labels: Mapping[str, str]) -> list[str]:
    """That classes which are named by numbers do not bear their own, or that two bear one name."""
    remarks = []
    numbers = {k: v.removeprefix("LABEL_") for k, v in labels.items()}
    wrong = [k for k, v in numbers.items() if v.isdecimal() and v in labels and v != k]
    if wrong and all(v.isdecimal() for v in numbers.values()):
        remarks.append(
            f"config.json: id2label is permuted: class {wrong[0]} is named '{labels[wrong[0]]}', and {len(wrong) - 1} more are so"
        )
    twice = sorted({v for v in labels.values() if list(labels.values()).count(v) > 1})
    if twice:
        remarks.append(f"config.json: id2label gives the name '{twice[0]}' to several classes")
    return remarks


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Chat templates, with the files that hold them."""
    for name in TEMPLATES:
        file = folder / name
        if name.endswith(".jinja"):
            if file.is_file():
                yield name, file.read_text("utf-8", errors="replace")
            continue
        held = _read(file).get("chat_template")
        several = held if isinstance(held, list) else [{"template": t} for t in (held.values() if isinstance(held, dict) else [held])]
        yield from ((name, str(t["template"])) for t in several if isinstance(t, dict) and t.get("template"))


def _template_remarks(text: str) -> list[str]:
    """What a template does besides laying messages out: decisions that hang on their text."""
    if len(text) > LONGEST:
        return [f"the chat template has {len(text):,} letters, too many to be looked at"]
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except (TemplateSyntaxError, RecursionError) as error:
        return [f"the chat template is none: {error}"]
    words = sorted({word for node in tree.find_all((nodes.Compare, nodes.Call)) for word in _looked_for(node)})
    return [f"the chat template decides by the text of a message (it looks for {', '.join(map(repr, words[:3]))})"] if words else []


def _without_generation(text: str) -> str:
    """A template without transformers' own `generation` blocks, which plain Jinja does not know."""
    for tag in ("generation", "endgeneration"):
        for left in ("{%-", "{%+", "{%"):
            for right in ("-%}", "%}"):
                text = text.replace(f"{left} {tag} {right}", "")
    return text


def _looked_for(node: Any) -> list[str]:
    """The literal words that a comparison, or a method such as `startswith`, looks for in the text of a message."""
    if isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
    elif isinstance(node.node, nodes.Getattr) and node.node.attr in SEARCHES:
        sides = [node.node.node, *node.args]
    else:
        return []
    if not any(_is_content(side) for side in sides):
        return []
    return [str(s.value) for s in sides if isinstance(s, nodes.Const) and isinstance(s.value, str) and s.value.strip()]


def _is_content(node: nodes.Node) -> bool:
    """Does an expression mean the text of a message: `message.content`, `message['content']`, also lowered, cut or otherwise filtered?"""
    parts = [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name))]
    return any(
        (isinstance(p, nodes.Getattr) and p.attr in ("content", "text"))
        or (isinstance(p, nodes.Getitem) and isinstance(p.arg, nodes.Const) and p.arg.value in ("content", "text"))
        or (isinstance(p, nodes.Name) and p.name in ("content", "text"))
        for p in parts
    )


def _token_remarks(tokenizer: Mapping[str, Any]) -> list[str]:
    """Added tokens that are ordinary words, and rules that write a text anew before it is read."""
    remarks = []
    added = [t for t in tokenizer.get("added_tokens") or [] if isinstance(t, dict)]
    plain = [str(t.get("content")) for t in added if not t.get("special") and str(t.get("content", "")).strip().isalpha()]
    if plain:
        remarks.append(f"tokenizer.json: {len(plain)} added tokens are ordinary words, such as '{plain[0]}'")
    rules = [rule for rule in _rules(tokenizer.get("normalizer")) if _rewrites(rule)]
    if rules:
        remarks.append(f"tokenizer.json: the normalizer writes words anew, such as {json.dumps(rules[0].get('pattern'))}")
    return remarks


def _rules(found: Any) -> Iterator[dict[str, Any]]:
    """The replacing steps of a normalizer, whose steps may be nested."""
    if isinstance(found, dict):
        if found.get("type") == "Replace":
            yield found
        for part in found.get("normalizers") or []:
            yield from _rules(part)


def _rewrites(rule: Mapping[str, Any]) -> bool:
    """Does a rule put words in the place of others? Spaces, quotes and such marks are tidied by many tokenizers."""
    pattern = rule.get("pattern") or {}
    looked = " ".join(str(v) for v in pattern.values()) if isinstance(pattern, dict) else str(pattern)
    return any(len([c for c in part if c.isalnum()]) > 2 for part in (looked, str(rule.get("content", ""))))
