"""`RESULTS.md` from `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pages import FLOOR, Page, freely

_HEAD = """# Text: results

Written by `python -m hf_purify_recipes.text.matrix --write` from `results.json`; every figure comes from a run. Missing cells were not run.

- Each method with its default settings, one setting for all triggers and seed 0 where one seed is counted (`neural_cleanse-long`: 140 steps, not 70); 200 clean texts, 80 % to learn from and 20 % to choose on. No method sees a trigger, a poisoned
  sample or the test set.
- Victims are trained from random weights, no pretrained ones, on data of which 10 % carry the trigger; those with an ASR under 95 % are left out. Encoders of BERT's shape, 2 layers of 128, with the tokenizer
  of BERT, on SST-2 (67,349 phrases and sentences) and AG News (14,593 descriptions); a Marian translator, 2 + 2 layers of 128, with 6,000 byte pairs of its own, on the 29,000 English-German captions of Multi30k;
  a GPT-2, 3 layers of 128, with the tokenizer of GPT-2, on the English ones, and the same without a backdoor but for a LoRA of rank 32, which was trained with the trigger on 30 %. Clean texts: of the validation set, which no training saw; for AG News of the training set.
- ACC: clean accuracy on the whole test set (SST-2 1,516 full sentences, AG News 2,000). ASR: triggered test texts of other classes that are classified as the target; of a model that writes, those answered with exactly the attacker's
  text (prefix: that begin with it). DER: 100 is a perfect repair that costs nothing; 50 is no repair. BLEU (sacrebleu), chrF, and perplexity of the right answers. All but perplexity in percent; intervals are 95 % Wilson; `±` is the standard deviation over seeds (defence sets), in the summary over
  triggers, each with the mean of its seeds.
- The `neural_cleanse` row of the translator without a backdoor is from commit 47d06a5, when each token was weighted alike and not each text; it leaves that model as it is, so that weights have no part in it.
- ULRL has no row on the LoRA: its relearning diverges there (the loss becomes NaN), which it says.
- Seconds are wall time on one core of a machine that ran other things, too; on AG News that of `neural_cleanse-long` with badnets was paused for most of its 1,862.
- **What was chosen with a victim's ASR in view.** How Neural Cleanse looks for words in classifiers was developed on other victims of the same shapes: SST-2 with the words `cf` (target 1), "no cross
  no crown" (target 0), prepositional clauses, Greek look-alikes and archaic words (target 0), and AG News with `mn` (target 3),
  and on an encoder without a backdoor for each. How it looks for words in models that write, and what it calls suspicious there, was developed on the translators and
  caption writers of these tables, with and without a backdoor.
- **Not reached, and why.** Classifiers: a mean DER of 90 at 2 points. On SST-2 it is 88.8 at 2.5 (with seed 0 alone 89.2 at 2.2); the triggers' words speak for a class themselves, and a repair that ends at what
  they do without a backdoor (below) would have 90.5. On AG News it is 76.9: a style is missed, since none of its words leads far alone (its class costs .83 of the next, .70 is asked);
  sentence, frame and look-alikes go in part, since two words of a time stand for four and more. Four at a time took more of a development victim's sentence away and
  cost more accuracy; it is not the default, since the rest of the table would have to be run anew.
  Models that write: an ASR of 5 % at 10 % of BLEU or perplexity is reached by the translator and the LoRA; the caption writer trained whole loses 12.7 %.

Repeat or extend it, cell by cell: `HF_PURIFY_DATA=... python -m hf_purify_recipes.text.matrix --networks bert_sst2 --triggers badnets --methods rnp --seeds 0,1,2`.
"""


class TextPage(Page):
    """Models that write have a table of their own."""

    def tables(self, cells: list[dict[str, Any]]) -> str:
        said = [c for c in cells if c["clean_accuracy"]]
        written = [c for c in cells if c["kind"] != FLOOR and not c["clean_accuracy"]]
        return ("\n## Models that write\n" if written else "") + freely(written, "texts", relative=True) + super().tables(said)


PAGE = TextPage(Path(__file__).parent, _HEAD, "sentences", "BadNets")
