"""Run one measure job on any number of processes: the same as `hf-purify measure`, from a preset and settings.

accelerate launch recipes/measure.py PRESET key=value ...
accelerate launch -m hf_purify_recipes.measure PRESET key=value ...
"""

import sys

from hf_purify.cli.scripts import run_script

if __name__ == "__main__":
    run_script("measure", sys.argv[1:])
