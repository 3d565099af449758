"""Attack success rate with its 95 % interval, as an `evaluate` metric over `hf_purify.metrics`."""

import datasets
import evaluate

from hf_purify import metrics

DESCRIPTION = """
Share of triggered samples classified as the attacker's target, with its 95 % Wilson interval; samples of the target class do not count.
"""
INPUTS = """
Args:
    predictions (list of int): classes predicted for triggered samples, `(n,)`.
    references (list of int): their true classes, `(n,)`.
    targets (list of int): the class that the attacker wants for each, `(n,)`.

Returns:
    attack_success_rate (float): in 0..1; NaN where there was nothing to count.
    low (float), high (float): 95 % Wilson interval, in 0..1.
    n (int): samples that count.

Examples:
    >>> metric = evaluate.load("attack_success_rate")
    >>> metric.compute(predictions=[0, 0, 1, 0], references=[1, 2, 1, 0], targets=[0, 0, 0, 0])["n"]
    3
"""
CITATION = """\
@article{gu2017badnets,
  title={BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain},
  author={Gu, Tianyu and Dolan-Gavitt, Brendan and Garg, Siddharth},
  journal={arXiv preprint arXiv:1708.06733},
  year={2017}
}
"""


class AttackSuccessRate(evaluate.Metric):
    """Share of triggered samples classified as the attacker's target."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({column: datasets.Value("int64") for column in ("predictions", "references", "targets")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[int], references: list[int], targets: list[int]) -> dict[str, float | int]:
        share = metrics.attack_success_rate(predictions, references, targets)
        low, high = share.interval
        return {"attack_success_rate": share.value, "low": low, "high": high, "n": share.n}
