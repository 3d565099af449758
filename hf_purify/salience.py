"""Scores per neuron, each a pure function of weights, gradients or activations: `(N,)`, aligned with an index."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_purify.adapter import Batch
from hf_purify.neurons import NeuronIndex, get_tensor, owned


def per_neuron(index: NeuronIndex, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum values of parameters over the slices that each neuron owns; parameters that are not given count zero.

    Args:
        tensors: parameter name -> values of the parameter's shape.

    Returns:
        `(N,)` float32.
    """
    scores = []
    for group in index:
        total = torch.zeros(group.size)
        for part in group.params:
            if part.param in tensors:
                view = owned(tensors[part.param], part, group.size)
                total += (view.sum(tuple(range(1, view.dim()))) if view.dim() > 1 else view).float().cpu()
        scores.append(total)
    return torch.cat(scores) if scores else torch.empty(0)


def weight_change(index: NeuronIndex, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """Unlearning weight change: `sum |w_after - w_before|` over what a neuron owns (Lin et al., arXiv 2405.20291).

    Sums of different layers are not comparable: `index.standardize` brings them to one scale.
    """
    names = {p.param for g in index for p in g.params}
    return per_neuron(index, {n: (after[n] - before[n]).abs() for n in names if n in before and n in after})


def relative_change(index: NeuronIndex, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """How far a repair moved each layer: `||w_after - w_before|| / ||w_before||` over all that its neurons own.

    Returns:
        `(groups,)`; infinite where there was nothing but zeros before.
    """
    found = []
    for group in index:
        pairs = [(owned(before[p.param], p, group.size), owned(after[p.param], p, group.size)) for p in group.params if p.param in before]
        old = math.hypot(*(float(w.float().norm()) for w, _ in pairs))
        moved = math.hypot(*(float((v.float() - w.float()).norm()) for w, v in pairs))
        found.append(moved / old if old else math.inf if moved else 0.0)
    return torch.tensor(found)


def benign_salience(
    model: nn.Module, index: NeuronIndex, losses: Callable[[Batch], Tensor], batches: Iterable[Batch], eta: float = 0.9
) -> Tensor:
    """First-order loss of the clean task when a neuron is set to zero (Fan et al., arXiv 2208.06537).

    `S_t = eta S_{t-1} - (1 - eta) g_t theta_t`, summed over what the neuron owns. Large: the benign task needs it. One
    backward pass per batch, whatever the number of neurons.

    Args:
        losses: gives the loss per example `(B,)` of a batch.
    """
    names = {p.param for g in index for p in g.params}
    params = {n: p for n, p in model.named_parameters() if n in names}
    flags = {p: p.requires_grad for p in model.parameters()}
    chosen = set(params.values())
    total = torch.zeros(len(index))
    try:
        for p in flags:
            p.requires_grad_(p in chosen)
        for batch in batches:
            with torch.enable_grad():
                grads = torch.autograd.grad(losses(batch).mean(), list(params.values()), allow_unused=True)
            products = {n: -(g * p.detach()) for (n, p), g in zip(params.items(), grads, strict=True) if g is not None}
            total = eta * total + (1 - eta) * per_neuron(index, products)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return total


def lipschitz(model: nn.Module, index: NeuronIndex) -> Tensor:
    """Upper bound of each channel's Lipschitz constant, from weights alone (Zheng et al., ECCV 2022).

    `sigma_max(reshape(W_c)) * |gamma_c / sqrt(var_c)|` for a filter in front of a batch norm; the norm of the rows a
    neuron owns elsewhere.
    """
    scores = []
    for group in index:
        module = model.get_submodule(group.module)
        filters = [p for p in group.params if p.param.endswith("weight") and get_tensor(model, p.param).dim() > 1]
        bound = torch.ones(group.size)
        for part in filters:
            rows = owned(get_tensor(model, part.param).detach().float().cpu(), part, group.size)
            bound = bound * torch.linalg.matrix_norm(rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(1), ord=2)
        if isinstance(variance := getattr(module, "running_var", None), Tensor):
            scale = get_tensor(model, group.gate.param).detach() / (variance + float(getattr(module, "eps", 1e-5))).sqrt()
            bound = bound * scale.abs().float().cpu()
        scores.append(bound)
    return torch.cat(scores) if scores else torch.empty(0)


def mad_scores(values: Tensor) -> Tensor:
    """Distance from the median in units of 1.4826 MAD, `(n,)`, signed; all zero where the values do not spread.

    Where more than half of the values are equal, the interquartile range stands in for the MAD.
    """
    values = values.float()
    center = values.median()
    spread = 1.4826 * (values - center).abs().median()
    if spread <= 1e-12 * values.abs().max().clamp_min(1e-12):
        spread = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    if spread <= 1e-12 * values.abs().max().clamp_min(1e-12):
        return torch.zeros_like(values)
    return (values - center) / spread


def mad_outliers(values: Tensor, cut: float = 3.5, at_most: int | None = None) -> Tensor:
    """Positions of upper outliers by the MAD rule, largest first.

    >>> mad_outliers(torch.tensor([1.0, 1.1, 0.9, 1.05, 0.95, 9.0])).tolist()
    [5]
    """
    z = mad_scores(values)
    order = z.argsort(descending=True)
    return order[z[order] > cut][:at_most]
