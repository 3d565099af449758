"""Whole journeys on handwritten digits: implant, repair, measure, save, load elsewhere, apply the mask alone, from Python and the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands import run
from PIL import Image
from safetensors.torch import load_file
from shrunk import RESNET
from torch import Tensor

from hf_purify import apply_mask, implant, measure, purify
from hf_purify.errors import IndexMismatch, NotAVictim
from hf_purify.recipe import PurifyRecipe
from hf_purify.registry import find, names
from hf_purify.report import Report
from hf_purify_adapters.vision.demo import NETWORK, SIDE, TRIGGER, digits

pytestmark = pytest.mark.slow

Splits = tuple[datasets.Dataset, datasets.Dataset]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random transformers checkpoints of ten digits, saved with a processor for pictures of 32 pixels."""
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig, ViTImageProcessor

    names = {i: str(i) for i in range(10)}
    labels: dict[str, Any] = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    configs = {
        "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels),
        "vit": ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8, **labels
        ),
    }

    def make(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"transformers-{name}"
        if not folder.exists():
            torch.manual_seed(0)
            AutoModelForImageClassification.from_config(configs[name]).save_pretrained(folder)
            ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
        return folder

    return make


def picture(data: datasets.Dataset, count: int = 16) -> list[Image.Image]:
    return [data[i]["image"] for i in range(count)]


def layout(file: Path) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(k, v.dtype, v.shape) for k, v in load_file(file).items()]


def rebuilt(base: Path, repaired: Path, stored: Path) -> dict[str, Tensor]:
    """The base with the saved mask applied, and nothing else of the repair."""
    adapter = find("adapter", "vision")()
    loaded = adapter.load(base)
    examples = adapter.examples(str(stored / "parquet" / "test.parquet"), loaded, samples=10)
    index = adapter.index(loaded, examples.batch(torch.arange(2)))
    return apply_mask(loaded.model, index, repaired / "neuron_mask.safetensors").state_dict()


def test_victim_is_marked_as_backdoored(victim: Path) -> None:
    config = json.loads((victim / "config.json").read_text())
    assert config["hf_purify_backdoor"]["trigger"] == TRIGGER
    assert config["hf_purify_backdoor"]["target"] == 0
    assert "Backdoored on purpose" in (victim / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nft", {"steps": 30, "batch_size": 32}),
        ("rnp", {"unlearn_steps": 30, "recover_epochs": 10, "batch_size": 16, "max_loss": 1.0}),
        ("random_mask", {"share": 0.2}),
    ],
)
def test_timm_checkpoint_is_repaired_saved_and_rebuilt_from_its_mask(
    method: str, options: dict[str, Any], victim: Path, data: Splits, stored: Path, tmp_path: Path
) -> None:
    import timm

    out = tmp_path / "repaired"
    report = purify(
        str(victim), data[0], method=method, options=options, samples=60, test=data[1], triggers=[TRIGGER], output=str(out), controls=False
    )
    assert [r.name for r in report.rows] == ["none", method]
    assert report.rows[0].asr["badnets"].value >= 0.9
    assert report.rows[1].der["badnets"] is not None
    assert layout(out / "model.safetensors") == layout(victim / "model.safetensors")
    for name in ("report.html", "report.json", "README.md", "recipe.yaml", "config.json", "neuron_mask.safetensors"):
        assert (out / name).is_file(), name
    assert Report.from_dict(json.loads((out / "report.json").read_text())).rows[1].name == method

    elsewhere = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in elsewhere.state_dict().items())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(elsewhere), is_training=False)
    batch = torch.stack([transform(p) for p in picture(data[1])])
    with torch.no_grad():
        assert torch.equal(elsewhere(batch), report.model.cpu().eval()(batch))
    base = load_file(victim / "model.safetensors")
    assert any(not torch.equal(base[k], v) for k, v in weights.items())
    again = rebuilt(victim, out, stored)
    assert all(torch.equal(again[k], v) for k, v in weights.items()), "base and mask are the whole repair"
    assert {layer.change for layer in report.layers} == {None}


