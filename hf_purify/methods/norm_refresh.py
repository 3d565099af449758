"""Refreshing the norm statistics alone: the control for methods that run batch norms in train mode."""

from __future__ import annotations

import torch

from hf_purify.method import Context, Method, Verdict
from hf_purify.routines import refresh_norms


class NormRefresh(Method):
    """Estimate the running statistics of batch norms anew on the clean samples; no weight changes.

    What a mask method that tunes with batch statistics gains beyond this is its own. Without batch norms it does nothing.

    Reference: none; a control.
    """

    name = "norm_refresh"
    control = True

    def purify(self, ctx: Context) -> Verdict:
        count = refresh_norms(ctx)
        return Verdict(torch.zeros(len(ctx.index)), torch.ones(len(ctx.index)), notes={"norms refreshed": count})
