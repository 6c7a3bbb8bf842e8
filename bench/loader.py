"""Measure images per second into host memory, two views per image: python bench/loader.py [--data TAR_OR_FOLDER]

ours            fastssl.loader: one decode; returns the decoded uint8 image, and the views are computed on the device
ffcv            FFCV's loader with a decoder per view: two decodes, two RandomResizedCrop(224) + flip, uint8
torchvision     ImageFolder and DataLoader: one decode (Pillow), two RandomResizedCrop(224) + flip, then ToTensor and
                Normalize, as is usual; with ours and FFCV images are usually normalised on the device
torchvision, SimCLR's views: the same with SimCLR's jitter, grayscale and blur
`ffcv, one decoder` and `torchvision, decode only` show the decoding without the crops, which ours leaves to the device.
All read the same bytes, with one worker per core, in interleaved repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from common import DATA, append, environment, spread
from other_views import torchvision_view
from PIL import Image
from torchvision import datasets, transforms

from fastssl.data_prep import main as convert
from fastssl.data_prep.file_sources import open_files
from fastssl.decode import BetonReader
from fastssl.files.datacard import DataCard
from fastssl.loader import Loader
from fastssl.sampler import Sampler
from fastssl.views import View, simclr

if TYPE_CHECKING:
    from ffcv.pipeline import PipelineSpec

SIZE, PASSES = 224, 3  # pixels of a view; passes over the data in one repetition
WORKERS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "imagenet_sample_1000.tar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--original", action="store_true", help="only the original images, not those of short side 256")
    args = parser.parse_args()
    if not args.data.exists():
        raise SystemExit(f"bench/loader.py: {args.data} does not exist; give --data, or set FASTSSL_DATA")
    env = environment("torchvision", "ffcv", "numba", "pillow")
    with tempfile.TemporaryDirectory() as folder:
        files = unpack(args.data, Path(folder, "files"))
        sizes = {"as they are": [], "short side 256": ["--short-side", "256", "--quality", "90"]}
        for name, options in list(sizes.items())[: 1 if args.original else 2]:
            beton = str(Path(folder, f"{name}.beton"))
            with contextlib.redirect_stdout(io.StringIO()):
                if convert(["imagefolder", str(files), beton, *options]):
                    raise SystemExit("the conversion failed")
            jpegs = write_files(beton, Path(folder, name))
            card = Loader(beton, args.batch, device="cpu").card
            rates = measure(contestants(beton, jpegs, args.batch), args.repeats)
            report(name, card, rates)
            append(
                "loader",
                env,
                images=name,
                batch=args.batch,
                workers=WORKERS,
                view=SIZE,
                samples=card.samples,
                mean_pixels=card.mean_pixels,
                max_pixels=card.max_pixels,
                images_per_s={k: spread(v) for k, v in rates.items()},
            )
    if env["load"] > 1:
        print(f"\nThe machine was busy before this run (load {env['load']}): repeat it when it is idle.")


def image_file(folder: Path, i: int) -> Path:
    """A file in a class folder of its own, as ImageFolder needs them."""
    (folder / f"{i:06d}").mkdir(parents=True)
    return folder / f"{i:06d}" / "image.jpg"


def unpack(source: Path, target: Path) -> Path:
    """Write the JPEG files of a folder, tar or zip."""
    files = open_files(source)
    names = [name for name in files.names if name.lower().endswith((".jpg", ".jpeg"))]
    for i, (_, data) in enumerate(files.contents(names)):
        image_file(target, i).write_bytes(data)
    return target


def write_files(beton: str, target: Path) -> Path:
    """Write the images of a .beton as files, so that torchvision reads the same bytes."""
    opened = BetonReader(beton)
    for i, field in enumerate(opened.image):
        name, data = image_file(target, i), opened.stored(field["data_ptr"])
        if field["mode"]:  # stored as pixels, because FFCV cannot decode the file
            Image.fromarray(data.reshape(field["height"], field["width"], 3)).save(name, quality=95)
        else:
            name.write_bytes(data.tobytes())
    return target


def contestants(beton: str, jpegs: Path, batch: int) -> dict:
    """{name: function that loads the data PASSES times and returns the number of images}."""
    return {
        "ours": ours(beton, batch),
        "ffcv": ffcv(beton, batch, 2),
        "torchvision": torchvision(jpegs, batch, Views(2, View(SIZE, flip=0.5))),
        "torchvision, SimCLR's views": torchvision(jpegs, batch, Views(2, simclr(SIZE)[0])),
        "ffcv, one decoder": ffcv(beton, batch, 1),
        "torchvision, decode only": torchvision(jpegs, batch, Views(0, View(SIZE))),
    }


def ours(beton: str, batch: int) -> Callable[[], int]:
    loader = Loader(beton, batch, Sampler(rank=0, world=1), device="cpu", workers=WORKERS)
    return lambda: sum(len(b.index) for epoch in range(PASSES) for b in loader.epoch(epoch))


def ffcv(beton: str, batch: int, views: int) -> Callable[[], int]:
    from ffcv import Loader
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.reader import Reader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def pipeline() -> PipelineSpec:
        transforms = [RandomHorizontalFlip(), ToTensor()]
        return PipelineSpec("image", RandomResizedCropRGBImageDecoder((SIZE, SIZE)), transforms)

    names = ["image", *(f"view{v}" for v in range(1, views))]
    rows = np.arange(Reader(beton).num_samples, dtype=np.uint64)  # with other types FFCV's thread ends without an error
    loader = Loader(
        beton,
        batch,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        seed=0,
        drop_last=True,
        indices=np.tile(rows, PASSES),  # one long epoch: no gaps between passes
        pipelines={"index": None, "label": None, **{n: pipeline() for n in names}},
    )
    return lambda: sum(len(out[0]) for out in loader)


def torchvision(jpegs: Path, batch: int, views: Views) -> Callable[[], int]:
    data = datasets.ImageFolder(str(jpegs), views)
    order = torch.cat([torch.randperm(len(data)) for _ in range(PASSES)]).tolist()
    loader = torch.utils.data.DataLoader(
        data,
        batch,
        sampler=order,
        num_workers=WORKERS,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    return lambda: sum(len(labels) for _, labels in loader)


class Views:
    """A transform that returns a list of `views` views; 0: the image is only decoded."""

    def __init__(self, views: int, view: View):
        self.views, self.view = views, torchvision_view(transforms, view, transforms.ToTensor())

    def __call__(self, image: Image.Image):
        return [self.view(image) for _ in range(self.views)] or np.asarray(image).shape


def measure(runs: dict, repeats: int) -> dict[str, list[float]]:
    """Images/s of each repetition, after one for warm-up; interleaved, so that changes of the machine affect all
    alike."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            n = run()
            if repeat:
                rates[name].append(n / (time.perf_counter() - start))
    return rates


def report(name: str, card: DataCard, rates: dict) -> None:
    print(f"\n{card.samples} images {name}, {card.mean_pixels:.0f} pixels on average, {WORKERS} workers")
    ours = np.median(rates["ours"])
    for row, values in rates.items():
        print(
            f"  {row:28}{np.median(values):8.0f} images/s ({min(values):.0f} to {max(values):.0f}, n={len(values)})"
            f"   ours is {ours / np.median(values):.2f} times as fast"
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="numba")
    main()