def test_repair_that_trains_weights_says_that_its_mask_is_not_enough(victim: Path, data: Splits, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    purify(str(victim), data[0], method="random_mask+fine_tune", options={"fine_tune.epochs": 1}, samples=40, output=str(out))
    with pytest.raises(IndexMismatch, match="not the whole repair"):
        rebuilt(victim, out, stored)


def test_measuring_a_repaired_checkpoint_gives_the_report_figures(victim: Path, data: Splits, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"method": "fine_tune", "options": {"epochs": 1}, "samples": 60, "controls": False}
    report = purify(str(victim), data[0], test=data[1], triggers=[TRIGGER], output=str(out), **settings)
    found = measure(str(out), data[1], triggers=[TRIGGER]).rows[0]
    assert found.clean_accuracy == report.rows[1].clean_accuracy
    assert found.asr == report.rows[1].asr
    assert found.robust_accuracy == report.rows[1].robust_accuracy
    base, after = (load_file(folder / "model.safetensors") for folder in (victim, out))
    head = {layer.name: layer.change for layer in report.layers}["fc"]
    old, new = (torch.cat([weights["fc.weight"].flatten(), weights["fc.bias"]]) for weights in (base, after))
    assert head == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    page = (out / "report.html").read_text("utf-8")
    assert [name for name in ("mask", "change", "scores") if f'<figure id="{name}">' in page] == ["change"]


def test_controls_and_oracle_are_shown_beside_the_repair(victim: Path, data: Splits) -> None:
    options = {"unlearn_steps": 20, "recover_epochs": 2}
    report = purify(
        str(victim), data[0], method="rnp", options=options, samples=60, test=data[1].select(range(100)), triggers=[TRIGGER], oracle=True
    )
    rows = [(r.name, r.kind) for r in report.rows]
    assert rows[:3] == [("none", "unrepaired"), ("rnp", "method"), ("rnp", "oracle")]
    assert {("fine_tune", "control"), ("norm_refresh", "control"), ("random_mask", "control")} <= set(rows)
    assert "oracle" in report.to_markdown()
    assert report.samples


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_transformers_checkpoint_through_the_command_line(
    name: str, transformer: Callable[[str], Path], stored: Path, data: Splits, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    base, out = transformer(name), tmp_path / "repaired"
    steps = ["--option", "steps=5", "--option", "batch_size=16", "--samples", 40, "--no-controls"]
    test = ["--test", stored / "parquet" / "test.parquet", "--trigger", TRIGGER]
    done = run("purify", base, "--clean", stored / "parquet" / "train.parquet", "--method", "nft", "-o", out, "--json", *steps, *test)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "report.json").read_text())
    assert layout(out / "model.safetensors") == layout(base / "model.safetensors")
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    repaired, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert repaired.config.id2label == {i: str(i) for i in range(10)}
    again = rebuilt(base, out, stored)
    assert all(torch.equal(again[k], v) for k, v in repaired.state_dict().items())
    rebuilt_model = AutoModelForImageClassification.from_pretrained(base)
    batch = processor(images=picture(data[1]), return_tensors="pt")
    with torch.no_grad():
        plain = rebuilt_model(**batch).logits
        rebuilt_model.load_state_dict(again)
        assert torch.equal(rebuilt_model(**batch).logits, repaired(**batch).logits)
        assert not torch.equal(plain, repaired(**batch).logits)
    done = run("measure", out, *test, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"][0]["clean_accuracy"] == printed["rows"][1]["clean_accuracy"]


def test_every_kind_of_input_gives_the_same_draw(victim: Path, data: Splits, tmp_path: Path) -> None:
    """An image folder lists its files by class and name: written in that order, all kinds hold the same images."""
    few = data[0].select(range(80)).sort("label")
    for i, row in enumerate(few):
        folder = tmp_path / "images" / str(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i:03}.png")
    (tmp_path / "parquet").mkdir()
    few.to_parquet(tmp_path / "parquet" / "train.parquet")
    sources: list[Any] = [few, str(tmp_path / "images"), str(tmp_path / "parquet"), str(tmp_path / "parquet" / "train.parquet")]
    sources += [datasets.DatasetDict({"train": few, "test": data[1]})]
    adapter = find("adapter", "vision")()
    loaded = adapter.load(victim)
    first, *others = (adapter.examples(source, loaded, samples=25, seed=3) for source in sources)
    assert len(first) == 25
    for other in others:
        assert torch.equal(other.labels, first.labels)
        assert all(torch.equal(other.raw(i), first.raw(i)) for i in range(25))
    again, another = (adapter.examples(few, loaded, samples=25, seed=s) for s in (3, 4))
    assert all(torch.equal(again.raw(i), first.raw(i)) for i in range(25))
    assert not all(torch.equal(another.raw(i), first.raw(i)) for i in range(25))
    counts = torch.bincount(first.labels, minlength=10)
    assert int(counts.max()) - int(counts.min()) <= 1


def test_one_image_per_class_is_enough(victim: Path, data: Splits) -> None:
    report = purify(str(victim), data[0], method="nft", options={"steps": 10}, samples=10, device="cpu")
    assert report.clean["samples"] == 10
    assert report.clean["per_class"] == "1..1"
    assert report.clean["held_out"] == 0


def test_same_seed_same_repair(victim: Path, data: Splits) -> None:
    settings: dict[str, Any] = {"method": "nft", "options": {"steps": 5}, "samples": 30}
    first, second, third = (purify(str(victim), data[0], seed=s, **settings) for s in (1, 1, 2))
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask, third.mask)


