"""Readers of files of unknown origin, fuzzed by atheris, which looks for inputs that reach new code:

    pip install atheris
    python tests/fuzz/coverage_guided.py TARGET [options of libFuzzer, such as -max_total_time=300]

The checks of a case are those of the other fuzz tests.  atheris is no dependency of the tests; what it has found is a
case of test_files.py.
"""

import contextlib
import io
import json
import pickle
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import atheris
import numpy as np
import safetensors.torch
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["fastssl", "zipfile", "tarfile"]):
    from conftest import jpeg, photo
    from mutations import is_refused

    from fastssl import log, weights
    from fastssl.checkpoint import disk
    from fastssl.config import Backbone
    from fastssl.data_prep import check
    from fastssl.data_prep import main as convert
    from fastssl.data_prep.file_sources import open_files
    from fastssl.data_prep.file_sources import zip as zip_source
    from fastssl.data_prep.image import Options, store_many
    from fastssl.data_prep.lists import open_list
    from fastssl.data_prep.plainpickle import read_pickle
    from fastssl.data_prep.sources import open_images
    from fastssl.files import datacard

MAX_BYTES = 16384


def torch_files(folder: Path) -> tuple[str, list[bytes]]:
    state = {"state_dict": {"conv1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(4)}, "epoch": 3}
    seeds = []
    for zipped in (True, False):
        out = io.BytesIO()
        torch.save(state, out, _use_new_zipfile_serialization=zipped)
        seeds.append(out.getvalue())
    return "a.pth", seeds


def safetensors_files(folder: Path) -> tuple[str, list[bytes]]:
    tensors = {"conv1.weight": torch.ones(2, 3), "b": torch.zeros(4)}
    return "a.safetensors", [safetensors.torch.save(tensors, weights.metadata(Backbone("resnet18")))]


def archives(folder: Path) -> tuple[str, list[bytes]]:
    image, seeds = jpeg(photo(np.random.default_rng(0), 12, 16)), []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as z:
            z.writestr("a/1.jpg", image)
        seeds.append(out.getvalue())
    for mode in ("w", "w:gz"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            info = tarfile.TarInfo("a/1.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
        seeds.append(out.getvalue())
    return "a.tar", seeds


def betons(folder: Path) -> tuple[str, list[bytes]]:
    with tempfile.TemporaryDirectory() as made:
        images = Path(made, "in", "a")
        images.mkdir(parents=True)
        for i in range(2):
            (images / f"{i}.jpg").write_bytes(jpeg(photo(np.random.default_rng(i), 12, 16)))
        assert convert(["imagefolder", f"{made}/in", f"{made}/s.beton", "--workers", "1"]) == 0
        (folder / "s.json").write_bytes(Path(made, "s.json").read_bytes())
        return "s.beton", [Path(made, "s.beton").read_bytes()]


def data_cards(folder: Path) -> tuple[str, list[bytes]]:
    betons(folder)
    return "s.json", [(folder / "s.json").read_bytes()]


def cifar_pickles(folder: Path) -> tuple[str, list[bytes]]:
    rows = np.zeros((3, 9), np.uint8)
    batches = [{b"labels": labels, b"data": rows} for labels in ([1, 2, 3], np.array([1, 2, 3]))]
    return "batch", [pickle.dumps(batch, protocol) for protocol in (2, 4) for batch in batches]


def manifests(folder: Path) -> tuple[str, list[bytes]]:
    entry = {"bytes": 10, "sha256": "0" * 64}
    return "manifest.json", [json.dumps({"format": 1, "files": {"state.pt": entry}}).encode()]


def lists(folder: Path) -> tuple[str, list[bytes]]:
    return "l.txt", [
        b"a.jpg 0\nb c.jpg 1\n",
        b'd.jpg,cat\n"e, f.jpg",dog\n',
        b"path,label\ng.jpg,n1\n",
        b"g.jpg\tn1\t3\n",
    ]


def logs(folder: Path) -> tuple[str, list[bytes]]:
    return "log.jsonl", [b'{"step": 1, "epoch": 0, "loss": 1.0}\n{"step": 2, "epoch": 0, "loss": 0.5}\n']


def read_archive(path: Path) -> None:
    zip_source._open.cache_clear()  # the archive of the case before, which has the same name
    store_many([ref for _, ref, _ in open_images("tar", str(path), open_files(path)).items()], Options())


def read_beton(path: Path) -> None:
    """With the readers of `fastssl convert check`, whose code is watched, and of training."""
    from fastssl.decode import BetonReader  # not among the instrumented ones: numba compiles parts of it

    with contextlib.suppress(ValueError):
        inspector = check.BetonInspector(path)
        check._check_labels(inspector)
        if (inspector.images["height"].astype(int) * inspector.images["width"] < 10**6).all():
            [inspector.image(row) for row in range(inspector.samples)]
    reader = BetonReader(path)
    reader.labels(np.arange(reader.samples))
    pixels, sizes = np.zeros((1, 10**6, 3), np.uint8), np.zeros((1, 2), np.int32)
    for row in range(reader.samples if reader.max_pixels < 10**6 else 0):
        reader.decode(np.array([row]), pixels[:, : reader.max_pixels], sizes)


# Name -> where the first cases come from, and the reader.
TARGETS = {
    "torch": (torch_files, weights.read),
    "safetensors": (safetensors_files, lambda path: [weights.spec_of(path), weights.read(path)]),
    "archives": (archives, read_archive),
    "beton": (betons, read_beton),
    "cards": (data_cards, datacard.DataCard.read),
    "pickles": (cifar_pickles, lambda path: read_pickle(path.read_bytes(), "batch")),
    "manifests": (manifests, lambda path: disk.damage(path.parent)),
    "lists": (lists, lambda path: list(open_list(str(path), None, None).items())),
    "logs": (logs, lambda path: list(log.read(path.parent))),
}


def main(target: str, *options: str) -> None:
    import fastssl.decode  # noqa: F401  (not instrumented; it takes longer than a case may)

    make, read = TARGETS[target]
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, corpus = Path(made, "case"), Path(made, "corpus")
        folder.mkdir()
        corpus.mkdir()
        name, seeds = make(folder)
        for i, seed in enumerate(seeds):
            (corpus / str(i)).write_bytes(seed)
        longest = max(MAX_BYTES, *map(len, seeds))

        def one(data: bytes) -> None:
            (folder / name).unlink(missing_ok=True)  # a new file, because the old one may still be mapped
            (folder / name).write_bytes(data)
            is_refused(read, folder / name, folder)

        limits = [f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
