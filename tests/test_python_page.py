"""The code of docs/python.md runs; `import fastssl` is quick and exports what it lists."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastssl
from fastssl import config, dist
from fastssl.loader import Loader
from fastssl.sampler import Sampler

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The variables after all code blocks of the page have run in a new folder."""
    dist.shutdown()  # left by earlier tests in this process; the page begins and ends without a process group
    folder = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MPLBACKEND", "Agg")
        names: dict = {}
        exec("\n".join(blocks), names)
    return folder, names


def test_the_page_trains_plots_and_classifies(page):
    folder, names = page
    assert (folder / "runs/digits/loss.png").stat().st_size > 1000
    assert names["steps"] == list(range(1, 34)) and names["loss"][-1] < names["loss"][0]
    assert len(names["knn"]) == 1 and names["knn"][0] > 50
    assert names["x"].shape == (1437, 64) and names["x"].dtype == np.float32
    assert np.array_equal(names["y_test"], names["digits"].target[1437:])
    assert names["classifier"].score(names["scaler"].transform(names["x_test"]), names["y_test"]) > 0.6
    assert not torch.distributed.is_initialized()


def test_features_of_layers_and_baselines(page, monkeypatch):
    folder, _ = page
    monkeypatch.chdir(folder)
    first, last, y = fastssl.features("runs/digits", "test", layers=("layer1", "last"), batch=100)
    assert last.shape == (360, 64) and first.shape[0] == 360 and len(y) == 360
    pixels, _ = fastssl.features(None, "digits_test.beton", features="pixels", size=8, backbone="resnet10")
    assert pixels.shape == (360, 192)
    wrong = [({"bacth": 3}, "unknown option 'bacth'; did you mean 'batch'"), ({"layers": ("x",)}, "no x")]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            fastssl.features("runs/digits", "test", **options)
    with pytest.raises(ValueError, match="no run folder or weight file nothing"):
        fastssl.features("nothing")
    with pytest.raises(ValueError, match="already holds step_.*: continue it with --resume"):
        fastssl.fit(page[1]["run"])


def test_the_package_imports_quickly_and_exports_its_names():
    code = (
        "import sys, fastssl; print(fastssl.__version__); assert not {'torch', 'numpy'} & set(sys.modules);"
        "assert set(fastssl.__all__) <= set(dir(fastssl)); fastssl.fit; fastssl.views.simclr(8); fastssl.Run;"
        "assert 'deepspeed' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == version("fastssl") == fastssl.__version__
    assert fastssl.load is config.load and fastssl.Run is config.Run
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        fastssl.fitt  # noqa: B018
    help_ = "import sys; from fastssl.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", help_], check=True, stdout=subprocess.DEVNULL)


def stored(path):
    """Images (H, W, 3) and labels of a .beton."""
    loader = Loader(path, 4, Sampler.sequential(), device="cpu", workers=1)
    batches = list(loader.epoch(0))
    images = [p[: h * w].view(h, w, 3).numpy().copy() for b in batches for p, (h, w) in zip(b.pixels, b.sizes.tolist())]
    return images, torch.cat([b.label for b in batches]).tolist(), loader.classes


RNG = np.random.default_rng(0)
COLOUR = [RNG.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(6)]


class Pairs(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.fromarray(COLOUR[i]), i % 2


@pytest.mark.parametrize(
    "images, labels, options, expect, classes",
    [
        (COLOUR, None, {}, [-1] * 6, None),
        ([Image.fromarray(c) for c in COLOUR], [2, 0, 1, 1, -1, 0], {}, [2, 0, 1, 1, -1, 0], ["0", "1", "2"]),
        ([torch.from_numpy(c.transpose(2, 0, 1).copy()) for c in COLOUR], list("bababa"), {}, [1, 0] * 3, ["a", "b"]),
        (Pairs(), None, {}, [0, 1] * 3, ["cat", "dog"]),
        (Pairs(), [1] * 6, {"classes": ["x", "y"]}, [1] * 6, ["x", "y"]),
        ([(c, i) for i, c in enumerate(COLOUR)], None, {}, list(range(6)), list("012345")),
        ([np.dstack([c, np.full(c.shape[:2], 255, np.uint8)]) for c in COLOUR], None, {}, [-1] * 6, None),
        (COLOUR, np.eye(6, dtype=int), {}, np.eye(6).tolist(), list("012345")),
    ],
    ids=["arrays", "PIL", "tensors, names", "Dataset", "Dataset, labels", "pairs", "alpha", "several"],
)
def test_images_in_memory_are_stored_unchanged(tmp_path, images, labels, options, expect, classes):
    path = fastssl.convert(images, tmp_path / "x.beton", labels, **options)
    made, found, names = stored(path)
    assert all(np.array_equal(a, b) for a, b in zip(made, COLOUR)) and len(made) == 6
    assert (found, names) == (expect, classes)


def test_convert_takes_gray_arrays_and_options(tmp_path):
    grey = np.stack([c[:5, :, 0] for c in COLOUR])
    made, *_ = stored(fastssl.convert(grey, tmp_path / "g.beton"))
    assert all(np.array_equal(a, np.repeat(b[..., None], 3, 2)) for a, b in zip(made, grey))
    made, *_ = stored(fastssl.convert(COLOUR, tmp_path / "s.beton", short_side=4))
    assert made[0].shape[:2] == (4, 6)
    with pytest.raises(ValueError, match="exists"):
        fastssl.convert(COLOUR, tmp_path / "g.beton")
    fastssl.convert(COLOUR, tmp_path / "g.beton", force=True)


@pytest.mark.parametrize(
    "images, labels, options, message",
    [
        ([], None, {}, "images is empty"),
        (iter(COLOUR), None, {}, "give a list, an array or a Dataset"),
        ("x.jpg", None, {}, "of type str"),
        ([c / 255 for c in COLOUR], None, {}, r"item 0 is float64 \(5, 7, 3\): give a PIL image.*ToTensor"),
        ([*COLOUR, None], None, {}, "item 6 is NoneType"),
        ([COLOUR[0][None]], None, {}, "has shape"),
        (COLOUR, [0, 1], {}, r"labels of shape \(2,\) for 6 images"),
        (COLOUR, [0.5] * 6, {}, "labels of type float64"),
        (COLOUR, [-2] * 6, {}, "from -2"),
        (COLOUR, [[0, 2]] * 6, {}, "must be 0 or 1"),
        (COLOUR, list("aaabbc"), {"classes": ["a", "b"]}, "'c' is not one of the classes a, b"),
        (COLOUR, [3] * 6, {"classes": ["a"]}, "label 3 is too large for 1 classes"),
        ([(COLOUR[0], "a")], None, {}, "item 0: the label 'a' is not a whole number"),
        (COLOUR, None, {"short_sid": 3}, "did you mean 'short_side'"),
    ],
)
def test_errors_name_what_cannot_be_stored(tmp_path, images, labels, options, message):
    with pytest.raises(ValueError, match=message):
        fastssl.convert(images, tmp_path / "x.beton", labels, **options)
    assert not list(tmp_path.iterdir())
