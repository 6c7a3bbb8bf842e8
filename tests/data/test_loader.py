"""The loader: pixels, order on any number of ranks, memory and threads, resident images."""

import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import jpeg, photo, write_beton
from loader_tools import equal, image, images, open_loader
from PIL import Image

import fastssl.loader
from fastssl.decode import BetonReader
from fastssl.loader import AHEAD
from fastssl.sampler import permutation


@pytest.fixture
def decoded(monkeypatch):
    """The rows that were decoded, in any order."""
    rows, decode = [], BetonReader.decode

    def record(self, r, pixels, sizes):
        rows.extend(r.tolist())
        decode(self, r, pixels, sizes)

    monkeypatch.setattr(BetonReader, "decode", record)
    return rows


# Pixels


def test_pixels_are_those_of_the_files(beton, photos):
    got = images(open_loader(beton, shuffle=False, drop_last=False).epoch(0))
    assert sorted(got) == list(range(103))
    for i, source in enumerate(photos):
        if isinstance(source, np.ndarray):
            assert np.array_equal(got[i], source), f"raw image {i}"
        else:
            pillow = np.asarray(Image.open(io.BytesIO(source)).convert("RGB")).astype(int)
            off = np.abs(got[i].numpy().astype(int) - pillow)
            # FFCV's fast DCT differs from Pillow's accurate one by at most 5 levels, 1.08 on average
            assert got[i].shape == pillow.shape and off.max() <= 6 and off.mean() < 1.2, f"JPEG {i}: {off.max()}"


def test_the_operation_in_ffcvs_own_loader_equals_ffcvs_decoder(tmp_path):
    import ffcv
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.pipeline import PipelineSpec

    from fastssl.decode import DecodeOnce

    rng = np.random.default_rng(1)
    path = write_beton(tmp_path / "same.beton", [jpeg(photo(rng, 40, 56)) for _ in range(12)])
    threads = torch.get_num_threads()
    pipelines = {
        "image": [SimpleRGBImageDecoder()],
        "once": PipelineSpec("image", DecodeOnce(), []),
        "index": None,
        "label": None,
    }
    ((stock, (pixels, sizes)),) = ffcv.Loader(str(path), 12, num_workers=1, pipelines=pipelines)
    torch.set_num_threads(threads)
    assert (sizes == [40, 56]).all() and np.array_equal(stock.reshape(12, -1, 3), pixels)
    (ours,) = open_loader(path, 12, shuffle=False).epoch(0)
    assert np.array_equal(ours.pixels, pixels)


def test_pixels_have_the_size_of_the_largest_image(beton):
    metadata = BetonReader(beton).image
    batch = next(open_loader(beton).epoch(0))
    assert batch.pixels.shape == (16, int((metadata["height"].astype(int) * metadata["width"]).max()), 3)
    assert batch.pixels.dtype == torch.uint8 and batch.sizes.dtype == torch.int32
    assert batch.index.dtype == batch.label.dtype == torch.int64


def test_labels(beton, tmp_path):
    for b in open_loader(beton).epoch(0):
        assert torch.equal(b.label, b.index % 10)
    several = [np.array([1, 0, -1], np.float32) * (i % 2) + i for i in range(8)]
    path = write_beton(tmp_path / "multi.beton", [photo(np.random.default_rng(0), 8, 8)] * 8, several)
    batch = next(open_loader(path, 8).epoch(0))
    assert batch.label.dtype == torch.float32
    assert torch.equal(batch.label, torch.from_numpy(np.stack(several))[batch.index])


# Order


def test_permutation_is_the_same_in_all_versions():
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 3, 7).tolist() == [5, 0, 6, 9, 8, 7, 4, 2, 3, 1]
    for n in (1, 2, 1000):
        assert sorted(permutation(n, 1, 2)) == list(range(n))
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    first = np.array([permutation(20, 0, e)[0] for e in range(4000)])
    assert np.bincount(first, minlength=20).min() > 130  # 200 expected, 13.8 the standard deviation
    for seed, epoch in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"seed={seed}, epoch={epoch}: both must be 0 or more"):
            permutation(10, seed, epoch)


