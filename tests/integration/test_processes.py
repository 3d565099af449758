"""Jobs on several processes, as `accelerate launch` starts them: gloo, on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import launch
from safetensors.torch import load_file
from worlds import CASES

from hf_purify.masks import MASK_FILE
from hf_purify.output import folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with what came of the same repairs on so many processes."""
    made: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in made:
            folder = tmp_path_factory.mktemp("worlds") / str(processes)
            done = launch(processes, TESTS / "worlds.py", folder)
            assert done.returncode == 0, done.stderr[-3000:]
            assert (folder / "processes").read_text("utf-8") == str(processes)
            made[processes] = folder
        return made[processes]

    return run


# Sums over processes are rounded in another order; what sharpness-aware steps make of that is the largest difference. AdamW takes steps of
# one size however small a gradient is, so that rounding decides which way a trigger goes where that matters little.
TOLERANCE = {"neural_cleanse": 0.1}


@pytest.mark.parametrize("processes", [3])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_many_processes_repair_as_one_does(worlds: Callable[[int], Path], case: tuple[str, str, str], processes: int) -> None:
    """The same choices, masks, scores and weights."""
    name, atol = "-".join(case), TOLERANCE.get(case[0], 2e-4)
    one, many = (load_file(worlds(n) / f"{name}.safetensors") for n in (1, processes))
    assert (worlds(1) / f"{name}.json").read_text("utf-8") == (worlds(processes) / f"{name}.json").read_text("utf-8")
    assert one.keys() == many.keys()
    assert torch.equal((one["mask"] > 0.5), (many["mask"] > 0.5))
    for key, value in one.items():
        scale = max(1.0, float(value.abs().max())) if value.is_floating_point() else 1.0
        torch.testing.assert_close(many[key], value, rtol=0, atol=atol * scale, msg=lambda text, key=key: f"{key}: {text}")


def test_preset_with_settings_from_the_command_line(victim: Path, stored: Path, tmp_path: Path) -> None:
    """The same table and the same mask on one process and two, written once, with the recipe that was run."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("method: nft\noptions: {steps: 12, batch_size: 30}\nsamples: 40\ncontrols: true\n", "utf-8")
    data = [f"{split}={stored / 'parquet' / name}.parquet" for split, name in (("clean", "train"), ("test", "test"))]
    reports, masks = [], []
    for processes in (1, 2):
        out = tmp_path / f"of-{processes}"
        given = [f"model={victim}", *data, f"output={out}", "options.steps=6", "device=cpu"]
        done = launch(processes, preset, *given, module="hf_purify_recipes.purify")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("random_mask") == 1, "the main process alone prints"
        assert "steps: 6" in (out / "recipe.yaml").read_text("utf-8")
        assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
        reports.append(json.loads((out / "report.json").read_text("utf-8")))
        masks.append(load_file(out / MASK_FILE))
        assert reports[-1]["method"]["config"]["steps"] == 6
    for one, two in zip(*(report["rows"] for report in reports), strict=True):
        for figure in ("clean_accuracy", "asr", "robust_accuracy"):
            assert two[figure] == one[figure], (one["name"], figure)
    torch.testing.assert_close(masks[1], masks[0], rtol=1e-5, atol=1e-5)


def test_script_of_a_checkout_and_error_of_a_launch(tmp_path: Path) -> None:
    script = TESTS.parent / "recipes" / "purify.py"
    done = launch(1, script, "vision/nft_resnet18_badnets", "sampels=3", f"output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "unknown setting 'sampels'; did you mean 'samples'?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_job_leaves_nothing_half_written(victim: Path, stored: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """Nor does one that is killed, once another has begun to write there."""
    out = tmp_path / "purified"
    command = [
        sys.executable,
        "-m",
        "hf_purify",
        "purify",
        victim,
        "--clean",
        stored / "parquet" / "train.parquet",
        "-o",
        out,
        "--device",
        "cpu",
    ]
    job = subprocess.Popen([str(c) for c in [*command, "--option", "steps=100000"]], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(5)  # in the midst of the repair
        job.send_signal(sent)
        try:
            _, said = job.communicate(timeout=20)
        except subprocess.TimeoutExpired:  # Python drops an interrupt that meets a finalizer; a person presses again
            job.send_signal(sent)
            _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == code
    if sent != signal.SIGKILL:
        assert "interrupted; nothing was left half-written" in said
    else:
        assert not out.exists()
        with folder(str(out), overwrite=False):
            pass
        out.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_go_on_where_two_were_stopped(tmp_path: Path) -> None:
    """With dropout, which draws other numbers on each process."""
    script = tmp_path / "stops.py"
    script.write_text(
        "import sys\nimport torch\nfrom accelerate import Accelerator\nfrom pathlib import Path\nfrom shrunk import small\n"
        "from worlds import context\nfrom hf_purify.resuming import Progress\n"
        "accelerator = Accelerator(cpu=True)\n"
        "class Stops(Progress):\n    def write(self, state, entry):\n        super().write(state, entry)\n"
        "        accelerator.wait_for_everyone()\n        if entry['step'] == 2 and len(sys.argv) > 2:\n            sys.exit(7)\n"
        "def weights(progress):\n    ctx = context('text', 'bert', accelerator, dropout=True)\n    ctx.progress = progress\n"
        "    torch.manual_seed(accelerator.process_index)\n    small('fine_tune')(ctx)\n    return ctx.model.state_dict()\n"
        "found = weights(Stops(Path(sys.argv[1]), 2, {}, {}, accelerator))\nexpected = weights(None)\n"
        "assert all(torch.equal(found[k], v) for k, v in expected.items())\nprint('alike')\n",
        "utf-8",
    )
    folder = tmp_path / "checkpoint"
    assert launch(2, script, folder, "stop").returncode != 0
    assert (folder / "0-2.safetensors").is_file()
    done = launch(2, script, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("resuming 'fine-tune' at step 2") == 1, "the main process says it"
    assert done.stdout.count("alike") == 2


def test_process_that_dies_takes_the_others_with_it(tmp_path: Path) -> None:
    """The others wait for it in the midst of a repair; they end, and its message is there to read."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\nfrom shrunk import small\nfrom worlds import context\n"
        "accelerator = Accelerator(cpu=True)\nctx = context('vision', 'resnet', accelerator)\n"
        "if accelerator.process_index == 1:\n    ctx.data.batch = lambda indices: 1 / 0\n"
        "small('nft')(ctx)\nprint('survived')\n",
        "utf-8",
    )
    done = launch(2, script)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "survived" not in done.stdout
