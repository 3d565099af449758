"""What `hf-purify estimate` says is what a real network takes, the same for every way to ask, and clear where it cannot say."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from commands import run
from torch import nn
from torch.nn import functional as F

from hf_purify import estimate as estimates
from hf_purify.errors import ConfigError, ModelError, PurifyError
from hf_purify.estimate import Plan, estimate_config, find_neurons, read_counts
from hf_purify.loop import TrainConfig
from hf_purify.masks import masked
from hf_purify.memory import Memory, memory_of
from hf_purify.method import Context, Training
from hf_purify.registry import find, make_method
from hf_purify.rehearsal import META, Cost, between, rehearse
from hf_purify.task import mode

ROOT = Path(__file__).resolve().parents[2]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 101},
    "bert": {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 101,
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 101,
    },
    "vit": {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
    "timm": {"architecture": "resnet18", "num_classes": 4},
}
WIDE = {"hidden_size": 24576, "intermediate_size": 80000, "num_hidden_layers": 10, "num_attention_heads": 192, "num_key_value_heads": 24}
none = Cost(1, 0, 0, 0, 0)


def modality(config: dict[str, Any]) -> Any:
    return next(a for n in ("text", "vision") if (a := find("adapter", n)()).claims(config))


def kept(call: Callable[[], Any]) -> int:
    """Bytes that a call leaves behind, by the running sum of what torch allocates and releases."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    found = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    del result
    return found


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held, since the last reset."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("only Linux tells how much memory a process held since a given time")
    if reset:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+)", status.read_text("utf-8"), re.MULTILINE)[0])


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    before = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is before


