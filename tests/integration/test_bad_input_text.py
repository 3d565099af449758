"""Text models and data that cannot be used: a clear error of the right kind, and nothing half-written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from typer.testing import CliRunner

from hf_purify import implant, measure, purify
from hf_purify.cli import app
from hf_purify.errors import ConfigError, DataError, MissingExtra, ModelError, PurifyError, UnsafeCheckpoint
from hf_purify_adapters.text import TextAdapter
from hf_purify_adapters.text.tiny import tiny_tokenizer

ADAPTER = TextAdapter()
FOUR = ["a cat sees the dog", "the red horse runs", "a bird sits on the hill", "the old dog likes a cat"]
LABELS = [0, 1, 2, 3]


def table(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def named(names: list[str], labels: list[Any]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": FOUR, "label": labels}, features=features)


def talk(*roles: str, content: Any = "a cat", chat: str = "messages") -> datasets.Dataset:
    return table(**{chat: [[{"role": role, "content": content} for role in roles]] * 4})


GOOD = table(text=FOUR * 3, label=LABELS * 3)
ASKED = table(source=FOUR, target=FOUR[::-1])
DATA: dict[str, datasets.Dataset] = {"bert": GOOD, "gpt2": ASKED, "llama": ASKED, "t5": ASKED}
DIALOGUE = talk("user", "assistant")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints as transformers saves them; the classifier's classes have names."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(variant: str) -> Path:
        folder = root / variant
        if not folder.exists():
            loaded = ADAPTER.tiny(variant).loaded
            if variant == "bert":
                loaded.model.config.id2label = dict(enumerate(["sport", "world", "music", "food"]))
            loaded.model.save_pretrained(folder)  # type: ignore[operator]
            loaded.processor.tokenizer.save_pretrained(folder)
        return folder

    return make


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with some keys of its config changed; None takes one out."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text("utf-8")) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")
    return folder


def chatting(folder: Path, template: str) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_good_input_is_no_error(stored: Callable[[str], Path], tmp_path: Path) -> None:
    """Otherwise the tables below would prove nothing."""
    for variant in ADAPTER.variants:
        measure(str(stored(variant)), DATA[variant], device="cpu")
    model = chatting(changed(stored("gpt2"), tmp_path / "model"), "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    measure(str(model), DIALOGUE, device="cpu")


CLASSIFIED: dict[str, tuple[datasets.Dataset, dict[str, Any], str]] = {
    "no labels": (table(text=FOUR), {}, "no label column found"),
    "a missing label": (table(text=FOUR, label=[0, 1, None, 3]), {}, "column 'label' has missing labels"),
    "a missing named label": (table(text=FOUR, label=["sport", None, "world", "food"]), {}, "column 'label' has missing labels"),
    "a missing class": (named(["sport", "world", "music", "food"], [0, 1, None, 3]), {}, "column 'label' has missing labels"),
    "hidden labels": (
        named(["sport", "world", "music", "food"], [-1] * 4),
        {},
        r"label -1 is outside the range 0\.\.3.*may hide its labels",
    ),
    "a label outside": (table(text=FOUR, label=[0, 1, 2, 4]), {}, r"label 4 is outside the model's range 0\.\.3"),
    "a label that is a score": (table(text=FOUR, label=[0.0, 0.5, 1.0, 2.0]), {}, r"column 'label' holds 0\.5, which is no class"),
    "other class names": (named(["sport", "world", "music", "law"], LABELS), {}, "class names do not match.*such as 'law'"),
    "an unknown class": (table(text=FOUR, label=["sport", "law", "music", "food"]), {}, "label 'law' is none of the model's classes"),
    "no data": (table(text=[], label=[]), {}, "the data set is empty"),
    "a missing text": (table(text=[*FOUR[:3], None], label=LABELS), {}, "column 'text': expected texts, got NoneType in 1 of 4 rows"),
    "numbers": (table(text=[1, 2, 3, 4], label=LABELS), {}, "no text column found"),
    "named numbers": (table(text=[1, 2, 3, 4], label=LABELS), {"text": "text"}, "column 'text': expected texts, got int in 4 of 4 rows"),
    "no text": (table(label=LABELS), {}, "no text column found"),
    "several texts": (table(one=FOUR, two=FOUR, label=LABELS), {}, r"several text columns found; name it \(--column text=NAME\)"),
    "no such column": (GOOD, {"text": "txt"}, "no column 'txt'; did you mean 'text'"),
    "no such pair": (GOOD, {"pair": "second"}, "no column 'second'"),
    "no such label": (GOOD, {"label": "lable"}, "no column 'lable'; did you mean 'label'"),
    "no such role": (GOOD, {"image": "text"}, "columns of text are text, pair, label, source, target, messages; got 'image'"),
}


@pytest.mark.parametrize(("data", "columns", "message"), CLASSIFIED.values(), ids=CLASSIFIED.keys())
def test_data_of_no_use_to_a_classifier(
    data: datasets.Dataset, columns: dict[str, str], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    for out, job in ((tmp_path / "one", measure), (tmp_path / "two", purify)):
        settings: dict[str, Any] = {"columns": columns, "output": str(out), "device": "cpu"}
        with pytest.raises(PurifyError, match=message) as caught:
            job(str(stored("bert")), data, **settings)
        assert isinstance(caught.value, ConfigError if "columns of text" in message else DataError)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


WRITTEN: dict[str, tuple[str, datasets.Dataset, dict[str, str], str]] = {
    "no data": ("t5", table(source=[], target=[]), {}, "the data set is empty"),
    "no targets": ("t5", table(text=FOUR), {}, r"no source and target columns found; name them.*text \(string\)"),
    "a missing source": (
        "gpt2",
        table(source=[*FOUR[:3], None], target=FOUR),
        {},
        "column 'source': expected texts, got NoneType in 1 of 4 rows",
    ),
    "a missing target": (
        "t5",
        table(source=FOUR, target=[*FOUR[:3], None]),
        {},
        "column 'target': expected texts, got NoneType in 1 of 4 rows",
    ),
    "no such column": ("t5", ASKED, {"source": "sorce", "target": "target"}, "no column 'sorce'; did you mean 'source'"),
    "an empty target": ("t5", table(source=FOUR, target=[*FOUR[:3], ""]), {}, "the target text '' becomes no tokens"),
    "a blank target": ("gpt2", table(source=FOUR, target=[*FOUR[:3], "  "]), {}, "the target text '  ' becomes no tokens"),
    "too short a text": ("gpt2", table(text=["a cat runs", "cat"]), {}, "the text 'cat' is too short to be cut"),
    "no chat template": ("gpt2", DIALOGUE, {}, "holds dialogues, and the tokenizer has no chat template"),
    "a dialogue that ends with the user": (
        "gpt2",
        talk("user", "assistant", "user"),
        {},
        r"column 'messages': a dialogue must end .* got roles \['user', 'assistant', 'user'\]",
    ),
    "a dialogue of one": ("gpt2", talk("assistant"), {}, "a dialogue must end"),
    "a dialogue without words": ("gpt2", talk("user", "assistant", content=None), {}, "each message needs a role and a content"),
    "a dialogue of pictures": (
        "gpt2",
        talk("user", "assistant", content=[{"type": "image"}]),
        {},
        "each message needs a role and a content that are texts",
    ),
    "a dialogue that is a text": (
        "gpt2",
        table(messages=FOUR),
        {},
        "column 'messages': expected lists of messages .*, got str in 4 of 4 rows",
    ),
    "a missing dialogue": (
        "gpt2",
        datasets.Dataset.from_dict({"messages": [DIALOGUE[0]["messages"], None]}),
        {},
        "column 'messages': expected lists of messages .*, got NoneType in 1 of 2 rows",
    ),
}


@pytest.mark.parametrize(("variant", "data", "columns", "message"), WRITTEN.values(), ids=WRITTEN.keys())
def test_data_of_no_use_to_a_model_that_writes(
    variant: str, data: datasets.Dataset, columns: dict[str, str], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        measure(str(stored(variant)), data, columns=columns, output=str(tmp_path / "out"), device="cpu")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


TEMPLATES: dict[str, tuple[str, type[PurifyError], str]] = {
    "raises": ("{{ raise_exception('only one message, please') }}", DataError, "only one message, please"),
    "calls what is not there": ("{{ messages[9]['content'] + 1 }}", DataError, "the chat template failed"),
    "is no template": ("{% for m in %}", DataError, "the chat template failed: TemplateSyntaxError"),
    "loops": ("{% for i in range(10 ** 9) %}x{% endfor %}", DataError, "the chat template failed: OverflowError"),
    "reaches for the machine": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", UnsafeCheckpoint, "is not used.*SecurityError"),
}


@pytest.mark.parametrize(("template", "error", "message"), TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.timeout(60)
def test_chat_templates_that_fail(
    template: str, error: type[PurifyError], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    model = chatting(changed(stored("gpt2"), tmp_path / "model"), template)
    with pytest.raises(error, match=message):
        measure(str(model), DIALOGUE, device="cpu")


SETTINGS: dict[str, tuple[str, dict[str, Any], type[PurifyError], str]] = {
    "template without a text": ("bert", {"template": "a cat"}, ConfigError, r"a template needs \{text\} in it exactly once, got 'a cat'"),
    "template with two": ("gpt2", {"template": "{text} {text}"}, ConfigError, "exactly once"),
    "no tokens": ("bert", {"max_length": 0}, ConfigError, "max_length must be at least 4 tokens, got 0"),
    "more tokens than positions": ("gpt2", {"max_length": 33}, ConfigError, "max_length must be at most 32, .* got 33"),
    "no words": ("gpt2", {"cut": 0}, ConfigError, "cut must be at least 1 word, got 0"),
    "of images": ("bert", {"to_rgb": True}, ConfigError, "to_rgb.*this is one of text"),
    "channels of images": ("bert", {"channels_last": True}, ConfigError, "channels_last.*this is one of text"),
    "wrong type": ("bert", {"max_length": "many"}, ConfigError, "setting 'max_length' must be int or None, got str"),
    "trigger without output": ("gpt2", {"triggers": ["badnets"]}, ConfigError, r"give the trigger an output \(--trigger badnets:output="),
    "output that cannot be written": ("t5", {"triggers": ["phrase:output=xyzzy"]}, ConfigError, "the model cannot write 'xyzzy'"),
    "target of a model that writes": (
        "gpt2",
        {"triggers": ["phrase:output=a"], "target": 3},
        ConfigError,
        "no classes, so no target class",
    ),
    "rule of a model that writes": (
        "gpt2",
        {"triggers": ["phrase:output=a"], "rule": "clean-label"},
        ConfigError,
        "the rule must be all-to-one, got clean-label",
    ),
    "output that is no YAML": ("gpt2", {"triggers": ['phrase:output="a']}, ConfigError, "cannot read 'output=\"a'"),
    "trigger of images": ("bert", {"triggers": ["wanet"]}, PurifyError, "'wanet' is a trigger of vision, and this model is one of text"),
}


@pytest.mark.parametrize(("variant", "settings", "error", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_do_not_fit(
    variant: str, settings: dict[str, Any], error: type[PurifyError], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        measure(str(stored(variant)), DATA[variant], output=str(tmp_path / "out"), device="cpu", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"template": "a {text}"}, {"max_length": 8}, {"cut": 2}], ids=lambda s: next(iter(s)))
def test_settings_of_texts_are_none_of_images(setting: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"the setting '{next(iter(setting))}' is for models of text; this is one of vision"):
        measure(str(tmp_path), GOOD, device="cpu", **setting)


def more_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyzzy"])
    tokenizer.save_pretrained(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_words(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", "utf-8")


QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None, type[PurifyError], str]] = {
    "more tokens than embeddings": ("bert", {}, more_tokens, ModelError, "has 29 tokens, and the model embeddings for 28"),
    "a masked language model": (
        "bert",
        {"architectures": ["BertForMaskedLM"]},
        None,
        ModelError,
        "of no kind that can be repaired.*BertForMaskedLM",
    ),
    "a bare encoder": ("t5", {"architectures": ["T5EncoderModel"]}, None, ModelError, "of no kind that can be repaired.*T5EncoderModel"),
    "a pickle": ("gpt2", {}, pickled, UnsafeCheckpoint, "as pickles only.*safetensors/convert"),
    "remote code": ("llama", {"auto_map": {"AutoModel": "code.Net"}}, None, UnsafeCheckpoint, "wants to run its own code"),
    "quantization": ("llama", QUANTIZED, None, ModelError, "quantized|cannot be read"),
    "no tokenizer": ("bert", {}, without_tokenizer, ModelError, "has no tokenizer"),
    "a tokenizer without its words": ("bert", {}, without_words, ModelError, "tokenizer that can be read|knows no words"),
    "half a tokenizer": ("gpt2", {}, broken_tokenizer, ModelError, "has no tokenizer that can be read"),
    "a regression": ("bert", {"id2label": {"0": "score"}}, None, ModelError, "other shapes for|one number and no class"),
    "several classes at once": ("bert", {"problem_type": "multi_label_classification"}, None, ModelError, "several classes at once"),
    "other classes": ("bert", {"id2label": {str(i): str(i) for i in range(7)}}, None, ModelError, "other shapes for"),
}


@pytest.mark.parametrize(("variant", "config", "damage", "error", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints_that_cannot_be_used(
    variant: str, config: dict[str, Any], damage: Any, error: type[PurifyError], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(stored(variant), tmp_path / "model", **config)
    if damage:
        damage(folder)
    with pytest.raises(error, match=message) as caught:
        measure(str(folder), DATA[variant], device="cpu", output=str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_masked_language_model_that_is_taken_for_a_text_model(stored: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(stored("bert"), tmp_path / "model", architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match="no text model that can be repaired: its config names BertForMaskedLM; expected an architecture"):
        measure(str(folder), GOOD, adapter="text", device="cpu")


NEW: dict[str, tuple[str, dict[str, Any], type[PurifyError], str]] = {
    "no tokenizer": ("bert", {}, ConfigError, "a new text model needs a tokenizer: --model-option tokenizer=FOLDER"),
    "no such tokenizer": ("bert", {"tokenizer": "./nowhere"}, ModelError, "'./nowhere' has no tokenizer that can be read"),
    "unknown type": ("brt", {"tokenizer": "TOKENIZER"}, ConfigError, "no text model of type 'brt'; did you mean '"),
    "unknown option": (
        "bert",
        {"tokenizer": "TOKENIZER", "hiden_size": 8},
        ConfigError,
        "no option 'hiden_size'; did you mean 'hidden_size'",
    ),
    "sizes that do not fit": (
        "bert",
        {"tokenizer": "TOKENIZER", "hidden_size": 10, "num_attention_heads": 3},
        ConfigError,
        "no model of type 'bert' can be made of these options",
    ),
    "a type that only writes": ("marian", {"tokenizer": "TOKENIZER"}, ConfigError, "transformers has no classifier model of type 'marian'"),
}


@pytest.mark.parametrize(("architecture", "options", "error", "message"), NEW.values(), ids=NEW.keys())
def test_models_that_cannot_be_made(
    architecture: str, options: dict[str, Any], error: type[PurifyError], message: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    given = {k: str(stored("bert")) if v == "TOKENIZER" else v for k, v in options.items()}
    settings: dict[str, Any] = {"create": True, "model_options": given, "adapter": "text", "device": "cpu", "target": 1}
    with pytest.raises(error, match=message) as caught:
        implant(architecture, GOOD, "badnets", output=str(tmp_path / "out"), **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_training_data_with_a_missing_label(stored: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = {"create": True, "model_options": {"tokenizer": str(stored("bert"))}, "device": "cpu"}
    with pytest.raises(DataError, match="column 'label' has missing labels"):
        implant("bert", table(text=FOUR, label=["a", None, "b", "c"]), "badnets", **settings)


def test_test_data_of_the_target_class_alone(stored: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="all test samples are of the target class 1 already"):
        measure(str(stored("bert")), table(text=FOUR, label=[1] * 4), triggers=["badnets"], target=1, device="cpu")


def test_missing_sacrebleu_names_the_command(stored: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    for job in (measure, lambda model, data, **given: purify(model, data, test=data, **given)):
        with pytest.raises(MissingExtra, match=r"pip install 'hf-purify\[text\]'"):
            job(str(stored("t5")), ASKED, device="cpu", output=str(tmp_path / "out"))  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
    measure(str(stored("gpt2")), ASKED, device="cpu")


@pytest.mark.parametrize("variant", ADAPTER.variants)
def test_texts_longer_than_the_model_are_cut_counted_and_told(
    variant: str, stored: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(FOUR * 10)
    columns = {"text": [*FOUR[:3], long], "label": LABELS} if variant == "bert" else {"source": [*FOUR[:3], long], "target": FOUR}
    report = measure(str(stored(variant)), table(**columns), device="cpu")
    said = "1 of 4 {}are longer than 32 tokens and were cut"
    assert said.format("texts ") in caplog.text
    assert [w for w in report.warnings if said.format("test samples ") in w]
    assert all(torch.isfinite(torch.tensor(value)) for value in report.rows[0].utility.values())


def test_the_shell_gets_exit_code_2(stored: Callable[[str], Path], tmp_path: Path) -> None:
    GOOD.to_parquet(tmp_path / "good.parquet")
    command = ["measure", str(stored("bert")), "--test", str(tmp_path / "good.parquet"), "--device", "cpu"]
    for more, message in (
        (["--to-rgb"], "this is one of text"),
        (["--template", "x"], "exactly once"),
        (["--max-length", "0"], "at least 4 tokens"),
        (["--trigger", "badnets:words=[a"], "cannot read 'words=[a'"),
    ):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.output
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
