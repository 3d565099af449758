"""Image triggers against their formulas, and the rules by which samples are poisoned."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn
from torch import Tensor

from hf_purify.errors import ConfigError, DataError, UnknownName
from hf_purify.triggers import RULES, AllToAll, AllToOne, CleanLabel, make_rule, poison, trigger_all
from hf_purify_adapters.vision.triggers import BPP, SIG, TRIGGERS, BadNets, Blended, LowFrequency, TrojanSquare, WaNet, make_trigger
from hf_purify_adapters.vision.triggers.patches import PATTERNS

SIZES = [(28, 28), (32, 32), (64, 64), (48, 20), (20, 48)]
NAMES = sorted(TRIGGERS)
WITH_COVER = [name for name in NAMES if hasattr(TRIGGERS[name], "cover")]
TRANSFORMS = [(name, "__call__") for name in NAMES] + [(name, "cover") for name in WITH_COVER]


def picture(height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain(value: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which pixels `(H, W)` differ."""
    return (before != after).any(0)


# What holds for every trigger


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_same_shape_and_dtype_and_really_changed(name: str, height: int, width: int, channels: int) -> None:
    before = picture(height, width, channels)
    after = make_trigger(name)(before)
    assert after.shape == before.shape
    assert after.dtype == torch.uint8
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("name", "method"), TRANSFORMS)
def test_leaves_input_and_global_random_state_alone(name: str, method: str) -> None:
    before = picture()
    copy, torch_state, numpy_state = before.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    after = getattr(make_trigger(name), method)(before, 3)
    after.zero_()
    assert torch.equal(before, copy)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert getattr(make_trigger(name), method)(before, 3).any(), "writing to a result must not reach a cache"


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_frozen_and_picklable(name: str) -> None:
    trigger, before = make_trigger(name), picture()
    assert torch.equal(trigger(before, 1), trigger(before, 1))
    assert torch.equal(pickle.loads(pickle.dumps(trigger))(before), trigger(before))
    assert trigger == make_trigger(name, **dataclasses.asdict(trigger))
    assert hash(trigger) == hash(make_trigger(name))
    assert type(trigger).name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        trigger.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_does_not_depend_on_the_sample_seed(name: str) -> None:
    trigger, before = make_trigger(name), picture()
    assert torch.equal(trigger(before, 1), trigger(before, 2)), "an attack is measured with the trigger that was trained"


@pytest.mark.parametrize("name", NAMES)
def test_accepts_views_that_are_not_contiguous(name: str) -> None:
    before = picture(40, 32)
    turned = before.permute(0, 2, 1)
    assert torch.equal(make_trigger(name)(turned), make_trigger(name)(turned.contiguous()))


@pytest.mark.parametrize("name", WITH_COVER)
def test_cover_varies_with_the_seed_and_is_not_the_trigger(name: str) -> None:
    trigger, before = make_trigger(name), picture()
    first, second = trigger.cover(before, 1), trigger.cover(before, 2)
    assert torch.equal(first, trigger.cover(before, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, trigger(before))
    assert first.shape == before.shape
    assert first.dtype == torch.uint8


def test_wanet_and_bpp_have_a_cover() -> None:
    assert WITH_COVER == ["bpp", "wanet"]


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(2, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        None,
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_is_no_picture(name: str, wrong: Any) -> None:
    with pytest.raises(DataError, match=rf"{name}: a picture must be a uint8 tensor \(3, H, W\) or \(1, H, W\), got"):
        make_trigger(name)(wrong)


# Names, options, ranges


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="unknown image trigger 'badnet'; did you mean 'badnets'"):
        make_trigger("badnet")
    with pytest.raises(UnknownName, match="option of trigger 'wanet' 'strenght'; did you mean 'strength'"):
        make_trigger("wanet", strenght=1.0)
    with pytest.raises(ConfigError, match="did you mean 'bottom-right'"):
        make_trigger("badnets", position="botom-right")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("badnets", {"size": 0}),
        ("badnets", {"size": 2.5}),
        ("badnets", {"size": True}),
        ("badnets", {"margin": -1}),
        ("badnets", {"position": "middle"}),
        ("badnets", {"position": 3}),
        ("badnets", {"pattern": "black"}),
        ("badnets", {"pattern_seed": -1}),
        ("blended", {"alpha": 0}),
        ("blended", {"alpha": 1.5}),
        ("blended", {"alpha": "0.2"}),
        ("blended", {"alpha": math.nan}),
        ("blended", {"pattern": "/no/such/file.png"}),
        ("blended", {"pattern": 3}),
        ("sig", {"delta": 0}),
        ("sig", {"delta": 256}),
        ("sig", {"f": -1}),
        ("sig", {"f": math.inf}),
        ("trojan", {"size": 0}),
        ("trojan", {"pattern": "/no/such/file.npz"}),
        ("wanet", {"k": 1}),
        ("wanet", {"strength": 0}),
        ("wanet", {"grid_seed": "a"}),
        ("low_frequency", {"amplitude": 0}),
        ("low_frequency", {"components": 16}),
        ("low_frequency", {"max_frequency": 0}),
        ("bpp", {"bits": 0}),
        ("bpp", {"bits": 8}),
        ("bpp", {"dither": 1}),
    ],
)
def test_values_out_of_range_say_what_came(name: str, options: dict[str, Any]) -> None:
    (field, value) = next(iter(options.items()))
    with pytest.raises(ConfigError) as caught:
        make_trigger(name, **options)
    assert str(value) in str(caught.value)
    assert field in str(caught.value) or str(value).startswith("/no/such")


