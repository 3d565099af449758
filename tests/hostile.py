"""Pictures and videos whose headers lie."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG whose header says so much, and which holds so many rows; all of them if not given."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    held = zlib.compress(bytes((width + 1) * (height if rows is None else rows)), 1)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", held) + chunk(b"IEND", b"")


def jpeg(side: int = 64) -> bytes:
    """A JPEG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def lying_film(file: Path, width: int, height: int) -> bytes:
    """An AVI of four frames of 32x32 pixels as they are, whose header says another size."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(file.read_bytes())
    at = content.index(b"strf") + 12
    content[at : at + 8] = struct.pack("<ii", width, height)
    return bytes(content)
