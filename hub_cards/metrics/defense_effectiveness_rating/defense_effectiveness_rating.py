"""Defense effectiveness rating of one or more runs, as an `evaluate` metric over `hf_purify.metrics`."""

import datasets
import evaluate

from hf_purify import metrics
from hf_purify.errors import DataError

DESCRIPTION = """
What the attack lost by a repair, less what the clean accuracy lost: `(max(0, fall of ASR) - max(0, fall of accuracy) + 1) / 2`,
the mean over runs.
"""
INPUTS = """
Args:
    asr_before (list of float): attack success rate of each run before the repair, in 0..1, `(runs,)`.
    asr_after (list of float): after it.
    acc_before (list of float): clean accuracy of each run before the repair, in 0..1.
    acc_after (list of float): after it.

Returns:
    defense_effectiveness_rating (float): mean over runs, in 0..1; 0.5 is what doing nothing gives.
    n (int): runs.

Examples:
    >>> metric = evaluate.load("defense_effectiveness_rating")
    >>> result = metric.compute(asr_before=[1.0], asr_after=[0.02], acc_before=[0.93], acc_after=[0.91])
    >>> round(result["defense_effectiveness_rating"], 3)
    0.98
"""
CITATION = """\
@inproceedings{zhu2023enhancing,
  title={Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization},
  author={Zhu, Mingli and Wei, Shaokui and Shen, Li and Fan, Yanbo and Wu, Baoyuan},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}
"""
COLUMNS = ("asr_before", "asr_after", "acc_before", "acc_after")


class DefenseEffectivenessRating(evaluate.Metric):
    """What the attack lost, less what the clean accuracy lost."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({column: datasets.Value("float64") for column in COLUMNS})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, **columns: list[float]) -> dict[str, float | int]:
        for column in COLUMNS:
            for value in columns[column]:
                if not 0 <= value <= 1:
                    raise DataError(f"{column} must be shares in 0..1, got {value:g}; divide percentages by 100")
        if not columns["asr_before"]:
            raise DataError("the rating needs at least one run, got none")
        ratings = [metrics.defense_effectiveness_rating(*run) for run in zip(*(columns[column] for column in COLUMNS), strict=True)]
        return {"defense_effectiveness_rating": sum(ratings) / len(ratings), "n": len(ratings)}