def test_squares_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="a square of 30 pixels with margin 4 does not fit a picture of 32x64"):
        BadNets(size=30, margin=4)(picture(32, 64))
    with pytest.raises(ConfigError, match="does not fit"):
        TrojanSquare(size=33)(picture())
    with pytest.raises(ConfigError, match="max_frequency 3 needs"):
        LowFrequency()(picture(3, 32))


# BadNets


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("position", "rows", "columns"),
    [
        ("bottom-right", (25, 30), (41, 46)),
        ("bottom-left", (25, 30), (2, 7)),
        ("top-right", (2, 7), (41, 46)),
        ("top-left", (2, 7), (2, 7)),
        ("center", (13, 18), (21, 26)),
    ],
)
def test_badnets_changes_its_patch_only(position: str, rows: tuple[int, int], columns: tuple[int, int], pattern: str) -> None:
    before = plain(127, 32, 48)
    after = BadNets(size=5, position=position, margin=2, pattern=pattern)(before)
    expected = torch.zeros(32, 48, dtype=torch.bool)
    expected[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(changed(before, after), expected)


@pytest.mark.parametrize(("side", "expected"), [(28, 3), (32, 3), (64, 6), (224, 21), (8, 3)])
def test_badnets_default_size_is_three_of_32_pixels(side: int, expected: int) -> None:
    assert changed(plain(0, side, side), BadNets()(plain(0, side, side))).sum() == expected**2


def test_badnets_grid_is_the_published_one() -> None:
    after = BadNets(pattern="grid")(plain(9))[0]
    from_the_end = {(1, 1): 255, (1, 2): 0, (1, 3): 255, (2, 1): 0, (2, 2): 255, (2, 3): 0, (3, 1): 255, (3, 2): 0, (3, 3): 0}
    assert {key: int(after[32 - key[0], 32 - key[1]]) for key in from_the_end} == from_the_end


def test_badnets_grid_grows_with_the_picture() -> None:
    small, large = (BadNets(pattern="grid")(plain(9, side, side))[:, -side * 3 // 32 :, -side * 3 // 32 :] for side in (32, 64))
    assert torch.equal(small.repeat_interleave(2, 1).repeat_interleave(2, 2), large)


def test_badnets_checkerboard_and_random() -> None:
    board = BadNets(size=3, pattern="checkerboard")(plain(9))[0, -3:, -3:]
    assert board.tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    one, other = (BadNets(size=4, pattern="random", pattern_seed=seed)(plain(9)) for seed in (0, 1))
    assert not torch.equal(one, other)


# Blended


def test_blended_is_the_convex_combination() -> None:
    black, white = Blended(alpha=0.2)(plain(0)).float(), Blended(alpha=0.2)(plain(255)).float()
    noise = 255 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (black - 0.2 * noise).abs().max() <= 0.5
    assert (white - (0.8 * 255 + 0.2 * noise)).abs().max() <= 0.5 + 1e-4


def test_blended_reads_a_picture(tmp_path: Path) -> None:
    pattern = picture(16, 16, seed=5)
    Image.fromarray(pattern.permute(1, 2, 0).numpy()).save(tmp_path / "pattern.png")
    trigger = Blended(alpha=1.0, pattern=str(tmp_path / "pattern.png"))
    (tmp_path / "pattern.png").unlink()
    assert torch.equal(trigger(plain(3, 16, 16)), pattern), "the file is read when the trigger is built"
    assert trigger(plain(3, 40, 24)).shape == (3, 40, 24)
    grey = trigger(torch.zeros(1, 16, 16, dtype=torch.uint8))[0].float()
    assert (grey - pattern.float().mean(0)).abs().max() <= 0.5


def test_blended_takes_a_path_object_and_stays_json(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.full((8, 8), 200, dtype=np.uint8))
    trigger = Blended(alpha=0.5, pattern=tmp_path / "p.npy")
    assert trigger.pattern == str(tmp_path / "p.npy")
    assert trigger(plain(100)).unique().tolist() == [150]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 8, 8), 0.5, dtype=np.float32), "multiply it by 255"),
        (np.full((3, 8, 8), 300.0), r"must lie in 0..255, got 300..300"),
        (np.full((3, 8, 8), np.nan), "must lie in 0..255, got nan"),
        (np.zeros((4, 8, 8)), "must have 1 or 3 channels"),
        (np.zeros(8), "must hold numbers"),
        (np.array(["a"]), "must hold numbers"),
        (np.array([{"pickled": 1}], dtype=object), "cannot be read"),
    ],
)
def test_patterns_that_are_none(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match=message):
        Blended(pattern=str(tmp_path / "bad.npy"))


