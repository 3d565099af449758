"""Films made of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def film(file: Path, frames: list[np.ndarray], fps: int = 8) -> Path:
    """Frames `(H, W, 3)` as a video, nearly without loss."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file
