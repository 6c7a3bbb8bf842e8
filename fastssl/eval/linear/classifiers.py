"""Linear classifiers at several learning rates, trained together on the same batches of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.eval.common.metrics import count_correct, percentages, top_ks
from fastssl.eval.common.softmax import loss_and_gradient
from fastssl.eval.linear.recipes import Recipe
from fastssl.norm import convert_sync_bn

MOMENTUM = 0.9
TRUST = 1e-3  # coefficient of LARS
ROWS = 4096  # of test features at a time


class LinearClassifiers:
    """One linear classifier for each of G learning rates on the same features, initialised by N(0, 0.01) and zero bias.

    D dimensions, G rates, C classes.  Closed-form gradients of the mean cross entropy over the global batch.
    """

    def __init__(
        self,
        shape: torch.Size,
        rates: tuple[float, ...],
        classes: int,
        recipe: Recipe,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.recipe, self.shape, dim = recipe, shape, shape.numel()
        self.rates_G1 = torch.tensor(rates, device=device)[:, None]
        start = 0.01 * torch.randn(dim, classes, generator=torch.Generator().manual_seed(seed))
        self.weight_DGC = start.to(device)[:, None].repeat(1, len(rates), 1)
        self.bias_GC = torch.zeros(len(rates), classes, device=device)
        self.velocity = [torch.zeros_like(p) for p in (self.weight_DGC, self.bias_GC)]
        norm = nn.BatchNorm1d(shape[0], affine=False) if recipe.norm else nn.Identity()
        self.norm = convert_sync_bn(norm, torch.device(device)).to(device)

    @torch.no_grad()
    def step(self, x_BD: Tensor, y_B: Tensor, factor: float) -> Tensor:
        """One update of all classifiers with `factor` times their rates; returns the losses (G,) of the global batch.
        Every rank has equally many rows of it."""
        self.norm.train()
        x, n = self._normalised(x_BD), len(y_B) * dist.world()
        loss, by_logits = loss_and_gradient(self._logits(x), y_B)
        by_logits /= n
        grads = (x.T @ by_logits.flatten(1)).view(self.weight_DGC.shape), by_logits.sum(0)
        for p, grad, velocity in zip((self.weight_DGC, self.bias_GC), grads, self.velocity):
            update_(p, dist.sum_(grad), velocity, factor * self.rates_G1, self.recipe)
        return dist.sum_(loss.sum(0) / n)

    @torch.no_grad()
    def accuracy(self, x_ND: Tensor, y_N: Tensor) -> list[dict]:
        """{"top1", "top5" (more than five classes)} in percent for each rate; each rank counts a shard of
        the rows."""
        self.norm.eval()
        rates, classes = self.bias_GC.shape
        correct = torch.zeros(len(top_ks(classes)), rates, dtype=torch.int64, device=x_ND.device)
        shard = dist.shard(len(y_N))
        for x, y in zip(x_ND[shard].split(ROWS), y_N[shard].split(ROWS)):
            correct += count_correct(self._logits(self._normalised(x)).transpose(0, 1), y)
        counts = dist.sum_(correct.to(dist.device())).T.tolist()
        return [percentages(row, len(y_N)) for row in counts]

    def _normalised(self, x_BD: Tensor) -> Tensor:
        return self.norm(x_BD.view(len(x_BD), self.shape[0], -1)).flatten(1) if self.recipe.norm else x_BD

    def _logits(self, x_BD: Tensor) -> Tensor:
        return (x_BD @ self.weight_DGC.flatten(1)).view(len(x_BD), *self.bias_GC.shape) + self.bias_GC


def update_(p: Tensor, grad: Tensor, velocity: Tensor, rate_G1: Tensor, recipe: Recipe) -> None:
    """One step of p (..., G, C) in place: PyTorch's SGD, or the rule of optim.Lars with one ratio for each rate."""
    d = grad + recipe.weight_decay * p
    if recipe.lars:
        others = [i for i in range(p.ndim) if i != p.ndim - 2]
        w, g = (t.square().sum(others).sqrt()[:, None] for t in (p, grad))
        ratio = torch.where((w > 0) & (g > 0), TRUST * w / (g + recipe.weight_decay * w), 1.0)
        velocity.mul_(MOMENTUM).add_(ratio * rate_G1 * d)
        p.sub_(velocity)
    else:
        velocity.mul_(MOMENTUM).add_(d)
        p.sub_(rate_G1 * (d.add_(velocity, alpha=MOMENTUM) if recipe.nesterov else velocity))
