"""NPID (instance discrimination): the cross entropy of finding an image's own embedding in a memory bank of all images.
https://arxiv.org/abs/1805.01978

The loss is InfoNCE, as in OpenSelfSup and other implementations, not the paper's NCE.  Negatives depend only on seed,
epoch and sample, so they are the same on any number of ranks.  The bank is updated once per optimizer step.  Each rank
has all of it (ImageNet: 0.66 GB), because each sample reads 65,536 rows (34 MB), which a sharded bank would have to
send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Count, Fraction, Positive, PositiveInt
from fastssl.kernels import gathered_nce, philox, update_bank_
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs

STREAM = 0x4E504944  # stream of the counter-based generator; the views use small numbers


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.07
    dims: tuple[PositiveInt, ...] = (128,)  # widths of the projector's layers
    negatives: Count = 65536  # drawn for each sample; 0: all other rows of the bank
    momentum: Fraction = 0.5  # weight of the new embedding in the bank
    ensure_neg: bool = False  # never draw the sample itself as a negative (if shared: no sample of the global batch)
    shared: bool = False  # one set of negatives for all samples of a step: a matrix product instead of a gather
    init: Literal["torch", "openselfsup"] = "torch"  # of the projector; "openselfsup": Kaiming

    def build(self, backbone: nn.Module, context: Context) -> NPID:
        positives = context.batch if self.shared else 1
        if self.ensure_neg and context.samples <= positives:
            raise ValueError(
                f"method.ensure_neg=True excludes {positives} samples from the negatives, and data.train has "
                f"{context.samples}, so none is left: use more data or method.ensure_neg=False"
            )
        parts.check_bank_momentum(self.momentum)
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
        # with both, the negatives of a sample depend on the whole batch
        self.mean_loss = not (config.shared and config.ensure_neg)
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
        """(n, K) indices of rows of the bank, uniform with replacement, other ones for each sample."""
        words = self.random_words(batch.index[:, None], batch.epoch, self.seed)
        return self.to_rows(words, batch.index[:, None] if self.config.ensure_neg else None)

    def draw_shared_negatives(self, batch: Batch) -> Tensor:
        """(K,) indices of rows of the bank, uniform with replacement, equal on all ranks."""
        step = batch.index.new_zeros(1, 1) + batch.step
        words = self.random_words(step, batch.epoch, self.seed + (1 << 32))[0]  # not the seed of draw_negatives
        return self.to_rows(words, dist.gather(batch.index)) if self.config.ensure_neg else self.to_rows(words, None)

    def random_words(self, counter: Tensor, epoch: int, seed: int) -> Tensor:
        """(n, K) random integers in [0, 2**32)."""
        block = torch.arange(-(-self.config.negatives // 4), device=counter.device)
        return torch.cat(philox.philox4x32(block, STREAM, counter, epoch, seed), 1)[:, : self.config.negatives]

    def to_rows(self, words: Tensor, positives: Tensor | None) -> Tensor:
        """Random integers to indices of the bank's S rows.  The indices `positives`, (n, P) or (P,), are excluded: a
        number below S - P, plus the number of excluded rows up to the row that it stands for."""
        if positives is None:
            return philox.below(words, len(self.bank))
        skip = positives.sort(-1).values - torch.arange(positives.shape[-1], device=words.device)
        row = philox.below(words, len(self.bank) - positives.shape[-1])
        return row + torch.searchsorted(skip.contiguous(), row.contiguous(), right=True)

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        index, z = dist.gather(batch.index), dist.gather(F.normalize(out["z"], dim=1))
        update_bank_(self.bank, index, z, self.config.momentum, found_inf=found_inf, impl=self.kernels)
