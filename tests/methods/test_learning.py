"""Every method can reduce its loss."""

import method_cases as cases
import pytest
import torch

from fastssl import backbones, dist
from fastssl.kernels.augment import make_views
from fastssl.trainer import Context

STEPS = 20


@pytest.mark.parametrize("name", cases.CASES)
def test_loss_falls_with_constant_targets(name):
    """20 steps on one batch, without after_step: queues, banks, labels and momentum encoders do not change.
    (In training they do, and the loss may rise although the features improve: docs/results.md.)"""
    dist.init("cpu")
    torch.manual_seed(0)
    case, batch = cases.CASES[name], next(cases.Memory(None, 24).epoch(0))
    config = cases.config(name, norm=True) if case.norm else cases.config(name)
    classes = [str(i) for i in range(cases.CLASSES)]
    method = config.build(backbones.build(case.backbone), Context(cases.SAMPLES, 24, classes)).train()
    views = make_views(batch.pixels, batch.sizes, batch.index, case.views, seed=0, epoch=0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = method.loss(method(views, batch), batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert first - last > 0.02 * max(1, abs(first)), losses
