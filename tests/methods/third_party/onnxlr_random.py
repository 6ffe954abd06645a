"""random-channel-svd: the convolutions of channel-svd, from random mixtures of the kernel."""

import numpy as np

from onnxlr.methods import Array, ConvPass, Layer, Rank

_MORE = 8  # mixtures beyond the rank
_POWERS = 2  # times that the basis is improved


class RandomChannelSvd(ConvPass):
    """SVD within the span of a few mixtures of the lowered kernel's columns."""

    name = "random-channel-svd"
    summary = "S→T as k×k conv S→r, 1×1 conv r→T, by random projections"
    paper = "Halko, Martinsson & Tropp 2011, arXiv 0909.4061"
    equation = "rsp,tr->tsp"  # the first factor's kernel is (r, s, p), the second's (t, r)

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """A basis U of the outputs, and UᵀW; both with a first axis of groups."""
        kernel = self.unfoldings(layer)[0].astype(np.float64)  # (g, T, S·positions)
        _, outputs, columns = kernel.shape
        count = min(rank[0] + _MORE, outputs)
        basis = np.random.default_rng(0).standard_normal((columns, count))
        for _ in range(1 + _POWERS):
            basis = np.linalg.qr(kernel @ basis)[0]
            basis = kernel.swapaxes(1, 2) @ basis
        basis = np.linalg.qr(kernel @ basis)[0]
        u = np.linalg.svd(basis.swapaxes(1, 2) @ kernel, full_matrices=False)[0]
        basis = basis @ u[:, :, : rank[0]]
        return self.store(layer, rank, [basis.swapaxes(1, 2) @ kernel, basis])
