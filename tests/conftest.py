"""What several test folders share: where tests run, and small .beton files written by stock FFCV."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # takes effect only before anything imports triton


def pytest_collection_modifyitems(config, items):
    """Files that start processes come first: they have few tests and take long, and one worker of `make test` would
    wait for the other in the end.  Without a CUDA device the tests marked gpu are skipped, and asking for them alone is
    an error."""
    items.sort(key=lambda item: not {"ranks", "subprocess"} & vars(item.module).keys())  # keeps the order otherwise
    if torch.cuda.is_available():
        return
    if config.option.markexpr == "gpu":
        raise pytest.UsageError("-m gpu: torch finds no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def linear_of_torch():
    """DeepSpeed's ZeRO 3 replaces torch.nn.functional.linear and leaves it so: tests would depend on those before."""
    torch.nn.functional.linear = LINEAR


def photo(rng, h, w):
    """A smooth colour image, as JPEG likes them; uint8 (h, w, 3)."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.BICUBIC))


def jpeg(image, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def read_image(path):
    """A PIL image that is in memory, its file closed."""
    with Image.open(path) as image:
        image.load()
        return image


def write_beton(path, images, labels=None, fields=("image", "index", "label")):
    """Images are uint8 arrays (stored raw) or JPEG bytes (passed through); labels ints or float32 rows."""
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    labels = [i % 10 for i in range(len(images))] if labels is None else labels
    image_field = RGBImageField(write_mode="raw")
    encode_raw = image_field.encode

    def encode(destination, image, malloc):
        if not isinstance(image, bytes):
            return encode_raw(destination, image, malloc)
        destination["mode"] = 0
        destination["width"], destination["height"] = Image.open(io.BytesIO(image)).size
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)

    image_field.encode = encode
    many = isinstance(labels[0], np.ndarray)
    label_field = NDArrayField(np.dtype("float32"), labels[0].shape) if many else IntField()
    kinds = {"image": image_field, "index": IntField(), "label": label_field}
    rows = [dict(zip(kinds, row)) for row in zip(images, range(len(images)), labels)]
    writer = DatasetWriter(str(path), {name: kinds[name] for name in fields}, num_workers=1)
    writer.from_indexed_dataset([[row[name] for name in fields] for row in rows])
    return path


def write_card(path, images, classes=None, label="int"):
    """The data card of a .beton that holds these uint8 arrays; returns the path of the .beton."""
    from fastssl.files.datacard import DataCard

    heights, widths = zip(*(image.shape[:2] for image in images))
    card = DataCard(
        samples=len(images),
        bytes=path.stat().st_size,
        max_pixels=max(h * w for h, w in zip(heights, widths)),
        min_side=min(*heights, *widths),
        max_height=max(heights),
        max_width=max(widths),
        classes=classes,
        label=label,
    )
    card.write(path.with_suffix(".json"))
    return path


@pytest.fixture(scope="session")
def photos():
    """103 sources of 20 to 60 pixels a side: JPEG bytes (three kinds of subsampling, some gray) and raw arrays."""
    rng = np.random.default_rng(0)
    images = [photo(rng, *rng.integers(20, 60, 2)) for _ in range(103)]
    gray = {7: images[7][:, :, 0], 50: images[50][:, :, 1]}
    return [
        im if i % 4 == 3 and i not in gray else jpeg(gray.get(i, im), subsampling=i % 3) for i, im in enumerate(images)
    ]


@pytest.fixture(scope="session")
def beton(tmp_path_factory, photos):
    """`photos` as a .beton without a card."""
    return write_beton(tmp_path_factory.mktemp("beton") / "photos.beton", photos)