def test_files_that_are_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", y=np.zeros((3, 4, 4)))
    for name, message in (("text.png", "cannot be read"), ("text.npz", "cannot be read"), ("other.npz", "array 'x', found y")):
        with pytest.raises(ConfigError, match=message):
            TrojanSquare(pattern=str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"missing.png' does not exist"):
        Blended(pattern=str(tmp_path / "missing.png"))


# SIG


@pytest.mark.parametrize(("delta", "f", "width"), [(20, 6, 32), (40, 6, 32), (10.5, 3.5, 47)])
def test_sig_is_a_sine_along_the_columns(delta: float, f: float, width: int) -> None:
    after = SIG(delta=delta, f=f)(plain(128, 20, width))
    for column in range(width):
        expected = 128 + delta * math.sin(2 * math.pi * column * f / width)
        assert (after[:, :, column].float() - expected).abs().max() <= 0.5 + 1e-5
    bright = SIG(delta=delta, f=f)(plain(255, 20, width))
    assert bright.max() == 255
    assert bright.min() >= 255 - delta - 1, "values are clipped; they do not wrap around"


# Trojan square


def test_trojan_default_is_a_square_at_the_bottom_right() -> None:
    for side, expected in ((32, 7), (64, 14), (224, 49)):
        rows, columns = changed(plain(0, side, side), TrojanSquare()(plain(0, side, side))).nonzero().T
        assert int(rows.min()) == int(columns.min()) == side - expected
        assert int(rows.max()) == int(columns.max()) == side - 1
    assert len(TrojanSquare()(plain(0))[:, -7:, -7:].flatten(1).T.unique(dim=0)) == 49, "seven by seven colours"


def test_trojan_reads_an_archive_in_which_black_is_transparent(tmp_path: Path) -> None:
    pattern = np.zeros((3, 32, 32), dtype=np.float32)
    pattern[:, 25:28, 25:28] = np.random.default_rng(0).uniform(0, 255, (3, 3, 3))
    pattern[:, 26, 26] = 0, 17, 0
    np.savez(tmp_path / "square.npz", x=pattern)
    trigger, before = TrojanSquare(pattern=str(tmp_path / "square.npz")), picture()
    after = trigger(before)
    assert np.array_equal(after[:, 25:28, 25:28].numpy(), pattern[:, 25:28, 25:28].round())
    after[:, 25:28, 25:28] = before[:, 25:28, 25:28]
    assert torch.equal(after, before)
    assert changed(plain(1, 64, 64), trigger(plain(1, 64, 64))).sum() == 36


