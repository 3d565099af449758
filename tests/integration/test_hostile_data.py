"""Data and templates that were made to do harm: what is said about each, and that nothing is fetched, filled or left behind."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from films import film
from hostile import jpeg, lying_film, png
from PIL import Image
from refusals import Case
from torch import nn
from torchvision.transforms import ToTensor

from hf_purify import measure, tables
from hf_purify.errors import ConfigError, DataError, PurifyError, UnsafeCheckpoint
from hf_purify_adapters import _images
from hf_purify_adapters._images import open_image
from hf_purify_adapters.pointcloud.examples import to_cloud
from hf_purify_adapters.pointcloud.files import open_clouds, read_mesh
from hf_purify_adapters.text import chat
from hf_purify_adapters.text.chat import check_template
from hf_purify_adapters.text.prompts import Prompt
from hf_purify_adapters.text.tiny import tiny_tokenizer
from hf_purify_adapters.video import clips
from hf_purify_adapters.video.clips import read_clip
from hf_purify_adapters.vision.examples import decode_column

CLASSES = 3


def module() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, CLASSES))


def pictures(cell: dict[str, Any] | None) -> datasets.Dataset:
    """Twelve good pictures, and this as the fifth."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, format="PNG")
    cells = [cell if i == 4 else {"bytes": buffer.getvalue(), "path": None} for i in range(12)]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": cells, "label": [i % CLASSES for i in range(12)]}, features=features)
    return data.cast_column("image", datasets.Image())


def held(content: bytes) -> Callable[[], datasets.Dataset]:
    return lambda: pictures({"bytes": content, "path": None})


def named(path: str) -> Callable[[], datasets.Dataset]:
    return lambda: pictures({"bytes": None, "path": path})


def refused(message: str, clean: Callable[[], datasets.Dataset]) -> Case:
    return Case(DataError, rf"row 4 of column 'image'.*{message}", {"clean": clean})


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/etc/passwd) (r) file\n"
PICTURES: dict[str, Case] = {
    "a bomb": refused("900000000 pixels", held(png(30000, 30000, 1))),
    "a bomb that Pillow lets pass": refused("picture of 9000x9000 pixels.*67,108,864 in all are the most", held(png(9000, 9000, 1))),
    "the largest header": refused("cannot be decoded|is a picture of", held(png(2**31 - 1, 2**31 - 1, 0))),
    "no pixels": refused("cannot be decoded|is a picture of 0x5|is no picture", held(png(0, 5))),
    "rows that are missing": refused("cannot be decoded as a picture|is no picture", held(png(64, 64, 3)[:-30])),
    "half a picture": refused("cannot be decoded as a picture: .*truncated", held(jpeg()[:700])),
    "a text": refused("is no picture that can be read", held(b"hello, hello")),
    "a program for a printer": refused("is no picture that can be read", held(EPS)),
    "nothing": refused("is empty", held(b"")),
    "neither content nor file": refused("is missing: it has neither", lambda: pictures(None)),
    "an address": refused("lies elsewhere, and only the Hub is called", named("http://169.254.169.254/latest/meta-data")),
    "an address in an archive": refused("lies elsewhere", named("zip://a.png::https://127.0.0.1:9/x.zip")),
    "an archive of programs": refused("lies elsewhere", named("simplecache::hf://datasets/a/b/x.png")),
    "a picture as an address": refused("lies elsewhere", named("data:image/png;base64,iVBORw0KGgo=")),
    "a file as an address": refused("lies elsewhere", named("file:///etc/passwd")),
    "a share of another machine": refused("lies elsewhere", named("smb://host/share/x.png")),
    "a file that is none": refused(r"\('/nowhere/x.png'\) does not exist", named("/nowhere/x.png")),
    "a device": refused(r"\('/dev/zero'\) is no regular file", named("/dev/zero")),
    "a folder": refused("is no regular file", named("/")),
    "a name with a zero": refused("cannot be read|does not exist", named("/tmp/a\x00b.png")),
}


@pytest.mark.parametrize("case", PICTURES.values(), ids=PICTURES)
@pytest.mark.timeout(60)
def test_pictures(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path, model=module, method="random_mask", samples=None, processor=ToTensor(), labels=list("abc"))


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"row 4 .*is no regular file"):
        measure(module(), named(str(tmp_path / "x.png"))(), processor=ToTensor(), device="cpu")
    with pytest.raises(DataError, match=r"the video \('.*'\) is no regular file"):
        read_clip(str(tmp_path / "x.png"), 2)