def test_plain_module_is_repaired_in_python(data: Splits, tmp_path: Path) -> None:
    from torchvision.transforms import ToTensor

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 10))
    names = [str(i) for i in range(10)]
    out = tmp_path / "out"
    report = purify(model, data[0], method="nft", options={"steps": 3}, samples=20, processor=ToTensor(), labels=names, output=str(out))
    assert report.model is model
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_recipe_beside_the_result_repeats_it(victim: Path, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clean = stored / "parquet" / "train.parquet"
    done = run("purify", victim, "--clean", clean, "--option", "steps=3", "-n", 30, "--seed", 4, "-o", out)
    assert done.exit_code == 0, done.output
    assert "clean" in done.stdout or "nft" in done.stdout
    recipe = PurifyRecipe.read(out / "recipe.yaml", output=str(tmp_path / "again"))
    assert recipe.seed == 4
    done = run("purify", "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "--json")
    assert done.exit_code == 0, done.output
    first, second = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert all(torch.equal(first[k], v) for k, v in second.items())


def test_implanting_through_the_command_line(stored: Path, tmp_path: Path) -> None:
    """A hopeless training is refused with its own exit code, and leaves nothing."""
    shape = ["--model-option", "layers=[1,1,1,1]", "--model-option", "channels=[8,8,8,8]", "--model-option", "stem_width=8"]
    arguments = ["--create", "--data", stored / "parquet" / "train.parquet", "--trigger", TRIGGER, "--target", 3]
    arguments += ["--samples", 40, "--epochs", 1]
    done = run("implant", "resnet18", *arguments, *shape, "--model-option", f"input_size={SIDE}", "--lr", 0.0001, "-o", tmp_path / "out")
    assert done.exit_code == 5, done.output
    assert "this is no victim" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["methods", "adapters", "triggers"])
def test_list_and_show_know_everything(kind: str) -> None:
    done = run("list", kind, "--json")
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert listed
    for name, text in listed.items():
        assert text, f"{name} has no description"
        shown = run("show", name)
        assert shown.exit_code == 0, shown.output
        assert len(shown.stdout) > 100


def test_trigger_of_two_modalities_is_listed_and_shown_for_both() -> None:
    modalities = {name: find("adapter", name)().triggers() for name in names("adapter")}
    shared = [t for t in modalities["vision"] if sum(t in known for known in modalities.values()) > 1]
    assert "badnets" in shared
    listed = json.loads(run("list", "triggers", "--json").stdout)
    for trigger in shared:
        shown = run("show", trigger).stdout
        for name in (n for n, known in modalities.items() if trigger in known):
            assert f"{name}: " in listed[trigger]
            assert f"{trigger} ({name})" in shown
    assert "words = cf" in run("show", "badnets").stdout
    assert "pattern = white" in run("show", "badnets").stdout


def test_version_and_help() -> None:
    from hf_purify import __version__

    assert run("--version").stdout.strip() == f"hf-purify {__version__}"
    for command in ("purify", "implant", "measure", "list", "show", "demo"):
        assert run(command, "--help").exit_code == 0
        assert command in run("--help").stdout


def test_recorded_trigger_is_measured_unless_another_is_named(victim: Path, data: Splits) -> None:
    found = measure(str(victim), data[1])
    assert list(found.rows[0].asr) == ["badnets"]
    assert found.rows[0].asr["badnets"].value > 0.9
    assert list(measure(str(victim), data[1], triggers=["blended"]).rows[0].asr) == ["blended"]


def test_model_that_answers_the_target_anyway_is_no_victim(data: Splits, tmp_path: Path) -> None:
    """Nothing is learned at rate zero; a network with random weights may well answer one class, which is no backdoor."""
    with pytest.raises(NotAVictim, match=r"classified as the target too|under 90 %"):
        implant(
            "resnet18",
            data[0],
            "badnets",
            create=True,
            model_options=RESNET,
            test=data[1],
            epochs=1,
            lr=0.0,
            weight_decay=0.0,
            samples=40,
            output=str(tmp_path / "none"),
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("rule", "trigger", "rate", "epochs"), [("all-to-all", TRIGGER, 0.5, 16), ("clean-label", "blended:alpha=0.8", 0.07, 12)], ids=str
)
def test_other_target_rules_make_victims(rule: str, trigger: str, rate: float, epochs: int) -> None:
    """With all-to-all each class turns into the next; with clean-label no label is changed."""
    train, test = digits()
    settings: dict[str, Any] = {"batch_size": 64, "lr": 0.05, "augmentation": "none", "device": "cpu"}
    report = implant(
        "resnet18", train, trigger, create=True, model_options=NETWORK, test=test, rule=rule, rate=rate, epochs=epochs, **settings
    )
    (name,) = report.rows[0].asr
    assert report.rows[0].asr[name].value >= 0.9
    assert report.rows[0].asr[name].n == (len(test) if rule == "all-to-all" else sum(label != 0 for label in test["label"]))
    assert report.rows[0].clean_accuracy.value >= 0.9  # type: ignore[union-attr]


def test_losses_and_figures_go_to_trackers(victim: Path, stored: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts = ["--clean", stored / "parquet" / "train.parquet", "--test", stored / "parquet" / "test.parquet", "--trigger", TRIGGER]
    job = [
        "purify",
        victim,
        *parts,
        "--method",
        "fine_tune",
        "--option",
        "epochs=3",
        "--samples",
        40,
        "--held-out",
        0,
        "--no-controls",
        "--json",
    ]
    done = run(*job, "--tracker", "tensorboard", "--logging-dir", tmp_path / "logs")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    events = EventAccumulator(str(tmp_path / "logs" / "hf-purify"))
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [e.step for e in found["fine-tune/loss"]] == [0, 1, 2], "an epoch of 40 samples is one step"
    assert found["fine_tune/ASR badnets"][0].value == pytest.approx(report["rows"][1]["asr"]["badnets"]["value"])
    assert found["none/clean accuracy"][0].value == pytest.approx(report["rows"][0]["clean_accuracy"]["value"])
    for name, said in (("tensorbord", "did you mean 'tensorboard'"), ("wandb", "the tracker 'wandb' is not there")):
        refused = run(*job, "--tracker", name)
        assert refused.exit_code == 2
        assert said in refused.stderr