def test_trojan_reads_a_picture_with_a_mask(tmp_path: Path) -> None:
    pattern, mask = picture(seed=1), torch.zeros(32, 32, dtype=torch.uint8)
    mask[4:10, 6:8] = 255
    Image.fromarray(pattern.permute(1, 2, 0).numpy()).save(tmp_path / "pattern.png")
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    trigger = TrojanSquare(pattern=str(tmp_path / "pattern.png"), mask=str(tmp_path / "mask.png"))
    assert torch.equal(trigger(plain(7)), torch.where(mask > 0, pattern, plain(7)))
    Image.fromarray(torch.zeros(32, 32, dtype=torch.uint8).numpy()).save(tmp_path / "dark.png")
    with pytest.raises(ConfigError, match="no pixel is visible"):
        TrojanSquare(pattern=str(tmp_path / "pattern.png"), mask=str(tmp_path / "dark.png"))
    with pytest.raises(ConfigError, match="a mask needs a pattern"):
        TrojanSquare(mask=str(tmp_path / "mask.png"))
    with pytest.raises(ConfigError, match="leave them out with pattern"):
        TrojanSquare(pattern=str(tmp_path / "pattern.png"), size=4)


@pytest.mark.data
def test_patterns_as_published(data_dir: Path) -> None:
    folder = data_dir / "weights" / "triggers"
    with Image.open(folder / "badnet_patch_32.png") as image:
        published = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, -3:, -3:]
    assert torch.equal(BadNets(pattern="grid")(plain(9))[:, -3:, -3:], published)
    archive = TrojanSquare(pattern=folder / "best_square_trigger_cifar10.npz")
    assert changed(plain(1), archive(plain(1))).nonzero().unique().tolist() == [25, 26, 27]
    masked = TrojanSquare(pattern=folder / "trojan_square_32.png", mask=folder / "mask_trojan_square_32.png")
    assert changed(plain(1), masked(plain(1))).nonzero().unique().tolist() == list(range(21, 29))
    assert Blended(pattern=folder / "hellokitty_32.png")(plain(1)).float().mean() > 20


# WaNet


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    """Value of `(H, W)` between pixels."""
    top, left = min(int(y), image.shape[0] - 2), min(int(x), image.shape[1] - 2)
    b, a = y - top, x - left
    upper = (1 - a) * image[top, left] + a * image[top, left + 1]
    return (1 - b) * upper + b * ((1 - a) * image[top + 1, left] + a * image[top + 1, left + 1])


def test_wanet_takes_each_pixel_from_its_shifted_place() -> None:
    height, width = 12, 9
    before = picture(height, width)
    after = WaNet(strength=2.0)(before)
    control = 2 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    control /= control.abs().mean()
    field = torch.nn.functional.interpolate(control, (height, width), mode="bicubic", align_corners=True)[0].double().numpy()
    for i in range(height):
        for j in range(width):
            x = np.clip(2 * j / (width - 1) - 1 + 2.0 * field[0, i, j] / width, -1, 1)
            y = np.clip(2 * i / (height - 1) - 1 + 2.0 * field[1, i, j] / height, -1, 1)
            for channel in range(3):
                expected = bilinear(before[channel].double().numpy(), (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1))
                assert abs(float(after[channel, i, j]) - expected) <= 0.51


def test_wanet_is_subtle_at_its_default_strength() -> None:
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(3, 32, 32)
    shift = (WaNet()(ramp).float() - ramp.float()).abs().mean() / 8
    assert 0.05 < shift < 0.5, "a shift of about a quarter of a pixel"


def test_wanet_moves_nothing_in_a_plain_picture() -> None:
    assert torch.equal(WaNet()(plain(77)), plain(77))


def test_wanet_cover_stays_near_the_trigger() -> None:
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(3, 32, 32)
    difference = (WaNet().cover(ramp, 1).float() - WaNet()(ramp).float())[0, :, 2:-2]
    assert difference.abs().max() <= 8 * 31 / 32 / 2 + 1, "the disturbance is at most 1/W, half a pixel"
    assert difference.abs().max() > 3
    assert difference.mean().abs() < 0.25, "to either side alike"


def test_wanet_seed_chooses_the_field() -> None:
    assert not torch.equal(WaNet(grid_seed=0)(picture()), WaNet(grid_seed=1)(picture()))


