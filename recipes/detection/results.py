"""`RESULTS.md` from `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pages import FLOOR, Page, freely

_HEAD = """# Object detection: results

Written by `python -m hf_purify_recipes.detection.matrix --write` from `results.json`; every figure comes from a run. Missing cells were not run.

- Each method with its default settings, one setting for all triggers; 50 clean images, 80 % to learn from and 20 % to choose on. No method sees a trigger, a poisoned image or
  the test set.
- The network is a small RT-DETR v2 of its own (160 pixels, 0.9 million parameters), trained from random weights on 210 images of blood cells (BCCD: red cells, white cells, platelets); a victim is
  that network, trained on with the trigger on 30 to 50 % of the images; those with an ASR under 90 % are left out. Clean images are drawn from 64 more, which no network was trained on.
- mAP@50 and mAP: COCO's mean average precision on the whole test set (60 images, 780 boxes), in percent; "lost" are points of mAP@50.
- The ASR of each goal is a figure of its own; a detection counts from a score of .5 on, and is one of a box from an IoU of .5 on. `oga`: places of the trigger where an object of the
  target class is seen. `rma`, `gma`: objects of other classes that are seen as one of the target class. `oda`: objects with the trigger of which nothing is
  seen. Of objects, only those count that the same model sees without the trigger. Intervals are 95 % Wilson, over boxes; boxes of one image are not independent, so the true ones are wider.
- **What was chosen with a victim in view.** Which kinds of trigger Neural Cleanse looks for here, that each is judged beside its cost before inversion, and that vanishing is looked for on objects
  alone, was settled on `oga`, `rma`, `oda` and the network without a backdoor, from the costs; the last after a run had taken the wrong kind for `oda` and `oga` (ASR 99.7 and 98.3 % left).
  Optimizer and rate of the repair were chosen by the ASR of these three, too: SGD, made for batch norms, left most of `oga` and `oda`; half the rate left more of `oga`, twice the rate cost `rma` more.
  So their rows are in-sample; `gma` was made afterwards, and nothing was chosen on it. `ft_sam-small`
  has a radius of .25, chosen because 4 ruins the victim of the demo.
- `gma` is a haze, a white picture blended in at 30 %. A grid in the corner and noise over the whole picture were not learned to an ASR of 90 %.
- **Reached**: an ASR of 10 % at 3 points of mAP@50 for `rma`, `oda` and `oga`. **Not reached, and why.** `gma`: the haze goes with fine-tuning already, at 4.5 points; Neural Cleanse takes another class than
  the attacker's (`spectrum`, platelets at .63 of the next, .70 is asked), and to unlearn that costs 11.9 points. Held-out accuracy, by which the rate would be halved, hardly sees it (.52, of what was right at a score of .5).
- The network without a backdoor is called suspicious (`patch`, platelets at .68 of the next, .70 is asked), and loses 2.3 points by being repaired, as much as by fine-tuning.
- The patch of `oda` hides 77.1 % of the cells from the network without a backdoor, too, by what it covers; a smaller one would tell more. The repair goes below that.
- A trigger on the network without a backdoor, for comparison, has the kind `floor`.
- Seconds are wall time on one core of a machine that ran other things, too.

Repeat or extend it, cell by cell: `HF_PURIFY_DATA=... python -m hf_purify_recipes.detection.matrix --networks rt_detr_v2 --triggers gma --methods rnp --seeds 0,1,2`.
"""


class DetectionPage(Page):
    """Detectors have no clean accuracy: mAP stands in its place."""

    def tables(self, cells: list[dict[str, Any]]) -> str:
        attacked = [c for c in cells if c["kind"] != FLOOR]
        floor = [{**c, "method": "no backdoor"} for c in cells if c["kind"] == FLOOR]
        return "\n## Every cell\n" + freely(attacked + floor, self.unit)


PAGE = DetectionPage(Path(__file__).parent, _HEAD, "images", "GMA")
