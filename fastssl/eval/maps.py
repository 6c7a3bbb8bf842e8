"""A map of the features in two dimensions, coloured by class: PCA, t-SNE (https://jmlr.org/papers/v9/vandermaaten08a.html)
or UMAP (https://arxiv.org/abs/1802.03426), as a picture and as coordinates.

A map shows which images have similar features.  In t-SNE and UMAP the sizes of groups and the distances between far
groups have no meaning.  Rows are scaled to length 1 first, as for kNN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist, files
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.options import MAPS
from fastssl.sampler import permutation

NEEDS = ("test",)
DIMS = 50  # principal components that t-SNE and UMAP start from: distances hardly change, and they are faster
NEIGHBOURS = 10  # of trustworthiness
EQUAL = 1e-7  # standard deviation up to which scaled features differ by rounding alone
TRUST_POINTS = 10_000  # most points for trustworthiness, whose N x N matrices then take 800 MB each
OTHERS = "#9a9a9a"  # classes beyond the colours, and images without a class
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f3fbf", "#a3a500", "#e31a5f")


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    methods = tuple(dict.fromkeys(args.method.split(",")))
    for method in methods:
        check_method(method)
    for key, method in (("perplexity", "tsne"), ("near", "umap"), ("min_dist", "umap")):
        if getattr(args, key) is not None and method not in methods:
            raise ValueError(
                f"--{key.replace('_', '-')} {getattr(args, key)} is for {method}: leave it out, or add "
                f"{method} to --method"
            )
    folder = output_folder(args)
    x, y = target.features(target.test)
    rows = sample(len(x), args.points, args.seed)
    options = {"points": len(rows), "of_images": len(x), "dim": x.shape[1], "seed": args.seed}
    results = []
    if dist.is_main():
        x, y = x[torch.from_numpy(rows).to(x.device)].cpu(), y[torch.from_numpy(rows).to(y.device)].cpu()
        labels = y.numpy() if y.ndim == 1 else np.full(len(y), -1)
        names = target.loader(target.test).classes
        for method in methods:
            options_of = {key: getattr(args, key) for key in ("seed", "perplexity", "near", "min_dist")}
            xy, facts = project(x, method, **options_of)
            if len(x) <= TRUST_POINTS:
                facts["trustworthiness"] = trustworthiness(x, xy)
            title = f"{method} of {name_of(target)}, {len(xy):,} images of {Path(target.test).name}"
            if "trustworthiness" in facts:
                title += f"\ntrustworthiness {facts['trustworthiness']:.1f} %"
            write(folder, method, xy, labels, rows, names, title)
            results.append({"method": method, **facts, "picture": str(folder / f"map_{method}.png")})
    return {"protocol": "maps", "options": options, "results": results}


def name_of(target: EvalTarget) -> str:
    """The name of the run or the weight file; for a baseline with its kind."""
    name = (target.run or {}).get("name") or Path(target.args.target or target.spec.name).name
    return name if target.args.features == "weights" else f"{target.args.features} ({name})"


def output_folder(args: argparse.Namespace) -> Path:
    """--folder, or eval/ of the run that is evaluated."""
    if args.folder:
        return Path(args.folder)
    if args.target and (Path(args.target) / "config.json").is_file():
        return Path(args.target) / "eval"
    raise ValueError(f"give --folder FOLDER for the pictures ({args.target or 'the command'} names no run)")


def sample(count: int, points: int, seed: int = 0) -> np.ndarray:
    """`points` of `count` rows (0: all), drawn without repetition, in ascending order; int64."""
    if points < 0:
        raise ValueError(f"points={points}: give a number of images, or 0 for all")
    return np.sort(permutation(count, seed, 0)[: points or count])


def check_method(method: str) -> None:
    if method not in MAPS:
        raise ValueError(f"method={method!r}: known are {', '.join(MAPS)}")
    if method == "umap":
        _umap()


def project(
    features: Tensor,
    method: str,
    *,
    seed: int = 0,
    perplexity: float | None = None,
    near: int | None = None,
    min_dist: float | None = None,
) -> tuple[np.ndarray, dict]:
    """float32 coordinates (N, 2) of features (N, dim), and the settings and figures of the method.
    ValueError for fewer than 5 rows, and where they are NaN or all equal."""
    check_method(method)
    if features.ndim != 2 or len(features) < 5:
        raise ValueError(f"features of shape {tuple(features.shape)}: a map needs (N, dim) with N of 5 or more")
    if not features.isfinite().all():
        raise ValueError("some features are NaN or infinite: the training diverged, or precision is too low")
    x = F.normalize(features.double(), dim=1).cpu().numpy()
    if x.std(0).max() < EQUAL:  # scikit-learn's t-SNE divides by it and crashes (SIGSEGV)
        raise ValueError(f"the features of all {len(x)} images are equal: so are the images, or the network collapsed")
    from sklearn.decomposition import PCA

    dims = min(2 if method == "pca" else DIMS, *x.shape)
    pca = PCA(dims, random_state=seed)
    x = pca.fit_transform(x)
    if method == "pca":
        xy = np.pad(x, ((0, 0), (0, 2 - dims)))  # one-dimensional features lie on a line
        return xy.astype(np.float32), {"variance_%": round(100 * float(pca.explained_variance_ratio_.sum()), 2)}
    if method == "tsne":
        return _tsne(x, seed, perplexity)
    near, min_dist = 15 if near is None else near, 0.1 if min_dist is None else min_dist
    if not 1 < near < len(x):
        raise ValueError(f"near={near}: must be between 2 and {len(x) - 1}, the other points")
    xy = _umap()(n_neighbors=near, min_dist=min_dist, random_state=seed, n_jobs=1).fit_transform(x)
    return np.asarray(xy, np.float32), {"near": near, "min_dist": min_dist}


def _tsne(x: np.ndarray, seed: int, perplexity: float | None) -> tuple[np.ndarray, dict]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3) if perplexity is None else perplexity
    if not 1 <= perplexity < len(x):
        raise ValueError(f"perplexity={perplexity:g}: must be from 1 to below {len(x)}, the number of points")
    tsne = TSNE(perplexity=perplexity, init="pca" if x.shape[1] > 1 else "random", random_state=seed)
    xy = tsne.fit_transform(x.astype(np.float32))
    return xy.astype(np.float32), {"perplexity": perplexity, "kl": round(float(tsne.kl_divergence_), 4)}


def _umap() -> type:
    try:
        from umap import UMAP  # some seconds: it compiles
    except ImportError:
        raise ValueError('method=umap needs umap-learn: pip install "fastssl[umap]", or use tsne or pca') from None
    return UMAP


def trustworthiness(features: Tensor, xy: np.ndarray) -> float:
    """How far the nearest points on the map are also the nearest by their features, in percent; 100: all of them
    (https://lvdmaaten.github.io/publications/papers/TR_Dimensionality_Reduction_Review_2009.pdf)."""
    from sklearn.manifold import trustworthiness as sklearn_trustworthiness

    k = min(NEIGHBOURS, (len(xy) - 1) // 2)
    return 100 * float(sklearn_trustworthiness(F.normalize(features.double(), dim=1).cpu().numpy(), xy, n_neighbors=k))


def palette(labels: np.ndarray, names: list[str] | None) -> list[tuple[str, str, np.ndarray]]:
    """(class name, colour, numbers of its points) of the classes with most points, then of the others in gray."""
    found, counts = np.unique(labels[labels >= 0], return_counts=True)
    shown = np.sort(found[np.argsort(-counts, kind="stable")[: len(COLOURS)]])
    name = lambda c: names[c] if names and c < len(names) else f"class {c}"  # noqa: E731
    out = [(str(name(c)), COLOURS[i], np.flatnonzero(labels == c)) for i, c in enumerate(shown)]
    rest, none = np.flatnonzero((labels >= 0) & ~np.isin(labels, shown)), np.flatnonzero(labels < 0)
    out += [(f"{len(found) - len(shown)} more classes", OTHERS, rest)] * bool(len(rest))
    return out + [("no class", OTHERS, none)] * bool(len(none))


def write(
    folder: Path,
    method: str,
    xy: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    names: list[str] | None = None,
    title: str = "",
) -> None:
    """Write map_METHOD.png, map_METHOD.npy with the coordinates (N, 2) and map_METHOD_samples.npy with the row in the
    file and the class of each point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 6.2), layout="constrained")
    groups = palette(labels, names)
    for name, colour, points in reversed(groups):  # gray below
        axis.scatter(*xy[points].T, s=max(3, 24 - len(xy) / 200), c=colour, label=name, alpha=0.8, linewidths=0)
    handles, texts = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    axis.set_title(title or f"{method}, {len(xy):,} images", fontsize=10, parse_math=False)  # a run's name may have a $
    axis.set(xticks=[], yticks=[])
    axis.set_aspect("equal", adjustable="datalim")
    stem = folder / f"map_{method}"
    for path, save in (
        (f"{stem}.png", lambda f: figure.savefig(f, dpi=130, format="png")),
        (f"{stem}.npy", lambda f: np.save(f, xy)),
        (f"{stem}_samples.npy", lambda f: np.save(f, np.stack([rows, labels], 1))),
    ):
        with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
            save(f)
    pyplot.close(figure)
