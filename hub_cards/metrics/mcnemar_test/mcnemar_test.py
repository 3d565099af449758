"""Exact McNemar test of two models on the same samples, as an `evaluate` metric over `hf_purify.metrics`."""

import datasets
import evaluate

from hf_purify import metrics

DESCRIPTION = "Exact two-sided p-value that two models are right equally often on the same samples."
INPUTS = """
Args:
    predictions_before (list of int): classes predicted by the first model, `(n,)`.
    predictions_after (list of int): classes predicted by the second model for the same samples, `(n,)`.
    references (list of int): their true classes, `(n,)`.

Returns:
    p_value (float): in 0..1; 1.0 where the models are right on the same samples.
    n (int): samples.

Examples:
    >>> metric = evaluate.load("mcnemar_test")
    >>> metric.compute(predictions_before=[1, 1, 1, 1, 1], predictions_after=[0, 0, 0, 0, 0], references=[1, 1, 1, 1, 1])["p_value"]
    0.0625
"""
CITATION = """\
@article{mcnemar1947note,
  title={Note on the sampling error of the difference between correlated proportions or percentages},
  author={McNemar, Quinn},
  journal={Psychometrika},
  volume={12},
  number={2},
  pages={153--157},
  year={1947}
}
"""
COLUMNS = ("predictions_before", "predictions_after", "references")


class McnemarTest(evaluate.Metric):
    """Exact McNemar test of two models on the same samples."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({column: datasets.Value("int64") for column in COLUMNS})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions_before: list[int], predictions_after: list[int], references: list[int]) -> dict[str, float | int]:
        return {"p_value": metrics.mcnemar(predictions_before, predictions_after, references), "n": len(references)}