@pytest.mark.parametrize("world, micro", [(2, 1), (1, 4), (2, 2), (4, 4)])
def test_any_ranks_and_micro_batches_make_the_same_global_batches(beton, world, micro):
    whole = list(open_loader(beton, seed=5).epoch(3))
    assert [b.step for b in whole] == list(range(103 // 16)) and {b.epoch for b in whole} == {3}
    ranks = [list(open_loader(beton, seed=5, rank=r, world=world, micro_per_step=micro).epoch(3)) for r in range(world)]
    for step, one in enumerate(whole):
        parts = [b for r in ranks for b in r if b.step == step]
        assert [len(p.index) for p in parts] == [16 // world // micro] * (world * micro)
        assert torch.equal(torch.cat([p.index for p in parts]), one.index)
        assert torch.equal(torch.cat([p.label for p in parts]), one.label)
        theirs, ours = images(parts), images([one])
        assert all(torch.equal(theirs[i], ours[i]) for i in ours)


def test_epochs_and_seeds_differ_and_repeat(beton):
    loader = open_loader(beton)
    first, second = ([b.index.tolist() for b in loader.epoch(e)] for e in (0, 1))
    assert first != second and first == [b.index.tolist() for b in loader.epoch(0)]
    assert first != [b.index.tolist() for b in open_loader(beton, seed=1).epoch(0)]
    assert list(chain(*first)) == permutation(103, 0, 0)[:96].tolist()  # the incomplete batch is dropped


@pytest.mark.parametrize("resident", [False, True])
def test_a_given_order_is_followed_on_any_number_of_ranks(beton, resident):
    order = np.random.default_rng(0).integers(0, 103, 103)
    whole = list(open_loader(beton).epoch(5, 2, order))
    assert torch.cat([b.index for b in whole]).tolist() == order[32:96].tolist()
    assert [(b.step, b.position) for b in whole] == [(2, 32), (3, 48), (4, 64), (5, 80)]
    ranks = [
        open_loader(beton, rank=r, world=2, micro_per_step=2, resident=resident).epoch(5, 2, order) for r in range(2)
    ]
    for parts in zip(whole, *[zip(r, r) for r in ranks]):
        assert parts[0].index.tolist() == [i for rank in parts[1:] for b in rank for i in b.index.tolist()]
        assert [b.position - parts[0].position for rank in parts[1:] for b in rank] == [0, 4, 8, 12]
        assert torch.equal(image(parts[0], 13), image(parts[2][1], 1))
    assert next(iter(open_loader(beton).epoch(0))).position is None
    for wrong in (order[:50], order + 1, order - 103):
        with pytest.raises(ValueError, match="expected 103 rows in 0 to 102"):
            open_loader(beton).epoch(0, 0, wrong)


def test_resume_gives_the_rest_and_decodes_nothing_before_it(beton, decoded):
    loader = open_loader(beton, micro_per_step=2)
    all_of_it = [b.index.tolist() for b in loader.epoch(2)]
    decoded.clear()
    rest = list(loader.epoch(2, start=4))
    assert [b.index.tolist() for b in rest] == all_of_it[8:] and [b.step for b in rest] == [4, 4, 5, 5]
    assert sorted(decoded) == sorted(chain(*all_of_it[8:]))
    assert list(loader.epoch(2, start=6)) == []


@pytest.mark.parametrize("world, batch", [(1, 16), (2, 16), (4, 100), (8, 8), (1, 500)])
def test_evaluation_sees_every_sample_once(beton, world, batch):
    ranks = [open_loader(beton, batch, rank=r, world=world, shuffle=False, drop_last=False) for r in range(world)]
    assert {r.steps for r in ranks} == {-(-103 // batch)}
    per_rank = [list(r.epoch(0)) for r in ranks]
    assert all(len(b.index) for bs in per_rank for b in bs)
    ordered = sorted((b.step, r, b.index.tolist()) for r, bs in enumerate(per_rank) for b in bs)
    assert list(chain(*(index for _, _, index in ordered))) == list(range(103))
    if (world, batch) == (4, 100):
        assert min(len(bs) for bs in per_rank) == 1  # three samples are left for four ranks


# Memory and threads


def test_batches_that_are_kept_do_not_change(beton):
    loader = open_loader(beton, 8)
    kept, again = list(loader.epoch(0)), loader.epoch(0)
    assert len(kept) == 12 and all(equal(one, two) for one, two in zip(kept, again))


def test_buffers_are_used_again(beton):
    loader = open_loader(beton, 4)
    places = {b.pixels.data_ptr() for e in range(3) for b in loader.epoch(e)}
    assert len(places) <= AHEAD + 3  # of 75 batches


def test_stopping_within_an_epoch_stops_the_decoding(beton, decoded):
    loader = open_loader(beton, 4)
    for _ in loader.epoch(0):
        break
    loader._prefetcher.submit(lambda: None).result(10)  # waits for the micro-batches that were started
    assert len(decoded) <= 4 * (AHEAD + 2)
    assert len(list(loader.epoch(0))) == 25


def test_two_epochs_at_a_time(beton):
    train, test = open_loader(beton), open_loader(beton, shuffle=False, drop_last=False)
    expected = [b.index.tolist() for b in train.epoch(0)]
    got = []
    for b in train.epoch(0):
        got.append(b.index.tolist())
        assert sum(len(t.index) for t in test.epoch(0)) == 103
    assert got == expected


def test_waiting_is_measured(beton, monkeypatch):
    decode = BetonReader.decode

    def slow(self, *args):
        time.sleep(0.2)
        decode(self, *args)

    loader = open_loader(beton, 4)
    list(loader.epoch(0))
    monkeypatch.setattr(BetonReader, "decode", slow)
    epoch = loader.epoch(0)
    next(epoch)
    assert loader.wait_ms >= 200
    time.sleep(0.2 * (AHEAD + 1) + 1)
    next(epoch)
    assert loader.wait_ms < 100


def test_importing_is_fast_and_does_not_change_torchs_threads():
    code = """if 1:
        import sys, torch, fastssl.loader
        assert "ffcv" not in sys.modules and "numba" not in sys.modules
        torch.set_num_threads(3)
        import fastssl.decode
        assert torch.get_num_threads() == 3, torch.get_num_threads()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Resident


def test_resident_images_give_the_same_batches_and_are_decoded_once(beton, decoded):
    streamed = list(open_loader(beton, micro_per_step=2).epoch(1))
    decoded.clear()
    loader = open_loader(beton, micro_per_step=2, resident=True)
    assert sorted(decoded) == list(range(103))
    for _ in range(2):
        held = list(loader.epoch(1))
        assert len(held) == len(streamed) == 12 and all(equal(a, b) for a, b in zip(held, streamed))
        assert all(torch.equal(a.label, b.label) for a, b in zip(held, streamed))
    assert len(decoded) == 103


@pytest.mark.parametrize("resident", [False, True])
def test_in_file_order_every_sample_comes_once_from_the_same_source(beton, decoded, resident):
    plain = list(open_loader(beton, 4, shuffle=False, drop_last=False).epoch(2))
    loaders = [
        open_loader(beton, rank=r, world=2, micro_per_step=4, resident=resident) for r in range(2)
    ]  # 2 images each
    decoded.clear()
    ranks = [list(loader.in_file_order().epoch(2)) for loader in loaders]
    assert torch.cat([b.index for b in plain]).tolist() == list(range(103))
    assert [len(ranks[0]), len(ranks[1])] == [26, 26]
    for want, *parts in zip(plain, *ranks):
        joined = {k: torch.cat([getattr(p, k) for p in parts]) for k in ("pixels", "sizes", "index")}
        assert equal(want, replace(want, **joined))
    assert len(decoded) == (0 if resident else 103)
    assert loaders[0].steps == 6 and len(next(loaders[0].epoch(0)).index) == 2  # the original loader is unchanged


@pytest.mark.parametrize("resident, passes", [(False, 26), (True, 3)])
def test_in_file_order_in_batches_of_another_size(beton, resident, passes):
    """Of resident images, a batch can have any size; if images are decoded, one micro-batch at most."""
    loader = open_loader(beton, batch=4, resident=resident).in_file_order(40)
    batches = list(loader.epoch(0))
    assert len(batches) == passes
    assert torch.cat([b.index for b in batches]).tolist() == list(range(103))


def test_jpeg_with_stray_bytes_is_read(tmp_path):
    good = jpeg(photo(np.random.default_rng(0), 30, 40))
    path = write_beton(tmp_path / "stray.beton", [good[:-2] + b"stray bytes" + good[-2:], good])
    (batch,) = open_loader(path, 2, shuffle=False).epoch(0)
    off = (image(batch, 0).int() - image(batch, 1).int()).abs()
    assert off.max() <= 6


@pytest.mark.gpu
def test_on_cuda_the_batches_are_those_of_the_cpu(beton):
    """The caller's stream is kept busy, so that the test fails if a wait is missing or memory is reused too early."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = list(open_loader(beton, 8, micro_per_step=2).epoch(0))
    for resident in (False, True):
        loader, got = open_loader(beton, 8, micro_per_step=2, device="cuda", resident=resident), []
        for b in loader.epoch(0):
            torch.cuda._sleep(20_000_000)
            got.append([t.clone() for t in (b.pixels, b.sizes, b.index, b.label)])
        for (pixels, sizes, index, label), e in zip(got, expected, strict=True):
            b = type(e)(pixels.cpu(), sizes.cpu(), index.cpu(), label.cpu(), e.epoch, e.step)
            assert equal(b, e) and torch.equal(b.label, e.label)


def test_decoding_threads_divide_the_cores_of_the_node_unless_slurm_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert fastssl.loader.cores() == 2  # of a launcher that binds no rank
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "8"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert fastssl.loader.cores() == 8  # srun has bound this rank to its own eight
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert fastssl.loader.cores() == 4  # srun binds no rank: the eight are the node's
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # `srun torchrun`: one task a node
    assert fastssl.loader.cores() == 2
