"""Run one purify job on any number of processes: the same as `hf-purify purify`, from a preset and settings.

accelerate launch recipes/purify.py PRESET key=value ...
accelerate launch -m hf_purify_recipes.purify PRESET key=value ...
"""

import sys

from hf_purify.cli.scripts import run_script

if __name__ == "__main__":
    run_script("purify", sys.argv[1:])
