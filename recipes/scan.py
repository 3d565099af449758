"""Run one scan on any number of processes: the same as `hf-purify scan`, from a preset and settings.

accelerate launch recipes/scan.py model=MODEL clean=DATA output=scanned
accelerate launch -m hf_purify_recipes.scan model=MODEL clean=DATA output=scanned

What was found is in `scan.json`; the exit code is 0 whatever it is, since a launcher takes any other one for a failure.
"""

import sys

from hf_purify.cli.scripts import run_script

if __name__ == "__main__":
    run_script("scan", sys.argv[1:])
