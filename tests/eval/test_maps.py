"""Maps and sheets of neighbours: PCA against NumPy's SVD, neighbours against brute force."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import photo, read_image, write_beton

import fastssl.eval
from fastssl import pictures, views
from fastssl.eval import maps, neighbours

SIZE = 16
TRAIN_LABELS = np.where(np.arange(40) % 4, np.arange(40) % 3, -1)


def groups(n=90, dim=12, apart=6.0):
    """Three far groups of n / 3 points: features (n, dim) and labels (n,)."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    return torch.from_numpy(rng.normal(size=(n, dim)) + apart * np.eye(dim)[labels]).float(), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    out = []
    for name, n in (("train", 40), ("test", 21)):
        images = [(photo(rng, SIZE, SIZE) // 4 + np.array([[25 * (i % 3), 0, 0]])).astype(np.uint8) for i in range(n)]
        labels = np.arange(n) % 3 if name == "test" else TRAIN_LABELS
        out.append((str(write_beton(folder / f"{name}.beton", images, labels.tolist())), images))
    return out


def call(protocol, files, *argv):
    train = ["--train", files[0][0]] if protocol == "neighbours" else []
    argv = [protocol, *train, "--test", files[1][0], "--features", "pixels", "--size", SIZE, *argv]
    return fastssl.eval.main([*map(str, argv), "--resize", "0", "--device", "cpu", "--workers", "1"])


def test_pca_is_that_of_the_singular_vectors():
    x, _ = groups()
    xy, facts = maps.project(x, "pca")
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    truth = u[:, :2] * s[:2]
    sign = np.sign((truth * xy).sum(0))
    np.testing.assert_allclose(xy, truth * sign, atol=1e-5)
    assert facts["variance_%"] == pytest.approx(100 * (s[:2] ** 2).sum() / (s**2).sum(), abs=0.01)
    assert xy.dtype == np.float32


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_groups_stay_apart_and_the_seed_decides_the_map(method):
    x, labels = groups(60)
    xy, _ = maps.project(x, method, seed=3, near=8)
    again, _ = maps.project(x, method, seed=3, near=8)
    np.testing.assert_array_equal(xy, again)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 1e9 * np.eye(len(xy))
    assert (labels[distance.argmin(1)] == labels).all()
    assert maps.trustworthiness(x, xy) > 80


def test_trustworthiness_of_a_good_and_of_a_random_map():
    x, _ = groups()
    random = np.random.default_rng(1).normal(size=(len(x), 2))
    assert maps.trustworthiness(x[:, :2], torch.nn.functional.normalize(x[:, :2], dim=1).numpy()) == 100
    assert maps.trustworthiness(x, random) < 65


def test_samples_are_drawn_without_repetition():
    rows = maps.sample(100, 10, seed=1)
    assert len(set(rows)) == 10 and (np.diff(rows) > 0).all() and (rows != maps.sample(100, 10, seed=2)).any()
    np.testing.assert_array_equal(maps.sample(7, 0), np.arange(7))
    np.testing.assert_array_equal(maps.sample(7, 50), np.arange(7))


def test_colours_go_to_the_classes_with_most_points():
    labels = np.array([7] * 3 + [2] * 2 + list(range(20, 29)) + [-1])
    found = maps.palette(labels, None)
    assert [name for name, *_ in found[:2]] == ["class 2", "class 7"] and len(found) == 12
    assert [(name, len(points)) for name, _, points in found[10:]] == [("1 more classes", 1), ("no class", 1)]
    assert sum(len(points) for *_, points in found) == len(labels)
    assert [name for name, *_ in maps.palette(np.array([1, 0]), ["cat", "dog"])] == ["cat", "dog"]


def test_maps_command_writes_pictures_and_coordinates(files, tmp_path, capsys, monkeypatch):
    out, titles, write = tmp_path / "out", [], maps.write
    monkeypatch.setattr(maps, "write", lambda *given: (titles.append(given[-1]), write(*given)))
    assert call("maps", files, "--method", "pca,tsne", "--points", 15, "--folder", out, "--out", out / "r.json") == 0
    result = json.loads((out / "r.json").read_text())
    assert [row["method"] for row in result["results"]] == ["pca", "tsne"] and "trust %" in capsys.readouterr().out
    assert result["options"]["points"] == 15 and result["options"]["of_images"] == 21
    for method in ("pca", "tsne"):
        xy, samples = np.load(out / f"map_{method}.npy"), np.load(out / f"map_{method}_samples.npy")
        assert xy.shape == (15, 2) and np.isfinite(xy).all()
        np.testing.assert_array_equal(samples[:, 0], maps.sample(21, 15))
        np.testing.assert_array_equal(samples[:, 1], samples[:, 0] % 3)
        assert min(read_image(out / f"map_{method}.png").size) > 500
    x = torch.tensor(np.stack(files[1][1])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (views.center(SIZE)[0].mean, views.center(SIZE)[0].std))
    x = (x - mean) / std
    expected, _ = maps.project(x.flatten(1)[maps.sample(21, 15)], "pca")
    np.testing.assert_allclose(np.abs(np.load(out / "map_pca.npy")), np.abs(expected), atol=1e-3)
    assert not list(out.glob("*.tmp"))
    trust = [f"trustworthiness {row['trustworthiness']:.1f} %" for row in result["results"]]
    about = "of pixels (resnet50), 15 images of test.beton"
    assert titles == [f"{method} {about}\n{text}" for method, text in zip(("pca", "tsne"), trust)]


def test_missing_umap_is_reported_before_anything_is_computed(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert call("maps", files, "--method", "umap", "--folder", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert 'pip install "fastssl[umap]"' in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["maps", "--method", "tnse"], "method='tnse': known are pca, tsne, umap"),
        (["maps", "--perplexity", "99"], "perplexity=99: must be from 1 to below 21"),
        (["maps", "--perplexity", "0"], "perplexity=0: must be from 1"),
        (["maps", "--method", "pca", "--perplexity", "9"], "--perplexity 9.0 is for tsne"),
        (["maps", "--near", "9"], "--near 9 is for umap: leave it out, or add umap to --method"),
        (["maps", "--points", "-1"], "points=-1"),
        (["maps", "--points", "3"], "N of 5 or more"),
        (["maps", "--method", "umap", "--near", "40"], "near=40: must be between 2 and 20"),
        (["neighbours", "--k", "41"], "k=41: must be between 1 and 40"),
        (["neighbours", "--queries", "0"], "queries=0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(files, tmp_path, capsys, argv, expected):
    assert call(argv[0], files, *argv[1:], "--folder", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and not list(tmp_path.glob("out/*"))


def test_without_a_run_the_folder_must_be_given(files, capsys):
    assert call("maps", files) == 2 and "--folder FOLDER" in capsys.readouterr().err


def test_nan_features_are_refused():
    x, _ = groups()
    x[4, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        maps.project(x, "pca")
    with pytest.raises(ValueError, match=r"training set: 1 of 90 features .* sample 4"):
        neighbours.nearest(x, x[:2], 3)


def test_neighbours_are_those_of_brute_force(files, tmp_path):
    out = tmp_path / "out"
    assert call("neighbours", files, "--k", 4, "--queries", 6, "--folder", out, "--out", out / "r.json") == 0
    result = json.loads((out / "r.json").read_text())
    mean, std = (np.array(v) for v in (views.center(SIZE)[0].mean, views.center(SIZE)[0].std))
    bank, queries = (np.stack([((im / 255 - mean) / std).flatten() for im in images]) for _, images in files)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    near = np.argsort(-(unit[1] @ unit[0].T), axis=1)[:, :4]
    np.testing.assert_array_equal(neighbours.nearest(torch.tensor(bank), torch.tensor(queries), 4).numpy(), near)
    found = TRAIN_LABELS[near]
    truth = 100 * (found == np.arange(21)[:, None] % 3)[found >= 0].mean()
    assert result["results"][0]["precision"] == pytest.approx(truth, abs=1e-4) and 0 < truth < 100
    assert len(result["options"]["shown"]) == 6
    assert [p.name for p in sorted(out.iterdir())] == ["neighbours.png", "r.json"]


def test_images_are_those_of_their_rows(files):
    """Rows in any order, some twice, more than a batch: each tile is its image, enlarged."""
    path, originals = files[0]
    rows = np.array([39, 3, 3, 0, 17] * 20)
    made = pictures.images(path, rows, views.center(SIZE)[0], device="cpu", workers=1)
    assert made.shape == (100, pictures.SIDE, pictures.SIDE, 3)
    factor = pictures.SIDE // SIZE
    for tile, row in zip(made, rows):
        np.testing.assert_allclose(tile[::factor, ::factor].numpy() * 255, originals[row], atol=0.51)
