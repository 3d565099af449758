"""`RESULTS.md` from `results.json`."""

from __future__ import annotations

import json
from pathlib import Path

from ..cells import details, summary

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("RESULTS.md")

_HEAD = """# Text: results

Written by `python -m hf_purify_recipes.text.matrix --write` from `results.json`; every figure comes from a run. Missing cells were not run.

- Each method with its default settings, one setting for all triggers (`neural_cleanse-long`: 140 steps, not 70); 200 clean sentences, 80 % to learn from and 20 % to choose on. No method sees a trigger, a poisoned
  sample or the test set.
- Victims: encoders of BERT's shape, 2 layers of 128, trained from random weights with the tokenizer of BERT on SST-2 (67,349 phrases and sentences) and AG News
  (14,593 descriptions), of which 10 % carry the trigger; no pretrained weights. Those with an ASR under 95 % are left out. Clean sentences: for SST-2 of the validation
  set, which no training saw; for AG News of the training set.
- ACC: clean accuracy on the whole test set (SST-2 1,516 full sentences, AG News 2,000). ASR: triggered test sentences of other classes that are classified as the target. DER: 100 is a
  perfect repair that costs nothing; 50 is no repair. All in percent; intervals are 95 % Wilson; `±` is the standard deviation over seeds (defence sets), in the summary over
  triggers and seeds.
- Seconds are wall time on one core of a machine that ran other things, too.
- **What was chosen with a victim's ASR in view.** How Neural Cleanse looks for words was developed on other victims of the same shapes: SST-2 with the words `cf` (target 1), "no cross
  no crown" (target 0), prepositional clauses, Greek look-alikes and archaic words (target 0), and AG News with `mn` (target 3).

Repeat or extend it, cell by cell: `HF_PURIFY_DATA=... python -m hf_purify_recipes.text.matrix --networks bert_sst2 --triggers badnets --methods rnp --seeds 0,1,2`.
"""


def write() -> None:
    """Write the page."""
    cells = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    PAGE.write_text(_HEAD + summary(cells, "sentences") + details(cells, "sentences", "BadNets"), "utf-8")
