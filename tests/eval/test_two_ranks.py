"""Every evaluation gives the same on one rank and on both of two ranks; the other test files say what is computed.

All of it in one launch: a rank takes 9 s to import torch and FFCV and compile the decoder, and then less than that.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
import test_cache
import test_detection
import test_features
import test_finetune
import test_linear_published
from conftest import photo, write_beton
from detection_files import voc_fixture  # noqa: F401
from stripes import files_fixture  # noqa: F401
from test_linear_published import folder  # noqa: F401

from fastssl import dist


def worker(out, beton, tiny, shards, linear, train, test, root):
    dist.init("cpu")
    torch.set_num_threads(1)
    result = {
        "features": test_features.compute(beton, tiny),
        "tuning": test_finetune.trained(train, test),
        "heads": json.loads(json.dumps(test_linear_published.compute(linear))),
        "cache": test_cache.on_two_ranks(beton, shards),
        "detection": test_detection.on_two_ranks(root),
    }
    torch.save(result, out if dist.is_main() else f"{out}.1")
    dist.barrier()
    dist.shutdown()


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def tiny(work_folder):
    return write_beton(work_folder / "tiny.beton", [photo(np.random.default_rng(1), 20, 30)])


@pytest.fixture(scope="module")
def both(work_folder, tiny, beton, folder, files, voc):  # noqa: F811
    """The results of both ranks."""
    argv = (beton, tiny, work_folder / "shards", folder, *files, voc)
    first = ranks.launch(__file__, 2, work_folder / "two", *map(str, argv))
    return first, torch.load(work_folder / "two.1", weights_only=False)


def test_features_and_probes_equal_those_of_one_rank(both, beton, tiny):
    two, other = (rank["features"] for rank in both)
    one = test_features.compute(beton, tiny)
    assert set(one) == set(two) == set(other) and len(one) == 13
    for name in one:
        close(name, two[name], one[name])
        close(name, two[name], other[name])
    assert one["tiny"][0].shape == (1, 64) and one["features 10"][0].shape == (103, 64)


def close(name, a, b):
    if isinstance(a, dict):
        assert a == b, name
    else:  # L-BFGS stops where fp32 products no longer descend: its path, not its minimum, depends on their rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3 if name == "lbfgs weights" else 1e-5)


def test_cached_features_equal_those_of_one_rank(both, beton, work_folder, monkeypatch):
    cached, load, same = test_cache.cached, test_cache.load, test_cache.same
    monkeypatch.setattr(test_cache.cache, "SHARD_ROWS", 20)
    two, other = (rank["cache"] for rank in both)
    for batch in (16, 102):
        for x, y in zip(two[batch], cached(work_folder / "one", load(beton, batch))):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert same(two["again"], two[16]) and same(two["repaired"], two[16])
    for name in (16, 102, "again", "repaired"):
        assert same(two[name], other[name])
    for rank in (two, other):
        for name, first in (("none", list(range(0, 103, 20))), ("cached", [0, *range(40, 103, 20), 20])):  # damaged: 1
            seen = rank["shards"][name]
            assert [start for start, _ in seen] == first
            whole = zip(*(parts for _, parts in sorted(seen, key=lambda shard: shard[0])))
            assert same([torch.cat(part) for part in whole], two[16][:-1])
    assert two["error"] == other["error"] and "--no-cache" in two["error"]
    loader = load(beton)  # what two ranks wrote, one reads
    assert same(cached(work_folder / "shards" / "16", loader), two[16]) and not hasattr(loader, "rows")


def test_published_linear_protocols_equal_those_of_one_rank(both, folder):  # noqa: F811
    (two, other), one = (rank["heads"] for rank in both), test_linear_published.compute(folder)
    for name in one:
        test_linear_published.close(one[name], two[name])
        test_linear_published.close(two[name], other[name])


def test_fine_tuning_equals_that_of_one_rank(both, files):
    (one, held), (two, held_two) = test_finetune.trained(*files), both[0]["tuning"]
    assert held == held_two == both[1]["tuning"][1]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_detection_has_equal_weights_and_all_pictures(both):
    weights, found = both[0]["detection"]
    assert torch.equal(weights[0], weights[1])
    assert set(found[:, 0]) == set(range(13)) and (np.diff(found[:, 0]) >= 0).all()
    np.testing.assert_array_equal(found, both[1]["detection"][1])


if __name__ == "__main__":
    ranks.main(worker)
