"""NPID, instance discrimination: classify an image as its own row of a memory bank among the rows of others.
https://arxiv.org/abs/1805.01978

The loss is a cross entropy over the positive and the negatives (InfoNCE, as everyone trains it), not the paper's NCE.
Negatives are drawn by (seed, epoch, sample), so any number of ranks draws the same; the bank is updated once per
optimizer step, and in the checkpoint.  It is on every rank (ImageNet: 0.66 GB) and not sharded: a sample reads 65,536
rows of it, 34 MB, which the ranks would have to send each other in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.kernels import gathered_nce, philox, update_bank_
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs

STREAM = 0x4E504944  # of the counter-based generator; views use small numbers


@dataclass(frozen=True)
class Config:
    temperature: float = 0.07
    dims: tuple[int, ...] = (128,)  # of the projector
    negatives: int = 65536  # drawn for each sample; 0: all other rows of the bank
    momentum: float = 0.5  # weight of the new embedding in the bank
    ensure_neg: bool = False  # no negative is the sample itself (shared: nor any other of the global batch)
    shared: bool = False  # one set of negatives a step for all samples: a matrix product instead of a gather
    init: Literal["torch", "openselfsup"] = "torch"  # of the projector; "openselfsup": Kaiming

    def build(self, backbone: nn.Module, context: Context) -> NPID:
        positives = context.batch if self.shared else 1
        if self.ensure_neg and context.samples <= positives:
            raise ValueError(
                f"method.ensure_neg=True: data.train has {context.samples} samples and none is left beside the "
                f"{positives} that may not be negatives; use more data or ensure_neg=False"
            )
        if not 0 < self.momentum <= 1:
            raise ValueError(f"method.momentum={self.momentum} is the weight of the new embedding, in (0, 1]")
        return NPID(self, backbone, context)


class NPID(nn.Module):
    views = 1

    def __init__(self, config: Config, backbone: nn.Module, context: Context):
        super().__init__()
        self.config, self.seed, self.kernels = config, context.seed, context.kernels
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=False)
        if config.init == "openselfsup":
            parts.kaiming_(self.projector)
        self.mean_loss = not (config.shared and config.ensure_neg)  # whose negatives leave out the whole batch
        self.register_buffer("bank", parts.random_directions(context.samples, config.dims[-1]))

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(views[0])
        return {"z": self.projector(h), "features": h.detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.config.negatives:
            logits = F.normalize(out["z"], dim=1) @ self.bank.T / self.config.temperature
            return {"loss": F.cross_entropy(logits, batch.index)}
        negatives = self.draw_shared_negatives(batch) if self.config.shared else self.draw_negatives(batch)
        return {
            "loss": gathered_nce(
                out["z"], self.bank, batch.index, negatives, self.config.temperature, impl=self.kernels
            )
        }

    def draw_negatives(self, batch: Batch) -> Tensor:
        """(n, K) rows of the bank, uniform with replacement, each sample's own."""
        return self.to_rows(self.random_words(batch.index[:, None], batch.epoch, self.seed), batch.index[:, None])

    def draw_shared_negatives(self, batch: Batch) -> Tensor:
        """(K,) rows of the bank, uniform with replacement, the same on every rank."""
        step = batch.index.new_zeros(1, 1) + batch.step
        words = self.random_words(step, batch.epoch, self.seed + (1 << 32))[0]  # another key than that of samples
        return self.to_rows(words, dist.gather(batch.index)) if self.config.ensure_neg else self.to_rows(words, None)

    def random_words(self, counter: Tensor, epoch: int, seed: int) -> Tensor:
        """(n, K) words in [0, 2**32)."""
        place = torch.arange(-(-self.config.negatives // 4), device=counter.device)
        return torch.cat(philox.philox4x32(place, STREAM, counter, epoch, seed), 1)[:, : self.config.negatives]

    def to_rows(self, words: Tensor, positives: Tensor | None) -> Tensor:
        """Words as rows of the bank; with ensure_neg the rows (n, P) or (P,) `positives` are left out, exactly:
        a number below S - P, plus how many left-out rows lie below the row that it stands for."""
        if not self.config.ensure_neg:
            return philox.below(words, len(self.bank))
        skip = positives.sort(-1).values - torch.arange(positives.shape[-1], device=words.device)
        row = philox.below(words, len(self.bank) - positives.shape[-1])
        return row + torch.searchsorted(skip.contiguous(), row.contiguous(), right=True)

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        index, z = dist.gather(batch.index), dist.gather(F.normalize(out["z"], dim=1))
        update_bank_(self.bank, index, z, self.config.momentum, found_inf=found_inf, impl=self.kernels)
