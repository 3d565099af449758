"""Run one implant job on any number of processes: the same as `hf-purify implant`, from a preset and settings.

accelerate launch recipes/implant.py PRESET key=value ...
accelerate launch -m hf_purify_recipes.implant PRESET key=value ...
"""

import sys

from hf_purify.cli.scripts import run_script

if __name__ == "__main__":
    run_script("implant", sys.argv[1:])
