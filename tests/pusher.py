"""A process that pushes what it is told to, a line of JSON at a time: the client of the Hub reads its settings when it is imported."""

from __future__ import annotations

import dataclasses
import json
import sys


def main() -> None:
    from hf_purify import PurifyError, push, uploading

    uploading.SILENCE, uploading.FIRST_WAIT = 3.0, 0.1
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"done": dataclasses.asdict(push(order["folder"], order["repository"], **order["settings"]))}
        except PurifyError as error:
            answer = {"error": type(error).__name__, "said": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