def test_of_many_frames_the_first_is_decoded() -> None:
    frames = [Image.new("RGB", (8, 8), (k % 256, 0, 0)) for k in range(300)]
    for kind in ("GIF", "TIFF"):
        buffer = io.BytesIO()
        frames[200].save(buffer, format=kind, save_all=True, append_images=frames)
        found = open_image({"bytes": buffer.getvalue(), "path": None}, "a picture")
        assert np.asarray(found.convert("RGB"))[0, 0].tolist() == [200, 0, 0]


def test_pictures_are_those_that_datasets_decodes() -> None:
    """Turned as their camera says, in the mode that the feature asks for."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)).save(buffer, format="PNG", exif=exif)
    for mode in (None, "L"):
        feature = datasets.Image(mode=mode)
        expected = np.asarray(feature.decode_example({"bytes": buffer.getvalue(), "path": None}))
        assert np.array_equal(np.asarray(open_image(buffer.getvalue(), "a picture", mode)), expected)


def test_many_large_pictures_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.psutil, "virtual_memory", lambda: type("Free", (), {"available": 2000})())
    with pytest.raises(DataError, match="the memory is full at row 2, after 3 of 12 samples"):
        decode_column(pictures({"bytes": png(16, 16), "path": None}), "image", torch.arange(12), 3, True)


def test_pictures_within_the_bound_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_images, "PIXELS", 64 * 64)
    assert open_image(jpeg(64), "a picture").size == (64, 64)
    with pytest.raises(DataError, match="65x65"):
        open_image(jpeg(65), "a picture")


class TestVideos:
    def test_frames_of_absurd_size(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"have 20000x20000 pixels; 67108864 in all|cannot be decoded as a video"):
            read_clip(lying_film(tmp_path / "a.avi", 20000, 20000), 2)

    def test_frames_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot be decoded as a video|holds no frame"):
            read_clip(lying_film(tmp_path / "a.avi", 4000, 4000), 2)

    def test_frames_that_are_larger_than_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = film(tmp_path / "a.mp4", [np.zeros((32, 32, 3), dtype=np.uint8)] * 3)
        monkeypatch.setattr(clips, "PIXELS", 31 * 32)
        with pytest.raises(DataError, match="have 32x32 pixels; 992 in all are the most"):
            read_clip(str(file), 2)

    def test_frames_like_threads(self, tmp_path: Path) -> None:
        file = film(tmp_path / "a.mp4", [np.zeros((4, 512, 3), dtype=np.uint8)] * 3)
        with pytest.raises(DataError, match="512x4 pixels; one side may be 64 times the other"):
            read_clip(str(file), 2)

    def test_large_frames_are_counted_in_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(clips, "ALL_PIXELS", 32 * 32 * 5)
        assert read_clip(str(film(tmp_path / "a.mp4", [np.zeros((32, 32, 3), dtype=np.uint8)] * 40)), 2).total == 5

    def test_files_of_absurd_size(self, tmp_path: Path) -> None:
        with (tmp_path / "a.mp4").open("wb") as file:
            file.truncate(clips.LARGEST + 2**20)  # of which the disk holds nothing
        with pytest.raises(DataError, match="has 4,097 MiB; 4,096 are the most"):
            read_clip(str(tmp_path / "a.mp4"), 2)

    @pytest.mark.parametrize(
        "head", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "v=0\nc=IN IP4 127.0.0.1\n"]
    )
    def test_lists_open_no_other_file(self, head: str, tmp_path: Path) -> None:
        other = film(tmp_path / "b.mp4", [np.zeros((32, 32, 3), dtype=np.uint8)] * 3)
        (tmp_path / "a.mp4").write_text(head.format(other))
        with pytest.raises(DataError, match=r"cannot be decoded as a video|no frame that can be decoded"):
            read_clip(str(tmp_path / "a.mp4"), 2)

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            ({"bytes": None, "path": "http://127.0.0.1:9/a.mp4"}, r"clip \d+ \('http.*lies elsewhere"),
            ({"bytes": None, "path": "/dev/zero"}, r"clip \d+ \('/dev/zero'\) is no regular file"),
            (None, r"clip \d+ has no frames|clip \d+ is missing"),
            ({"bytes": b"", "path": None}, r"clip \d+ is empty"),
        ],
    )
    def test_cells(self, cell: dict[str, Any] | None, message: str) -> None:
        features = datasets.Features({"video": datasets.Video(decode=False), "label": datasets.Value("int64")})
        data = datasets.Dataset.from_dict({"video": [cell] * 6, "label": [0, 1, 2] * 2}, features=features)
        settings: dict[str, Any] = {"adapter": "video", "processor": lambda clip: clip[0] / 255, "labels": list("abc"), "device": "cpu"}
        with pytest.raises(DataError, match=message):
            measure(module(), data, **settings)

    def test_frames_that_lie_elsewhere(self) -> None:
        features = datasets.Features({"video": datasets.List(datasets.Image(decode=False)), "label": datasets.Value("int64")})
        cells = [[{"bytes": None, "path": "http://127.0.0.1:9/a.png"}] * 3] * 6
        data = datasets.Dataset.from_dict({"video": cells, "label": [0, 1, 2] * 2}, features=features)
        data = data.cast(datasets.Features({"video": datasets.List(datasets.Image()), "label": datasets.Value("int64")}))
        with pytest.raises(DataError, match=r"frame \d of clip \d+ .*lies elsewhere"):
            measure(module(), data, adapter="video", processor=lambda clip: clip[0] / 255, labels=list("abc"), device="cpu")


CORNERS = b"0 0 0\n1 0 0\n0 1 0\n"
PLY = b"ply\nformat binary_little_endian 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\n"
MESHES: dict[str, tuple[str, bytes, str]] = {
    "counts of points": ("a.off", b"OFF\n999999999999 1 0\n" + CORNERS + b"3 0 1 2\n", "cannot be read as a off mesh"),
    "counts that are negative": ("a.off", b"OFF\n-3 -1 0\n" + CORNERS + b"3 0 1 2\n", "no faces|cannot be read"),
    "a count of a million digits": ("a.off", b"OFF " + b"9" * 10**6, "cannot be read as a off mesh"),
    "points that are not there": ("a.off", b"OFF\n3 1 0\n" + CORNERS + b"3 0 1 999999999\n", "cannot be read as a off mesh"),
    "a point before the first": ("a.off", b"OFF\n3 1 0\n" + CORNERS + b"3 0 1 -9\n", "cannot be read as a off mesh"),
    "points of a binary file": ("a.ply", PLY % 99999999999 + b"end_header\n" + bytes(36), "cannot be read as a ply mesh"),
    "corners of a binary file": (
        "a.ply",
        PLY % 3 + b"element face 1\nproperty list int int vertex_indices\nend_header\n" + bytes(36) + b"\xff\xff\xff\x7f" + bytes(12),
        "cannot be read as a ply mesh",
    ),
    "a number of a point": ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 99999999999999\n", "cannot be read as a obj mesh"),
    "no number": ("a.obj", b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "NaN or infinite"),
    "an endless face": ("a.obj", b"v 0 0 0\nv 1e308 0 0\nv 0 1e308 0\nf 1 2 3\n", "no area to draw points from"),
}


@pytest.mark.parametrize(("name", "content", "message"), MESHES.values(), ids=MESHES)
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.timeout(60)
def test_meshes(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_mesh(str(tmp_path / name))


def test_meshes_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "a.off").open("wb") as file:
        file.truncate(2**28 + 2**20)
    with pytest.raises(DataError, match="has 257 MiB; 256 are the most"):
        read_mesh(str(tmp_path / "a.off"))


def test_pictures_that_a_mesh_names_are_not_looked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = b"ply\nformat ascii 1.0\ncomment TextureFile ../../../etc/passwd\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    (tmp_path / "a.ply").write_bytes(
        head + b"element face 1\nproperty list uchar int vertex_indices\nend_header\n" + CORNERS + b"3 0 1 2\n"
    )
    assert read_mesh(str(tmp_path / "a.ply")).shape == (2048, 3)
    assert not caplog.records


def test_cloud_without_numbers(tmp_path: Path) -> None:
    head = b"ply\nformat ascii 1.0\nelement vertex 20\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    (tmp_path / "a.ply").write_bytes(head + b"nan 0 0\n" * 20)
    with pytest.raises(DataError, match="a cloud holds NaN or infinite coordinates in 20 of 20"):
        to_cloud(read_mesh(str(tmp_path / "a.ply")), "a cloud")


def test_archives_that_unpack_to_too_much(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", bytes(1000))
    lying = bytearray(content.getvalue())
    at = lying.index(b"PK\x01\x02") + 24
    lying[at : at + 4] = struct.pack("<I", 3 * 2**30)
    (tmp_path / "a.npz").write_bytes(lying)
    with pytest.raises(DataError, match=r"holds 3\.0 GiB when it is unpacked; 2 is the most"):
        open_clouds(str(tmp_path / "a.npz"))


def test_arrays_that_grow_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_purify_adapters.pointcloud import files

    np.savez(tmp_path / "a.npz", points=np.zeros((10, 40, 3), dtype=np.uint8), label=np.zeros(10, dtype=np.int64))
    monkeypatch.setattr(files, "LARGEST", 4000)
    with pytest.raises(DataError, match="holds 400 points; 333 are the most"):
        open_clouds(str(tmp_path / "a.npz"))


LOOPS = "".join(f"{{% for x{i} in range(99) %}}" for i in range(10)) + "{}" + "{% endfor %}" * 10
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
TEMPLATES: dict[str, tuple[str, type[PurifyError], str]] = {
    "loops that say nothing": (LOOPS.replace("{}", ""), UnsafeCheckpoint, "takes more than 2 seconds"),
    "loops that write": (LOOPS.replace("{}", "x"), UnsafeCheckpoint, "TooLong: a dialogue becomes a text of more than"),
    "a large text": ("{{ 'a' * 10 ** 9 }}", UnsafeCheckpoint, "MemoryError"),
    "a text that doubles": (DOUBLING, UnsafeCheckpoint, "MemoryError"),
    "a wide number": ("{{ '%0999999999d' % 1 }}", UnsafeCheckpoint, "MemoryError|TooLong"),
    "a wide text": ("{{ 'a'.center(10 ** 8) }}", UnsafeCheckpoint, "TooLong|MemoryError"),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", UnsafeCheckpoint, "RecursionError"),
    "a loop of itself": ("{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", UnsafeCheckpoint, "RecursionError"),
    "brackets": ("{{ " + "(" * 50000 + " }}", UnsafeCheckpoint, "RecursionError|MemoryError|ended with code"),
    "classes": ("{{ ().__class__.__mro__[1].__subclasses__() }}", UnsafeCheckpoint, "SecurityError: access to attribute '__class__'"),
    "globals of a function": ("{{ raise_exception.__globals__.x }}", UnsafeCheckpoint, "SecurityError"),
    "a change of the dialogue": ("{{ messages.clear() }}", UnsafeCheckpoint, "SecurityError"),
    "chance": ("{{ [1, 2]|random }}", UnsafeCheckpoint, "ByChance: it uses random"),
    "megabytes": ("x" * (2**20 + 1), UnsafeCheckpoint, "has 1,048,577 letters; 1,048,576 are the most"),
    "a file": ("{% include '/etc/passwd' %}", DataError, "the chat template failed: TypeError: no loader"),
    "a module": ("{% import 'os' as os %}", DataError, "the chat template failed: TypeError: no loader"),
    "a base": ("{% extends 'x' %}", DataError, "the chat template failed: TypeError: no loader"),
    "no template": ("{% for", DataError, "the chat template failed: TemplateSyntaxError"),
}
DIALOGUE = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a dog"}]


def with_template(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "error", "message"), TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.timeout(120)
def test_chat_templates(template: str, error: type[PurifyError], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 2)
    with pytest.raises(error, match=message):
        check_template(with_template(template), [DIALOGUE])


def test_a_template_that_waits_for_its_word_is_tried_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }}{% if 'dog' in messages[0].content %}{{ 'a' * 10 ** 9 }}{% endif %}"
    check_template(with_template(template), [DIALOGUE])
    with pytest.raises(UnsafeCheckpoint, match="MemoryError"):
        check_template(with_template(template), [[{"role": "user", "content": "a dog"}, DIALOGUE[1]]])


def test_templates_that_transformers_renders_pass_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its sandbox knows is there, and what was rendered is not rendered again."""
    template = """{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}
{{ bos_token }}{{ m['content'] | tojson }}{{ m.role | upper }}{% generation %}{{ m.content.strip() }}{% endgeneration %}{% endfor %}
{{ strftime_now('%Y') }}{{ dict(a=1) | tojson(indent=2) }}{% if add_generation_prompt and not tools %}>{% endif %}{{ unknown is defined }}"""
    tokenizer = with_template(template)
    assert "USER" in tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    check_template(tokenizer, [DIALOGUE])

    def fail(*given: Any) -> None:
        pytest.fail("it was rendered twice")

    monkeypatch.setattr(chat, "_try", fail)
    check_template(tokenizer, [DIALOGUE])


def test_several_templates_without_a_plain_one() -> None:
    with pytest.raises(DataError, match="the chat template failed"):
        check_template(with_template({"tool_use": "x", "rag": "y"}), [DIALOGUE])


@pytest.mark.parametrize("template", ["{text.__class__}", "{0.__class__}", "{text!r}", "{text:>999999999}"])
def test_templates_of_ours_read_no_attributes(template: str) -> None:
    with pytest.raises(ConfigError, match=r"needs \{text\} in it exactly once"):
        Prompt(tiny_tokenizer(), "classifier", template)
    assert Prompt(tiny_tokenizer(), "classifier", template + "{text}")._filled("a cat") == template + "a cat"


def test_cells_that_are_formulas_are_texts(tmp_path: Path) -> None:
    cells = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1"]
    quoted = "\n".join(f'"{cell}",{i % 2}' for i, cell in enumerate(cells))
    (tmp_path / "a.csv").write_text(f"text,label\n{quoted}\n")
    assert tables.open_data(str(tmp_path / "a.csv"))["text"][:] == cells
