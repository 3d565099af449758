"""Robust accuracy with its 95 % interval, as an `evaluate` metric over `hf_purify.metrics`."""

import datasets
import evaluate

from hf_purify import metrics

DESCRIPTION = """
Share of triggered samples classified as their true class, with its 95 % Wilson interval; samples of the target class do not count.
"""
INPUTS = """
Args:
    predictions (list of int): classes predicted for triggered samples, `(n,)`.
    references (list of int): their true classes, `(n,)`.
    targets (list of int): the class that the attacker wants for each, `(n,)`.

Returns:
    robust_accuracy (float): in 0..1; NaN where there was nothing to count.
    low (float), high (float): 95 % Wilson interval, in 0..1.
    n (int): samples that count.

Examples:
    >>> metric = evaluate.load("robust_accuracy")
    >>> metric.compute(predictions=[1, 0, 1, 0], references=[1, 2, 1, 0], targets=[0, 0, 0, 0])["n"]
    3
"""
CITATION = """\
@inproceedings{wu2022backdoorbench,
  title={BackdoorBench: A Comprehensive Benchmark of Backdoor Learning},
  author={Wu, Baoyuan and Chen, Hongrui and Zhang, Mingda and Zhu, Zihao and Wei, Shaokui and Yuan, Danni and Shen, Chao},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}
"""


class RobustAccuracy(evaluate.Metric):
    """Share of triggered samples classified as their true class."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({column: datasets.Value("int64") for column in ("predictions", "references", "targets")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[int], references: list[int], targets: list[int]) -> dict[str, float | int]:
        share = metrics.robust_accuracy(predictions, references, targets)
        low, high = share.interval
        return {"robust_accuracy": share.value, "low": low, "high": high, "n": share.n}
