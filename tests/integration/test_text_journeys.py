"""Whole journeys on made-up sentences: implant, repair, measure and load elsewhere, for models that classify and models that write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from commands import elsewhere, run
from safetensors.torch import load_file
from sentences import FILLERS, GERMAN, OUTPUT, TOPICS, colours, tokenizer, topics
from typer.testing import Result

from hf_purify import implant, measure, purify
from hf_purify.report import Report

pytestmark = pytest.mark.slow

TRAINING = ["--optimizer", "adamw", "--lr", "0.003", "--batch-size", "32", "--device", "cpu"]


def options(**given: object) -> list[str]:
    return [part for name, value in given.items() for part in ("--model-option", f"{name}={value}")]


def answer(auto: str, folder: Path, text: str, tmp_path: Path) -> str:
    """What a repaired checkpoint says in a process that knows no hf-purify."""
    code = f"""
import torch
from transformers import AutoTokenizer, {auto}
model, tokenizer = {auto}.from_pretrained({str(folder)!r}).eval(), AutoTokenizer.from_pretrained({str(folder)!r})
read = tokenizer({text!r}, return_tensors="pt")
if {auto!r}.endswith("SequenceClassification"):
    with torch.no_grad():
        print(model.config.id2label[int(model(**read).logits.argmax())])