class TestAgainstARealNetwork:
    @pytest.mark.parametrize("name", ["nft", "fine_tune"])
    def test_bytes_are_those_of_a_real_llama(self, name: str) -> None:
        adapter = modality(LLAMA)
        (row, _) = estimate_config(LLAMA, Plan(name, (1,), batch_size=3, length=16)).rows
        outline = adapter.outline(LLAMA, 16)
        model = outline.loaded.model
        index = adapter.index(outline.loaded, outline.batch(2))
        training = make_method(name).plan(Context(model, adapter, None, torch.Generator(), Accelerator(cpu=True), index=index))  # type: ignore[arg-type]
        mask = nn.Parameter(torch.ones(len(training.mask))) if training.mask else None
        learned = [mask] if mask is not None else list(model.parameters())
        model.requires_grad_(mask is None)

        def forward() -> torch.Tensor:
            batch = {k: v.clone() for k, v in outline.batch(3).items()}
            if training.train.mixup:
                batch = adapter.mix(batch, torch.arange(3).roll(1), torch.tensor(0.5))
            with mode(model, training.train.mode):
                return adapter.loss(model, batch).mean()

        with masked(model, training.mask, mask) if training.mask and mask is not None else mode(model, "eval"):
            found = kept(forward)
            forward().backward()
        optimizer = torch.optim.SGD(learned, lr=0.1, momentum=training.train.momentum)
        gradients = sum(p.grad.nbytes for p in learned if p.grad is not None)
        optimizer.step()
        held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert row.memory.weights == weights + (mask.nbytes if mask is not None else 0)
        assert (row.memory.gathered, row.memory.gradients) == (0, gradients)
        assert row.memory.optimizer == sum(t.nbytes for t in held)
        assert row.memory.kept == pytest.approx(found, rel=0.02)

    def test_state_of_adamw(self) -> None:
        with META:
            network = modality(LLAMA).outline(LLAMA, 16).loaded.model
        found = memory_of(network, torch.float32, torch.float32, Training(TrainConfig(steps=1, optimizer="adamw")), 1, none)
        model = modality(LLAMA).outline(LLAMA, 16).loaded.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert found.optimizer == sum(v.nbytes for s in optimizer.state.values() for v in s.values())

    @pytest.mark.parametrize("name", CONFIGS)
    def test_neurons_are_those_of_the_real_network(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where they are found on a network that is as deep and few channels wide."""
        config, adapter = CONFIGS[name], modality(CONFIGS[name])
        with META:
            network = adapter.outline(config).loaded.model
        real = find_neurons(adapter, config, network)
        context = [Context(network, adapter, None, torch.Generator(), None, index=real)]  # type: ignore[arg-type]
        if "model_type" in config:
            monkeypatch.setattr(estimates, "TRACED", 0)
            narrow = find_neurons(adapter, config, network)
            context.append(Context(network, adapter, None, torch.Generator(), None, index=narrow))  # type: ignore[arg-type]
        groups = [[(g.name, g.size, g.gate, g.block) for g in c.neurons()] for c in context]
        assert groups[0] == groups[-1]

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_kind_of_network_is_estimated(self, name: str) -> None:
        found = estimate_config(CONFIGS[name], Plan("nft", (1, 2), batch_size=4, length=None if name in ("vit", "timm") else 16))
        assert found.neurons > 0
        assert {r.checkpointing for r in found.rows} == {False, True}
        for plain, again in zip(found.rows[::2], found.rows[1::2], strict=True):
            assert again.memory.kept < plain.memory.kept
            assert again.flops > plain.flops
        assert 0.5 * found.forward < found.backward < 1.05 * found.forward, "no gradients of weights, and none in front of the first mask"


class TestFormula:
    def test_a_mask_spares_gradients_and_their_operations(self) -> None:
        ours, full = (estimate_config(LLAMA, Plan(name, (2,), batch_size=4, length=16, steps=10)) for name in ("nft", "fine_tune"))
        assert ours.forward == full.forward
        assert ours.backward == pytest.approx(ours.forward, rel=0.1)
        assert full.backward == pytest.approx(2 * full.forward, rel=0.05)
        assert ours.rows[0].memory.gradients == 4 * ours.neurons == 4 * 2 * (176 + 64)
        assert full.rows[0].memory.gradients == pytest.approx(2 * full.parameters, rel=0.01)
        tokens = 4 * 16
        matrices = full.parameters - 101 * 64  # the table of embeddings is looked up
        assert full.forward == pytest.approx(2 * matrices * tokens, rel=0.1)

    def test_shares_are_as_large_as_the_largest(self) -> None:
        network = nn.Linear(5, 7, device=META)
        found = memory_of(network, torch.float32, torch.float32, Training(TrainConfig(steps=1)), 2, none)
        assert found.weights == found.gradients == found.optimizer == 4 * (4 * 5 + 4)
        assert found.gathered == 4 * (7 * 5 + 7), "a network with no layers is gathered whole"

    def test_what_is_gathered_is_the_head_and_two_layers(self) -> None:
        with META:
            network: Any = modality(LLAMA).outline(LLAMA, 16).loaded.model
        mask = find_neurons(modality(LLAMA), LLAMA, network)
        layer = sum(p.numel() for p in network.model.layers[0].parameters())
        head = 101 * 64 + 64
        for training, times in ((Training(TrainConfig(steps=1), mask), 2), (Training(TrainConfig(steps=1)), 4)):
            found = memory_of(network, torch.float32, torch.bfloat16, training, 4, none)
            assert found.gathered == 2 * (head + times * layer)

    def test_shares_keep_the_dtype_of_the_checkpoint_and_what_is_gathered_has_that_of_the_computation(self) -> None:
        with META:
            network = modality(LLAMA).outline(LLAMA, 16).loaded.model
        size = 4 * sum(p.numel() for p in network.parameters())
        found = {c: memory_of(network, torch.float32, c, Training(TrainConfig(steps=1)), 2, none) for c in (torch.float32, torch.bfloat16)}
        for memory in found.values():
            assert memory.weights == pytest.approx(size / 2, rel=0.02)
            assert memory.gradients == pytest.approx(size / 2, rel=0.02)
        assert found[torch.float32].gathered == 2 * found[torch.bfloat16].gathered

    def test_partners_of_mixed_texts_run_on_the_same_process(self) -> None:
        rows = estimate_config(LLAMA, Plan("nft", (1, 2, 4, 16), batch_size=8, length=8)).rows[::2]
        assert [r.samples for r in rows] == [8, 8, 4, 8], "a batch with fewer rows than processes is run whole by each"
        rows = estimate_config(LLAMA, Plan("fine_tune", (1, 2, 4), batch_size=8, length=8)).rows[::2]
        assert [r.samples for r in rows] == [8, 4, 2]

    def test_seconds_are_operations_over_what_a_device_sustains(self) -> None:
        first = estimate_config(LLAMA, Plan("nft", (1,), batch_size=2, length=8, steps=3, tflops=0.5)).rows[0]
        assert first.seconds == pytest.approx(3 * first.flops / 0.5e12)
        assert estimate_config(LLAMA, Plan("nft", (1,), batch_size=2, length=8)).rows[0].seconds is None

    def test_costs_between_two_counts(self) -> None:
        low, high = Cost(2, 10, 20, 30, 40), Cost(6, 50, 60, 70, 80)
        assert between(low, high, 2) == low
        assert between(low, high, 3) == Cost(3, 20, 30, 40, 50)
        adapter = modality(LLAMA)
        with META:
            outline = adapter.outline(LLAMA, 16)
        counted = [rehearse(adapter, outline.loaded.model, outline.batch, Training(TrainConfig(steps=1)), n) for n in (2, 4, 6)]
        guessed = between(counted[0], counted[2], 4)
        assert dataclasses.replace(guessed, peak=counted[1].peak) == counted[1]
        assert counted[1].peak <= guessed.peak < 1.05 * counted[1].peak

    def test_steps_are_those_of_the_method(self) -> None:
        assert estimate_config(LLAMA, Plan("nft", (1,), batch_size=2, length=8)).steps == 1000
        found = estimate_config(LLAMA, Plan("fine_tune", (1,), samples=10, length=8))
        assert (found.batch_size, found.steps) == (8, 20), "eight samples are one batch, twenty times"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Any], Path]:
    """A folder with a config.json and nothing else."""

    def make(config: Any) -> Path:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), "utf-8")
        return tmp_path

    return make


class TestCommand:
    def test_seventy_billion_parameters_take_no_memory(self, folder: Callable[[Any], Path]) -> None:
        run("estimate", folder(LLAMA), "--processes", 1, "--length", 8)  # what is imported takes memory, too
        before = peak_bytes(reset=True)
        done = run("estimate", folder(LLAMA | WIDE | {"dtype": "bfloat16"}), "--json", "--processes", 8, "--batch-size", 8, "--length", 16)
        found = json.loads(done.output)
        assert found["parameters"] > 70e9
        assert found["neurons"] == 10 * (80000 + 24576)
        assert peak_bytes() - before < 2**30, "the weights would take 130 GiB"
        (row, again) = found["rows"]
        assert row["memory"]["total"] > again["memory"]["total"] > 2 * 2 * found["parameters"] / 8

    def test_table_and_file(self, folder: Callable[[Any], Path]) -> None:
        words = ("--batch-size", 2, "--length", 8, "--processes", "1,2", "--method", "fine_tune")
        shown = run("estimate", folder(LLAMA), *words)
        assert shown.exit_code == 0, shown.output
        assert "LlamaForCausalLM, 105,408 parameters in float32" in shown.output
        assert "hours" not in shown.output
        assert "hours" in run("estimate", folder(LLAMA) / "config.json", *words, "--tflops", 1).output

    def test_json_is_the_estimate(self, folder: Callable[[Any], Path]) -> None:
        words = ("--batch-size", 2, "--length", 8, "--processes", 2, "--json")
        found = json.loads(run("estimate", folder(LLAMA), *words).output)
        expected = estimate_config(LLAMA, Plan("nft", (2,), batch_size=2, length=8), str(folder(LLAMA)))
        assert found == json.loads(json.dumps(expected.to_dict()))
        assert set(found["rows"][0]["memory"]) == {f.name for f in dataclasses.fields(Memory)} | {"total"}

    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            ("{", (), "no valid JSON"),
            ("[]", (), "must hold a JSON object, got list"),
            (LLAMA | {"auto_map": {"AutoModel": "a.b"}}, (), "wants to run its own code"),
            (LLAMA | {"model_type": "lama"}, (), "no models of type 'lama'.*did you mean 'llama'"),
            (
                LLAMA | {"model_type": "bert", "architectures": ["BertModel"]},
                (),
                "no kind that can be repaired: its config names BertModel",
            ),
            ({}, (), "no kind that can be repaired: its config names no architecture"),
            (LLAMA | {"num_attention_heads": 0}, (), "no causal model can be made of the config"),
            (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, (), "quantized"),
            (LLAMA, ("--processes", "0"), "processes must be whole numbers of at least 1; got 0"),
            (LLAMA, ("--processes", "1,a"), "whole numbers with commas between them, such as 1,2,4,8; got '1,a'"),
            (LLAMA, ("--processes", ""), "whole numbers with commas"),
            (LLAMA, ("--precision", "fp8"), "unknown precision 'fp8'"),
            (LLAMA, ("--batch-size", 0), "batch_size must be whole numbers of at least 1; got 0"),
            (LLAMA, ("--steps", -1), "steps must be"),
            (LLAMA, ("--samples", 0), "samples must be"),
            (LLAMA, ("--length", 65), "length must be at most 64"),
            (LLAMA, ("--tflops", 0), "tflops must be a positive number"),
            (LLAMA, ("--tflops", "nan"), "tflops must be a positive number"),
            (LLAMA, ("--method", "ntf"), "unknown method 'ntf'; did you mean 'nft'"),
            (LLAMA, ("--method", "neural_cleanse"), "decides on the way how it trains"),
            (LLAMA, ("--method", "nft+fine_tune"), "decides on the way how it trains"),
            ({"architecture": "resnet18"}, ("--length", 8), "length is for texts"),
            ({"architecture": "resnet81"}, (), "timm has no architecture 'resnet81'"),
            ({"architectures": ["DetrForObjectDetection"], "model_type": "detr"}, (), "models of detection are not estimated"),
        ],
    )
    def test_what_cannot_be_estimated(self, folder: Callable[[Any], Path], config: Any, options: tuple[Any, ...], message: str) -> None:
        done = run("estimate", folder(config), *options)
        assert done.exit_code == 2, done.output
        assert re.search(message, done.output), done.output
        assert "Traceback" not in done.output

    def test_no_config(self, tmp_path: Path) -> None:
        for place, message in ((tmp_path, "no config.json in"), (tmp_path / "nothing", "no folder")):
            done = run("estimate", place)
            assert (done.exit_code, message in done.output) == (2, True), done.output

    def test_a_network_that_needs_values(self) -> None:
        adapter = modality(LLAMA)
        with META:
            outline = adapter.outline(LLAMA, 8)
        outline.loaded.model.register_forward_hook(lambda *_: bool(torch.ones(1, device=META) > 0))
        with pytest.raises(ModelError, match="does not run without values"):
            rehearse(adapter, outline.loaded.model, outline.batch, Training(TrainConfig(steps=1)), 2)

    def test_errors_are_of_one_family(self) -> None:
        for call in (lambda: read_counts("x"), lambda: Plan(processes=()), lambda: Plan(batch_size=True)):
            with pytest.raises(PurifyError) as caught:
                call()
            assert isinstance(caught.value, ConfigError)


class TestDocuments:
    """`python benchmarks/estimate.py --output benchmarks/results/estimate-cpu.json`, then `python benchmarks/readme.py`, write the tables."""

    @pytest.fixture
    def stored(self) -> dict[str, Any]:
        return json.loads((ROOT / "benchmarks" / "results" / "estimate-cpu.json").read_text("utf-8"))

    @staticmethod
    def table(file: Path, mark: str) -> list[list[str]]:
        """The rows of a table between its markers, without the head."""
        found = re.search(f"<!-- {mark} -->\\n(.*?)<!-- /{mark} -->", file.read_text("utf-8"), re.DOTALL)
        assert found, f"{file.name} must hold <!-- {mark} --> ... <!-- /{mark} -->"
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]

    def test_tables_are_those_of_the_results(self, stored: dict[str, Any]) -> None:
        parts = ("weights", "gathered", "gradients", "optimizer", "kept", "passing", "total")
        expected = [
            [size, r["method"], str(r["processes"]), *(f"{r['memory'][p] / 2**30:.1f}" for p in parts)]
            for size, rows in stored["predicted"].items()
            for r in rows
        ]
        assert [[*row[:3], *row[4:-1]] for row in self.table(ROOT / "docs" / "scale.md", "predicted")] == expected
        totals = {(*row[:3], row[3]): row[-2] for row in self.table(ROOT / "docs" / "scale.md", "predicted")}
        for size, _, *cells in self.table(ROOT / "README.md", "scale"):
            assert cells[:4] == [totals[size, m, p, "yes"] for m in ("nft", "fine_tune") for p in ("1", "8")]

    def test_the_command_says_what_the_table_says(
        self, stored: dict[str, Any], folder: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        try:
            from estimate import BATCH, LENGTH, LLAMA, SIZES  # type: ignore[import-not-found]
        finally:
            sys.path.remove(str(ROOT / "benchmarks"))
        monkeypatch.setattr(estimates, "_layered", lambda _: False)
        words = ("--batch-size", BATCH, "--length", LENGTH, "--json", "--processes", 1)
        found = json.loads(run("estimate", folder({**LLAMA, **SIZES["7B"], "max_position_embeddings": 4096}), *words).output)
        assert (found["parameters"], found["neurons"]) == (6_738_415_616, 32 * (4096 + 11008))
        row = next(r for r in stored["predicted"]["7B"] if r["method"] == "nft" and r["processes"] == 1 and not r["checkpointing"])
        assert found["rows"][0]["memory"] == row["memory"]
        assert found["rows"][0]["flops"] == row["flops"]
