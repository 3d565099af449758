"""Clean accuracy with its 95 % interval, as an `evaluate` metric over `hf_purify.metrics`."""

import datasets
import evaluate

from hf_purify import metrics

DESCRIPTION = "Share of clean samples classified as labelled, with its 95 % Wilson interval."
INPUTS = """
Args:
    predictions (list of int): classes predicted for clean samples, `(n,)`.
    references (list of int): their true classes, `(n,)`.

Returns:
    clean_accuracy (float): in 0..1; NaN where there was nothing to count.
    low (float), high (float): 95 % Wilson interval, in 0..1.
    n (int): samples that count.

Examples:
    >>> metric = evaluate.load("clean_accuracy")
    >>> metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])["clean_accuracy"]
    0.75
"""
CITATION = """\
@article{wilson1927probable,
  title={Probable Inference, the Law of Succession, and Statistical Inference},
  author={Wilson, Edwin B.},
  journal={Journal of the American Statistical Association},
  volume={22},
  number={158},
  pages={209--212},
  year={1927}
}
"""


class CleanAccuracy(evaluate.Metric):
    """Share of clean samples classified as labelled."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float | int]:
        share = metrics.clean_accuracy(predictions, references)
        low, high = share.interval
        return {"clean_accuracy": share.value, "low": low, "high": high, "n": share.n}