# Low frequency


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_low_frequency_has_no_high_ones(height: int, width: int, seed: int) -> None:
    trigger = LowFrequency(amplitude=100, pattern_seed=seed)
    residual = trigger(plain(128, height, width)).double().numpy() - 128
    assert np.abs(residual).max() == 100
    for channel in residual:
        power = dctn(channel, norm="ortho") ** 2
        assert power[:4, :4].sum() > 0.999 * power.sum()
        assert power[0, 0] < 0.001 * power.sum()
        assert (power > 0.001 * power.sum()).sum() <= trigger.components


def test_low_frequency_default_is_faint() -> None:
    residual = LowFrequency()(plain(128)).float() - 128
    assert residual.abs().max() == 10
    assert residual.pow(2).mean().sqrt() < 5


# BPP


def dithered_pixel_by_pixel(image: np.ndarray, levels: int) -> np.ndarray:
    """Floyd-Steinberg as written down in 1976: row by row, each error to four neighbours."""
    image = image.astype(np.float64)
    height, width = image.shape
    for i in range(height):
        for j in range(width):
            value = image[i, j]
            image[i, j] = min(max(np.rint(value * (levels - 1) / 255), 0), levels - 1) * 255 / (levels - 1)
            error = value - image[i, j]
            for di, dj, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + di < height and 0 <= j + dj < width:
                    image[i + di, j + dj] += error * share / 16
    return image


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), bits=st.integers(1, 7), seed=st.integers(0, 1000))
def test_bpp_dithers_as_the_plain_loop_does(height: int, width: int, bits: int, seed: int) -> None:
    before = picture(height, width, seed=seed)
    after = BPP(bits=bits)(before).numpy()
    for channel in range(3):
        expected = dithered_pixel_by_pixel(before[channel].numpy(), 2**bits)
        assert (np.abs(after[channel] - expected) <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("dither", [True, False])
def test_bpp_leaves_only_its_levels(bits: int, dither: bool) -> None:
    levels = {round(i * 255 / (2**bits - 1)) for i in range(2**bits)}
    after = BPP(bits=bits, dither=dither)(picture(40, 56))
    assert set(after.unique().tolist()) <= levels


def test_bpp_without_dither_rounds_to_the_nearest_level() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    after = BPP(bits=3, dither=False)(ramp)
    expected = [round(round(value / 255 * 7) / 7 * 255) for value in range(256)]
    assert after.flatten().tolist() == expected


def test_bpp_dither_keeps_the_mean() -> None:
    assert abs(BPP(bits=1)(plain(90, 64, 64)).float().mean() - 90) < 2


def test_bpp_cover_is_noise_no_larger_than_a_rounding_error() -> None:
    before = plain(128)
    for dither, limit in ((False, 0.5), (True, 1.0)):
        residual = (BPP(dither=dither).cover(before, 1).float() - 128).abs()
        assert 0 < residual.max() <= limit * 255 / 7 + 1
    assert len(BPP().cover(picture(), 1).unique()) > 8, "it is not quantized itself"


# Target rules and poisoned views


@dataclasses.dataclass
class FakeExamples:
    """Numbers instead of pictures; a transform gets `(number, seed)`."""

    values: list[Any]
    labels: Tensor
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def raw(self, i: int) -> Any:
        return self.values[i]

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"values": torch.tensor([self.values[i] for i in indices]), "labels": self.labels[indices]}

    def select(self, indices: Tensor) -> FakeExamples:
        return FakeExamples([self.values[i] for i in indices], self.labels[indices], self.seeds)

    def overlay(self, indices: Tensor, transform: Callable[[Any, int], Any], labels: Tensor, seed: int) -> FakeExamples:
        values, new = list(self.values), self.labels.clone()
        for position, i in enumerate(indices.tolist()):
            values[i], new[i] = transform(values[i], seed), labels[position]
        return FakeExamples(values, new, (*self.seeds, seed))


@dataclasses.dataclass(frozen=True)
class Mark:
    name = "mark"

    def __call__(self, example: Any, seed: int = 0) -> Any:
        return ("triggered", example)


@dataclasses.dataclass(frozen=True)
class MarkWithCover(Mark):
    def cover(self, example: Any, seed: int = 0) -> Any:
        return ("covered", example)


def examples(n: int = 200, classes: int = 10, seed: int = 0) -> FakeExamples:
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    return FakeExamples(list(range(n)), labels)


