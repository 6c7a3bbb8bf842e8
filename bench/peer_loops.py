"""The training loops that bench/peers.py compares: our engine, and plain PyTorch with parts of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from other_views import kornia_views, torchvision_view
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastssl.amp import autocast
from fastssl.config import Run
from fastssl.loader import Loader
from fastssl.meters import Meter


class Ours:
    """Our engine.  `load` yields batches, `make` computes their views, `train` makes a step of a batch."""

    def __init__(self, name: str, run: Run, loader: Loader | None = None):
        from fastssl import engine, step  # after DS_ACCELERATOR is set: DeepSpeed reads it when it is imported

        self.name, self.step, self.t = name, step, engine.build(run, loader=loader)

    def load(self) -> Generator:
        epoch = 0
        while True:
            yield from self.t.loader.epoch(epoch)
            epoch += 1

    def make(self, raw: Any) -> list[Tensor]:
        return self.step.batch_views(self.t, raw)

    def train(self, raw: Any, meter: Meter, views: list[Tensor] | None = None) -> Tensor:
        t, make = self.t, self.step.batch_views
        t.meter = meter
        if views is not None:
            self.step.batch_views = lambda *_: views
        try:
            self.step.step(t, [raw])
        finally:
            self.step.batch_views = make
        return t.scalars["loss"]


@dataclass
class Peer:
    """A plain PyTorch loop with a library's DataLoader, views and loss."""

    name: str
    run: Run
    device: torch.device
    loader: Callable[[], DataLoader]  # returns a new DataLoader
    loss: Callable
    pick: Callable = list  # selects the tensors of its batches
    augment: Callable = list  # computes their views on the device, if the DataLoader does not

    def __post_init__(self) -> None:
        o = self.run.optim
        self.net = plain_network(self.run).to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=o.precision == "fp16")

    def load(self) -> Generator:
        while True:
            yield from self.loader()

    def make(self, raw: Any) -> list[Tensor]:
        moved = [x.to(self.device, non_blocking=True) for x in self.pick(raw)]
        return [x.contiguous(memory_format=torch.channels_last) for x in self.augment(moved)]

    def train(self, raw: Any, meter: Meter, views: list[Tensor] | None = None) -> Tensor:
        with meter.phase("views"):
            views = self.make(raw) if views is None else views
        with meter.phase("forward"), autocast(self.device, self.run.optim.precision):
            z = self.net(torch.cat(views)).float()
        with meter.phase("forward"):
            loss = self.loss(*z.chunk(2))
        with meter.phase("backward"):
            self.scaler.scale(loss).backward()
        with meter.phase("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def loader_factory(data: Dataset, run: Run, workers: int, device: torch.device) -> Callable[[], DataLoader]:
    """A function that returns a new DataLoader: its processes end with a block, so that they use no core afterwards."""
    return lambda: DataLoader(
        data, run.optim.batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda"
    )


def plain_network(run: Run) -> nn.Module:
    """torchvision's ResNet with a CIFAR stem and SimCLR's projector, of torch's own modules."""
    net = getattr(torchvision.models, run.backbone.name)()
    dim, (hidden, out) = net.fc.in_features, run.method.dims
    if run.backbone.stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return nn.Sequential(net, nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)))


def ntxent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """SimCLR's loss as PyTorch implementations compute it."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(torch.cat([a, b]), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))

    return loss


class Images(Dataset):
    """uint8 (N, H, W, 3); `transform` of PIL images, or None for uint8 (3, H, W) tensors."""

    def __init__(self, images: Tensor, transform: Callable | None):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        if self.transform is None:
            return self.images[i].permute(2, 0, 1)
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i].numpy()))


def decoded(loader: Loader) -> Tensor:
    """All images of a loader's file, uint8 (N, H, W, 3)."""
    parts, sizes = [], set()
    for batch in loader.in_file_order().epoch(0):
        sizes |= {tuple(s) for s in batch.sizes.tolist()}
        parts.append(batch.pixels.cpu().clone())
    if len(sizes) > 1:
        raise ValueError(f"{loader.path} has images of several sizes; bench/peers.py needs one, as in CIFAR-10")
    return torch.cat(parts).unflatten(1, sizes.pop())


def torchvision_peer(run: Run, device: torch.device, images: Tensor, workers: int) -> Peer:
    one = torchvision_view(transforms, run.data.views[0], transforms.ToTensor())
    data = Images(images, lambda image: (one(image), one(image)))
    loader = loader_factory(data, run, workers, device)
    return Peer("torchvision", run, device, loader, ntxent(run.method.temperature))


def kornia_peer(run: Run, device: torch.device, images: Tensor, workers: int) -> Peer:
    made = torch.no_grad()(kornia_views(run.data.views, device))
    loader, loss = loader_factory(Images(images, None), run, workers, device), ntxent(run.method.temperature)
    return Peer("kornia", run, device, loader, loss, lambda raw: [raw], lambda raw: made(raw[0]))


def lightly_peer(run: Run, device: torch.device, images: Tensor, workers: int) -> Peer:
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.transforms.simclr_transform import SimCLRTransform

    v = run.data.views[0]
    bright, contrast, saturation, hue = v.jitter
    transform = SimCLRTransform(
        input_size=v.size,
        cj_prob=v.jitter_p,
        cj_bright=bright,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=v.scale[0],
        random_gray_scale=v.gray,
        gaussian_blur=v.blur,
        sigmas=v.blur_sigma,
        hf_prob=v.flip,
        normalize={"mean": list(v.mean), "std": list(v.std)},
    )
    data = LightlyDataset.from_torch_dataset(Labelled(images), transform=transform)
    loader = loader_factory(data, run, workers, device)
    return Peer("lightly", run, device, loader, NTXentLoss(run.method.temperature), pick=lambda raw: raw[0])


class Labelled(Images):
    """Images with label 0; LightlyDataset sets the transform."""

    def __init__(self, images: Tensor):
        super().__init__(images, lambda image: image)

    def __getitem__(self, i: int):
        return super().__getitem__(i), 0
