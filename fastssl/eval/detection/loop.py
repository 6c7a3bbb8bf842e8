"""Training a detector and detecting objects, on any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from fastssl import dist, norm
from fastssl import optim as optims
from fastssl.amp import autocast
from fastssl.config import Optim, Precision
from fastssl.eval.common.finetuning import Diverged
from fastssl.eval.detection.data import Picture
from fastssl.sampler import permutation

LOSS_INTERVAL = 20  # steps between two looks at the loss, each of which waits for the device
AHEAD = 2  # batches that are decoded in advance


def fit(
    model: FasterRCNN,
    pictures: list[Picture],
    optim: Optim,
    *,
    device: torch.device,
    pool: ThreadPoolExecutor,
    seed: int,
) -> None:
    """Train `model` in place for optim.epochs steps (milestones and warm-up are in steps, too).  `pool` decodes.
    Diverged when the loss is not finite."""
    model = norm.convert_sync_bn(model.to(device), device).train()
    optimizer, rates = optims.build(model.named_parameters(), optim, steps_per_epoch=1)
    parallel = nn.parallel.DistributedDataParallel(model) if dist.world() > 1 else model
    scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
    torch.manual_seed(seed + 1 + dist.rank())  # the short side of each image, the sampled proposals
    total = torch.zeros((), dtype=torch.float64, device=device)
    for step, (images, targets) in enumerate(batches(pictures, optim.batch, optim.epochs, pool, seed)):
        rates.set_lr(optimizer, step)
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with autocast(device, optim.precision):
            loss = sum(parallel(images, targets).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        total += loss.detach()
        if (step + 1) % LOSS_INTERVAL == 0 or step + 1 == optim.epochs:
            mean = dist.mean(total).item() / (step % LOSS_INTERVAL + 1)
            total.zero_()
            if not np.isfinite(mean):
                raise Diverged(f"the loss is {mean} at step {step + 1}: lower --lr {optim.lr:g}")
            dist.print_main(f"step {step + 1}/{optim.epochs}: loss {mean:.4f}")


def batches(
    pictures: list[Picture], batch: int, steps: int, pool: ThreadPoolExecutor, seed: int
) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """This rank's shard of `steps` batches: permutation after permutation, half of the images mirrored."""
    batch_local = batch // dist.world()
    order: dict[int, np.ndarray] = {}

    def sample(position: int) -> tuple[Tensor, dict]:
        epoch, i = divmod(position, len(pictures))
        picture = pictures[order[epoch][i]]
        image, flip = picture.read(), np.random.Generator(np.random.Philox(key=[seed, position])).random() < 0.5
        return (image.flip(2) if flip else image), picture.target(flip, image.shape[2])

    waiting: deque = deque()
    for step in range(steps + AHEAD):
        if step < steps:
            first = step * batch + dist.rank() * batch_local
            positions = range(first, first + batch_local)
            for epoch in {position // len(pictures) for position in positions} - order.keys():
                order[epoch] = permutation(len(pictures), seed, epoch)
            waiting.append([pool.submit(sample, position) for position in positions])
        if step >= AHEAD:
            images, targets = zip(*(future.result() for future in waiting.popleft()))
            yield list(images), list(targets)


@torch.no_grad()
def detect(
    model: FasterRCNN,
    pictures: list[Picture],
    *,
    device: torch.device,
    pool: ThreadPoolExecutor,
    batch: int,
    precision: Precision,
) -> np.ndarray:
    """float64 (n, 7) rows of picture, label, score, x0, y0, x1, y1 of all ranks, in the order of the pictures."""
    model.eval()
    rows = [torch.zeros(0, 7, dtype=torch.float64, device=device)]
    shard = range(dist.rank(), len(pictures), dist.world())
    for start in range(0, len(shard), batch):
        part = shard[start : start + batch]
        images = [image.to(device) for image in pool.map(lambda i: pictures[i].read(), part)]
        with autocast(device, precision):
            found = model(images)
        for i, out in zip(part, found):
            columns = (torch.full_like(out["scores"], i), out["labels"], out["scores"], out["boxes"])
            rows.append(torch.column_stack([column.double() for column in columns]))
    rows = dist.gather_ragged(torch.cat(rows)).cpu().numpy()
    return rows[np.argsort(rows[:, 0], kind="stable")]