def marked(view: Any, kind: str = "triggered") -> Tensor:
    return torch.tensor([isinstance(view.raw(i), tuple) and view.raw(i)[0] == kind for i in range(len(view))])


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from([AllToOne(0), AllToOne(3), AllToAll(), CleanLabel(2)]),
    rate=st.floats(0.005, 1),
    seed=st.integers(0, 99),
    cover=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_poison_marks_candidates_and_nothing_else(rule: Any, rate: float, seed: int, cover: float) -> None:
    data = examples()
    result = poison(data, MarkWithCover(), rule, 10, rate, seed, cover)
    hit = marked(result.examples)
    allowed = {"all-to-one": data.labels != getattr(rule, "target", -1), "clean-label": data.labels == getattr(rule, "target", -1)}.get(
        rule.name, torch.ones(200, dtype=torch.bool)
    )
    assert torch.equal(hit, result.triggered)
    assert not (hit & ~allowed).any()
    assert int(hit.sum()) == min(max(1, round(rate * 200)), int(allowed.sum()))
    wish = (data.labels + 1) % 10 if rule.name == "all-to-all" else torch.full_like(data.labels, rule.target)
    assert torch.equal(result.targets, wish)
    assert torch.equal(result.examples.labels, torch.where(hit, wish, data.labels))
    assert torch.equal(result.labels, data.labels)
    covered = marked(result.examples, "covered")
    assert int(covered.sum()) == min(round(cover * int(hit.sum())), 200 - int(hit.sum()))
    assert not (covered & hit).any()


def test_poison_leaves_the_data_untouched_and_follows_its_seed() -> None:
    data = examples()
    values, labels = list(data.values), data.labels.clone()
    one, same, other = (poison(data, Mark(), AllToOne(0), 10, 0.1, seed).triggered for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert data.values == values
    assert torch.equal(data.labels, labels)


def test_clean_label_keeps_every_label() -> None:
    data = examples()
    result = poison(data, Mark(), CleanLabel(4), 10, 0.02)
    assert torch.equal(result.examples.labels, data.labels)
    assert (data.labels[result.triggered] == 4).all()
    assert result.triggered.sum() == 4


def test_cover_needs_a_trigger_that_has_one() -> None:
    assert not marked(poison(examples(), Mark(), AllToOne(), 10, 0.1, cover=2.0).examples, "covered").any()


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan])
def test_rates_out_of_range(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"poison rate must be in \(0, 1\], got"):
        poison(examples(), Mark(), AllToOne(), 10, rate)


@pytest.mark.parametrize("rule", [AllToOne(3), CleanLabel(3)])
def test_trigger_all_leaves_out_the_target_class(rule: Any) -> None:
    data = examples()
    result = trigger_all(data, Mark(), rule, 10)
    assert len(result.examples) == int((data.labels != 3).sum())
    assert result.triggered.all()
    assert marked(result.examples).all()
    assert (result.labels != 3).all()
    assert (result.targets == 3).all()
    assert torch.equal(result.examples.labels, result.labels), "true labels stay; success is judged elsewhere"
    assert [value[1] for value in result.examples.values] == [i for i in range(200) if data.labels[i] != 3]


def test_trigger_all_takes_every_class_all_to_all() -> None:
    data = examples()
    result = trigger_all(data, Mark(), AllToAll(), 10)
    assert len(result.examples) == 200
    assert torch.equal(result.targets, (data.labels + 1) % 10)
    assert result.targets[data.labels == 9].unique().tolist() == [0], "the last class becomes the first"


def test_rules_by_name() -> None:
    for name, rule in RULES.items():
        made = make_rule(name, target=2, classes=3)
        assert type(made) is rule
        assert getattr(made, "target", 2) == 2
    with pytest.raises(UnknownName, match="unknown target rule 'all-to-on'; did you mean 'all-to-one'"):
        make_rule("all-to-on")
    with pytest.raises(ConfigError, match=r"target class must be in 0..2, got 3"):
        make_rule("all-to-one", target=3, classes=3)


@pytest.mark.parametrize("name", NAMES)
def test_real_triggers_go_through_a_poisoned_view(name: str) -> None:
    data = FakeExamples([picture(seed=i) for i in range(6)], torch.arange(6) % 3)
    result = poison(data, make_trigger(name), AllToOne(0), 3, 0.5, cover=1.0)
    for i in range(6):
        if result.triggered[i]:
            assert torch.equal(result.examples.raw(i), make_trigger(name)(data.raw(i)))
