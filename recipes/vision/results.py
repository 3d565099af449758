"""`RESULTS.md` from `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pages import FLOOR, Page, overview, put_between

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- results -->", "<!-- /results -->"
_README = """## Results

Mean DER over triggers / points of clean accuracy lost, with 500 clean images of CIFAR-10 or GTSRB (43 classes). DER 100 is a perfect repair that costs nothing, 50 is none.
In brackets: the number of triggers; behind a figure: that it is of fewer. One setting for all triggers; no method sees a trigger when it runs. Every cell with its n and
interval, the spread, what a clean network loses, and other sample sizes are in [recipes/vision/RESULTS.md](recipes/vision/RESULTS.md).
"""
_README_NOTE = """
The settings of Neural Cleanse come from other backdoors and from clean networks; an earlier run of this table showed which kinds of trigger
it had to learn to look for.
FT-SAM was developed with the ASR of `wrn16_1` in view, and the sequence with that of `resnet20` with badnets, so these rows are
in-sample. Most cells are of one seed.
"""

_HEAD = """# Image classification: results

Written by `python -m hf_purify_recipes.vision.matrix --write` from `results.json`; every figure comes from a run. Missing cells were not run.

- Each method with its default settings, one setting for all triggers; 500 clean images, 80 % to learn from and 20 % to choose on, unless the table says otherwise. No
  method sees a trigger, a poisoned sample or the test set.
- ACC: clean accuracy on the whole test set. ASR: triggered test images of other classes that are classified as the target. DER: 100 is a perfect repair that costs nothing; 50 is no
  repair. All in percent; intervals are 95 % Wilson; `±` is the standard deviation
  over seeds (defence sets), in the summary over triggers, each with the mean of its seeds.
- Victims were made by `implant`: the published or trained network, fine-tuned with 10 % poisoned images. Those with an ASR under 90 % are left out. Four triggers
  differ from the usual ones, since so short a training learned those badly: badnets is the checkerboard (a white square reached 93.5 %), wanet, low_frequency and bpp are stronger
  than the papers': see `victims.py`.
- `wrn16_1` came with its backdoor from others.
- Seconds are wall time on one core of a machine that ran other things, too; `neural_cleanse` on `resnet20` with low_frequency and on `vit` with badnets was stopped for minutes meanwhile.
- **What was chosen with a victim's ASR in view.** FT-SAM was developed on `wrn16_1`, seed 0, against 1,500 of these test images: it was taken from six candidates (two kinds of
  FST, two of universal adversarial tuning, fine-tuning with distillation, FT-SAM); then radius 4 or 8, 30 or 60 epochs, rate .01 or .02, distillation 0, 1 or 3, gradient
  clipping on or off, and the tolerance of the automatic augmentation were settled there. Seeds 1 and 2 draw other clean images for the same victim and the same test images. The
  halving of the radius came after radius 4 ruined the ViT. The settings of `rnp+ft_sam` (`matrix.py`) were taken from nine trials on `resnet20` with badnets, seed 0. So the `ft_sam`
  rows of `wrn16_1` and `vit` and the `rnp+ft_sam` row of `resnet20` with badnets are in-sample, and look better than a new victim would.
- **Neural Cleanse** was developed on other victims: `resnet20` with a 4-pixel checkerboard at the top left, another blended picture, another sine wave (`sig:f=4,delta=25`)
  and another warp, `vit` and `convnext` with that checkerboard, `vit` and `timm_resnet` with that sine wave, all with target 3, on the victim of the demo, and on the clean
  networks of this table; about sixty settings of the unlearning and forty of the search were tried there, with up to 1,500 test images. It was changed twice because
  earlier runs of this table had shown what was missing, so it is in-sample to that extent. A run that searched with patches alone found no class for blended, sig and
  wanet, and left `convnext` at an ASR of .4: spectra, warps and the unlearned model were added, and its optimizer changed. A run after that found no
  class for sig on `timm_resnet` and `vit`: weak waves were added, which are looked for where nothing else stands out, and, for the victim of the demo, pairs of classes.
  These changes were made on the development victims. Cells in which one class stood out at once are from before the second change, which does not touch them (`timm_resnet`
  with badnets was run again, with the same figures); all others are from after it. "Lost on the clean network" is in-sample: the thresholds were set with those networks in view.
- The victims of `timm_resnet`, `resnet56`, `vit` and `resnet20` were made before the warm-up of `implant` was given a first step above zero; made anew they differ by chance.

Repeat or extend it, cell by cell: `HF_PURIFY_DATA=... python -m hf_purify_recipes.vision.matrix --networks resnet20 --triggers badnets --methods rnp --seeds 0,1,2`.
"""


class VisionPage(Page):
    """Writes the table of the README too."""

    def tables(self, cells: list[dict[str, Any]]) -> str:
        rows = [c for c in cells if c["kind"] != FLOOR]
        put_between(README, START, END, _README + "\n" + overview(rows, 500) + _README_NOTE)
        return super().tables(cells)


PAGE = VisionPage(Path(__file__).parent, _HEAD, "images", "BadNets")