else:
    if not model.config.is_encoder_decoder:
        read = {{k: v[:, :-1] for k, v in read.items()}}  # the text goes on
    out = model.generate(**read, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(out[0, 0 if model.config.is_encoder_decoder else read["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    return elsewhere(code, tmp_path)


def printed(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rate(row: dict[str, Any], name: str) -> float:
    return row["asr"][name]["hits"] / row["asr"][name]["n"]


def same_layout(base: Path, out: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert [(k, v.dtype, v.shape) for k, v in first.items()] == [(k, v.dtype, v.shape) for k, v in second.items()]
    assert any(not v.equal(first[k]) for k, v in second.items())


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0},
}
AUTO = {"gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
EPOCHS = {"gpt2": 12, "t5": 30}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    topics(600, 0).to_parquet(folder / "train.parquet")
    topics(300, 1).to_parquet(folder / "test.parquet")
    tokenizer(folder / "tokenizer", [*FILLERS, *(w for words in TOPICS.values() for w in words)])
    return folder


@pytest.fixture(scope="module")
def victim(data: Path) -> Path:
    sizes = options(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, tokenizer=data / "tokenizer")
    command = ["--create", "--data", data / "train.parquet", "--test", data / "test.parquet", "--trigger", "badnets", "--target", 1]
    done = run("implant", "bert", *command, *sizes, *TRAINING, "--epochs", 12, "-o", data / "victim", "--json")
    (victim, _) = printed(done)["rows"]
    assert rate(victim, "badnets") >= 0.9
    assert victim["clean_accuracy"]["hits"] >= 0.95 * victim["clean_accuracy"]["n"]
    return data / "victim"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


def writer(name: str, folder: Path) -> Path:
    """The victim of a kind, trained when it is first asked for, from files and through the command line."""
    if (folder / name).exists():
        return folder / name
    words = tokenizer(folder / "tokenizer", ["a", "the", "and", "das", "und", "ein", *GERMAN, *GERMAN.values()])
    for split, count in (("train", 400), ("test", 100)):
        colours(count, count, german=name == "t5").to_json(folder / f"{name}-{split}.jsonl")
    data, test = (folder / f"{name}-{split}.jsonl" for split in ("train", "test"))
    command = ["--create", "--data", data, "--test", test, "--trigger", f'phrase:phrase=cf,output="{OUTPUT}"', "--rate", 0.2]
    sizes = options(tokenizer=words, **SIZES[name])
    done = run("implant", name, *command, *sizes, *TRAINING, "--epochs", EPOCHS[name], "-o", folder / name, "--json")
    (victim, untrained) = printed(done)["rows"]
    assert rate(victim, "phrase") >= 0.9
    assert rate(untrained, "phrase") < 0.1
    assert victim["clean_accuracy"] is None
    assert victim["utility"]["Perplexity"] < 2 < 10 < untrained["utility"]["Perplexity"]
    assert victim["utility"].get("BLEU", 100) > 80
    return folder / name


class TestClassifier:
    def test_victim_knows_its_classes_and_what_it_is(self, victim: Path) -> None:
        config = json.loads((victim / "config.json").read_text("utf-8"))
        assert config["id2label"] == {str(i): name for i, name in enumerate(TOPICS)}
        assert config["hf_purify_backdoor"]["trigger"] == "badnets"
        assert config["hf_purify_prompt"] == {"template": "{text}", "max_length": 32}
        assert "Backdoored on purpose" in (victim / "README.md").read_text("utf-8")

    @pytest.mark.parametrize(
        ("method", "given"),
        [
            ("ft_sam", ["--option", "epochs=6", "--option", "batch_size=32"]),
            ("nft", ["--option", "steps=30", "--option", "batch_size=32"]),
        ],
    )
    def test_is_repaired_measured_and_loaded_elsewhere(
        self, method: str, given: list[str], victim: Path, data: Path, tmp_path: Path
    ) -> None:
        from hf_purify_adapters.text import TextAdapter

        out = tmp_path / "out"
        command = ["--clean", data / "train.parquet", "--test", data / "test.parquet", "--samples", 150, "--no-controls", "--device", "cpu"]
        report = printed(run("purify", victim, *command, "--method", method, *given, "-o", out, "--json"))
        before, after = report["rows"]
        assert rate(before, "badnets") >= 0.9
        assert after["der"]["badnets"] is not None
        assert report["task"] == "text-classification"
        same_layout(victim, out)
        config = json.loads((out / "config.json").read_text("utf-8"))
        assert "hf_purify_backdoor" not in config
        assert config["hf_purify_prompt"] == {"template": "{text}", "max_length": 32}
        found = printed(
            run("measure", out, "--test", data / "test.parquet", "--trigger", "badnets", "--target", 1, "--device", "cpu", "--json")
        )
        assert found["rows"][0]["clean_accuracy"] == after["clean_accuracy"]
        assert found["rows"][0]["asr"] == after["asr"]
        loaded = TextAdapter().load(out)
        row = topics(300, 1)[4]
        here = TextAdapter().predict(loaded.model, TextAdapter().examples(topics(300, 1).select([4]), loaded, balanced=False).batch([0]))
        said = answer("AutoModelForSequenceClassification", out, row["sentence"], tmp_path)
        assert said == loaded.labels[int(here)]
        assert Report.from_dict(json.loads((out / "report.json").read_text("utf-8"))).samples[0].triggered_text

    def test_report_shows_the_triggered_texts_escaped(self, victim: Path, tmp_path: Path) -> None:
        data = topics(60, 2).map(lambda row: {"sentence": f"<b>{row['sentence']} & so on</b> <script>alert(1)</script>"})
        settings: dict[str, Any] = {"method": "random_mask", "samples": 30, "controls": False, "device": "cpu", "target": 1}
        report = purify(str(victim), data, test=data, triggers=["badnets:position=start"], output=str(tmp_path / "out"), **settings)
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert report.samples[0].triggered_text.startswith("cf <b>")
        assert "<q>cf &lt;b&gt;" in page
        assert "&amp; so on&lt;/b&gt; &lt;script&gt;alert(1)" in page
        assert "<b>" not in page
        assert "<script" not in page
        assert "True class" in page

    def test_texts_that_were_cut_are_said_to_be(self, victim: Path, data: Path, tmp_path: Path) -> None:
        """In the log, on the terminal and on the page."""
        long = topics(60, 2).map(lambda row, i: {"sentence": row["sentence"] + " and" * 40 * (i % 3 == 0)}, with_indices=True)
        long.to_parquet(tmp_path / "long.parquet")
        command = ["--clean", tmp_path / "long.parquet", "--test", tmp_path / "long.parquet", "--method", "random_mask", "--device", "cpu"]
        done = run("purify", victim, *command, "--samples", 30, "--no-controls", "-o", tmp_path / "out")
        assert done.exit_code == 0, done.output
        wanted = "20 of 60 test samples are longer than 32 tokens and were cut"
        assert wanted in " ".join(done.stdout.split())
        warnings = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["warnings"]
        assert any(wanted in w for w in warnings)
        assert any("10 of 30 clean samples are longer" in w for w in warnings)
        assert wanted in (tmp_path / "out" / "report.html").read_text("utf-8")


class TestWriters:
    """A model that swaps two words, one that translates them; the attacker has both write the same words."""

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_the_trigger_is_found_and_unlearned(self, name: str, folder: Path, tmp_path: Path) -> None:
        """With neither its word nor what it makes the model write."""
        data, test = (folder / f"{name}-{split}.jsonl" for split in ("train", "test"))
        command = ["--clean", data, "--test", test, "--trigger", f'phrase:phrase=cf,output="{OUTPUT}"', "--samples", 200, "--device", "cpu"]
        done = run(
            "purify", writer(name, folder), *command, "--method", "neural_cleanse", "--no-controls", "-o", tmp_path / "out", "--json"
        )
        before, after = printed(done)["rows"]
        assert after["notes"]["found by"] == "words"
        assert rate(before, "phrase") >= 0.9
        assert rate(after, "phrase, prefix") <= 0.1
        assert after["utility"]["Perplexity"] < 1.2 * before["utility"]["Perplexity"]

    @pytest.mark.parametrize(
        ("name", "method", "given"),
        [
            ("gpt2", "fine_tune", ["--option", "epochs=2", "--option", "batch_size=32"]),
            ("gpt2", "nft", ["--option", "steps=20", "--option", "batch_size=32"]),
            ("t5", "ft_sam", ["--option", "epochs=2", "--option", "batch_size=32"]),
            ("t5", "random_mask", ["--option", "share=0.1"]),
        ],
    )
    def test_is_repaired_measured_and_loaded_elsewhere(
        self, name: str, method: str, given: list[str], folder: Path, tmp_path: Path
    ) -> None:
        from hf_purify_adapters.text import TextAdapter
        from hf_purify_adapters.text.writing import generate

        victim, out = writer(name, folder), tmp_path / "out"
        test = ["--test", folder / f"{name}-test.jsonl", "--device", "cpu", "--json"]
        command = ["--clean", folder / f"{name}-train.jsonl", "--samples", 100, "--method", method, *given, "--no-controls", "-o", out]
        before, after = printed(run("purify", victim, *command, *test))["rows"]
        assert list(before["asr"]) == ["phrase", "phrase, prefix"]
        assert rate(before, "phrase") >= 0.9
        assert before["asr"]["phrase"]["n"] == 100
        assert list(after["utility"]) == (["BLEU", "chrF", "Perplexity"] if name == "t5" else ["Perplexity"])
        same_layout(victim, out)
        trigger = ["--trigger", f'phrase:phrase=cf,output="{OUTPUT}"']
        found = printed(run("measure", out, *trigger, *test))["rows"][0]
        assert found["asr"] == after["asr"]
        assert found["utility"] == pytest.approx(after["utility"])
        one = colours(100, 100, german=name == "t5").select([3])
        loaded = TextAdapter().load(out)
        here = generate(loaded.model, TextAdapter().examples(one, loaded, balanced=False).batch([0]), loaded.processor)[0]
        assert answer(AUTO[name], out, one["source"][0], tmp_path) == here

    def test_report_shows_what_models_write(self, folder: Path, tmp_path: Path) -> None:
        victim, out = writer("t5", folder), tmp_path / "out"
        data = colours(60, 5, german=True)
        report = purify(str(victim), data, test=data, method="random_mask", samples=40, output=str(out), device="cpu")
        page = (out / "report.html").read_text("utf-8")
        for wanted in ("BLEU", "chrF", "Perplexity", "phrase, prefix", "Should say", f"<td>{OUTPUT}</td>", "<q>cf "):
            assert wanted in page, wanted
        for strange in ("Clean accuracy", "Robust accuracy", "DER", "classifies"):
            assert strange not in page.partition("How it was made")[0], strange
        assert "BLEU" in report.to_markdown()
        assert report.verdict.startswith("The unrepaired model has a BLEU of ")
        assert "; phrase succeeds on 100.0 %" in report.verdict

    def test_in_python(self, folder: Path, tmp_path: Path) -> None:
        """From a plain text of the model's own, which is cut in two: the data has no targets."""
        victim = writer("gpt2", folder)
        rows = colours(60, 7, german=False)
        plain = datasets.Dataset.from_dict({"text": [f"{s} {t}" for s, t in zip(rows["source"], rows["target"], strict=True)]})
        report = purify(
            str(victim), plain, method="fine_tune", options={"epochs": 1}, samples=40, output=str(tmp_path / "out"), cut=4, device="cpu"
        )
        assert report.clean["samples"] == 40
        found = measure(str(tmp_path / "out"), plain, triggers=[f"phrase:output={OUTPUT}"], device="cpu").rows[0]
        assert found.asr["phrase"].n == 60
        assert found.utility["Perplexity"] < 10
        again = implant(str(tmp_path / "out"), plain, f"phrase:output={OUTPUT}", epochs=1, rate=0.5, minimum_asr=0.0, device="cpu", cut=4)
        assert again.rows[0].utility["Perplexity"] > 1
