"""Hooks that observe a run: kNN accuracy, an online linear probe, and measures of collapse.

A run without hooks trains to the same bits: they draw no random numbers, give no gradient to the method and restore
every mode that they change.  What they measure is logged by `t.log`, tensors on every rank.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist, views
from fastssl.config import Run
from fastssl.eval import knn
from fastssl.eval.common import classes, features, softmax
from fastssl.eval.common.metrics import in_top_k
from fastssl.loader import Batch, Loader
from fastssl.log import HostScalar
from fastssl.sampler import Sampler
from fastssl.trainer import Outputs, Trainer

DISABLE = "or set log.knn_epochs=0 log.probe=False"


class Hook:
    """Derive a class from this one and write the methods that it needs; the others do nothing (docs/extending.md).

    `out` has the detached outputs of this rank's shard of the batch, which a CUDA graph overwrites in the next step
    (keep a clone), `batch` its labels.  A hook's state is saved in checkpoints if it has `state_dict` and
    `load_state_dict`.

    `capturable` (False): True if `after_step` may become a part of the step's CUDA graph.  It then reads nothing from
    the device, changes tensors that it made in its first call only in place, and logs 0-dim tensors; a replay executes
    none of its Python, and `batch.epoch` and `batch.step` are 0-dim tensors.
    """

    capturable: bool = False

    def before_epoch(self, t: Trainer) -> None: ...
    def after_step(self, t: Trainer, out: Outputs, batch: Batch) -> None: ...
    def after_epoch(self, t: Trainer) -> None: ...


def from_config(run: Run) -> list[Hook]:
    """The hooks that the settings of `run.log` switch on.  `run.hooks` come in addition."""
    hooks: list[Hook] = []
    cache = FeatureCache()
    if run.log.knn_epochs:
        hooks.append(KnnMonitor(run.log.knn_epochs, cache=cache))
    if run.log.probe:
        hooks.append(LinearProbe(run.log.knn_epochs, cache=cache))
    if run.log.collapse_every:
        hooks.append(Collapse(run.log.collapse_every))
    return hooks


class FeatureCache:
    """Features of a file by the backbone in training, computed once per step for all hooks."""

    def __init__(self) -> None:
        self._loaders: dict[str, Loader] = {}
        self.features: dict[str, tuple[Tensor, Tensor]] = {}
        # (test file, training file) -> (labelled, class numbers), of classes.match
        self._matched: dict[tuple[str, str], tuple[classes.Labelled, np.ndarray | None]] = {}
        self._step = -1

    def loader(self, t: Trainer, path: str) -> Loader:
        """Opens the file at the first call; ValueError for one that has not one class per image."""
        if path not in self._loaders:
            run, speed = t.run, t.run.speed
            batch = dist.world() * min(images_per_pass(run.data.views[0].size), 4 * run.optim.batch // dist.world())
            if path == run.data.train:  # no second copy of a resident set
                loader = t.loader.in_file_order(batch)
            else:
                loader = Loader(
                    path, batch, Sampler.sequential(), device=t.device, workers=speed.workers, resident=speed.resident
                )
            if not loader.classes:
                raise ValueError(
                    f"{path} has no classes: kNN and the probe need labelled data (data.bank, data.test); {DISABLE}"
                )
            if loader.card.label == "multi":
                raise ValueError(f"{path} has several labels per image: kNN and the probe need one class; {DISABLE}")
            self._loaders[path] = loader
        return self._loaders[path]

    def match_classes(self, t: Trainer, train: Loader, test: str, labelled: classes.Labelled) -> None:
        """Number the classes of the file `test` as in `train`; ValueError where their names do not match."""
        if self._matched.get((test, train.path), (None,))[0] not in (labelled, "all"):
            loader = copy.copy(self.loader(t, test))
            try:
                classes.match(train, loader, labelled)
            except ValueError as error:
                raise ValueError(f"{error} (data.bank, data.test); {DISABLE}") from None
            self._matched[test, train.path] = labelled, loader.class_numbers

    def __call__(self, t: Trainer, path: str, train: Loader | None = None) -> tuple[Tensor, Tensor]:
        """Features (N, dim) and labels (N,); in the class numbers of `train`, after `match_classes`."""
        if self._step != t.step:
            self.features, self._step = {}, t.step
        if path not in self.features:
            loader, data = self.loader(t, path), t.run.data
            view = data.eval_view or views.default_view(data.views[0], loader.card)
            with t.plain_backbone() as backbone:
                extractor = features.Extractor(
                    backbone, view, precision=t.run.optim.precision, kernels=t.run.speed.kernels
                )
                self.features[path] = features.extract(extractor, loader)
        x, labels = self.features[path]
        numbers = self._matched[path, train.path][1] if train else None
        if numbers is None:
            return x, labels
        return x, torch.from_numpy(numbers).to(labels.device)[labels]


def images_per_pass(size: int) -> int:
    """Images of size x size pixels for a forward pass without gradients: as many pixels as 128 images of 224 have."""
    return max(128, min(2048, 128 * 224**2 // size**2))


def _due(t: Trainer, every: int) -> bool:
    return bool(every) and ((t.epoch + 1) % every == 0 or t.step == t.total_steps)


class KnnMonitor(Hook):
    """Top-1 accuracy of a weighted kNN classifier every n epochs and at the end: of data.test, with data.bank (default:
    the training file) as neighbours; without data.test, of each image of the bank with the others."""

    def __init__(self, every_epochs: int, k: int = 20, temperature: float = 0.07, cache: FeatureCache | None = None):
        if every_epochs < 1 or k < 1:
            raise ValueError(f"KnnMonitor(every_epochs={every_epochs}, k={k}): both must be 1 or more")
        self.every, self.k, self.temperature = every_epochs, k, temperature
        self.cache = cache or FeatureCache()

    def before_epoch(self, t: Trainer) -> None:
        self.cache.features.clear()  # on the device they take memory from training
        bank = self.cache.loader(t, self._bank(t))  # fails now, not after an epoch
        self.cache.match_classes(t, bank, t.run.data.test or bank.path, "all")

    def after_epoch(self, t: Trainer) -> None:
        if not _due(t, self.every):
            return
        sets = [*self.cache(t, self._bank(t))]
        if t.run.data.test:
            sets += self.cache(t, t.run.data.test, self.cache.loader(t, self._bank(t)))
        k = min(self.k, len(sets[0]) - (not t.run.data.test))  # without a test file an image is not its own neighbour
        result = knn.knn(*sets, k=(k,), temperature=self.temperature)
        t.log({"knn_top1": result["results"][0]["top1"]})

    def _bank(self, t: Trainer) -> str:
        return t.run.data.bank or t.run.data.train


class LinearProbe(Hook):
    """A linear classifier trained online on the features that training computes anyway.

    Logs probe_loss and probe_top1_train (of the augmented view 0, before the update) every step, and probe_top1 on
    data.test every n epochs.  Statistics and gradient are those of the global batch; unlabelled samples (-1) are
    ignored.  Features are standardised by running statistics and divided by sqrt(dim), so that one lr fits any network.
    """

    capturable = True

    def __init__(
        self, every_epochs: int = 0, lr: float = 1.0, momentum: float = 0.9, cache: FeatureCache | None = None
    ):
        self.every, self.lr, self.momentum = every_epochs, lr, momentum
        self.cache = cache or FeatureCache()
        # classifier (classes, dim + 1) with the bias in the last column, its momentum buffer, mean and variance (dim,)
        self.state: dict[str, Tensor] = {}

    def before_epoch(self, t: Trainer) -> None:
        self.cache.features.clear()  # on the device they take memory from training
        names = t.loader.classes
        if not names or t.loader.card.label == "multi":
            raise ValueError(
                f"log.probe=True needs one class per image and {t.run.data.train} has "
                f"{'several' if names else 'none'}; set log.probe=False"
            )
        if not self.state:  # zeros: the problem is convex
            weights = torch.zeros(len(names), t.method.backbone.dim + 1)
            self.state = {"classifier": weights, "buffer": weights.clone()}
        self.state = {name: value.to(t.device) for name, value in self.state.items()}
        if t.run.data.test and self.every:
            self.cache.match_classes(t, t.loader, t.run.data.test, "test")

    @torch.no_grad()
    def after_step(self, t: Trainer, out: Outputs, batch: Batch) -> None:
        x = out["features"].detach().float()
        # a row with an infinity, after an overflow in fp16, would leave the classifier NaN; 0 * inf is NaN
        known = (batch.label >= 0) & ((0 * x).sum(1) == 0)
        if t.loss_scaler.skip_nonfinite:  # the outputs of a skipped step are zeros
            known &= t.loss_scaler.found_inf == 0
        x, label = torch.where(known[:, None], x, 0.0), batch.label.clamp(min=0)
        count, mean, variance = moments(x, known.sum(0, keepdim=True))
        count = count.float()
        self._track(mean, variance, count.clamp(max=0.1))  # a batch without labels changes no statistics
        x = self._prepare(x)
        logits = x @ self.state["classifier"].T
        loss, by_logits = softmax.loss_and_gradient(logits, label)
        logged = torch.stack([(loss * known).sum(), (in_top_k(logits, label, 1) & known).sum()])
        # One all-reduce of all sums; the division by `count` makes them means over the global batch.
        sums = dist.sum_(torch.cat([((by_logits * known[:, None]).T @ x).flatten(), logged]))
        grad, (loss, right) = sums[:-2].view_as(self.state["classifier"]), sums[-2:]
        count = count.clamp(min=1)
        self.state["buffer"].mul_(self.momentum).add_(grad / count)
        self.state["classifier"].sub_(self.state["buffer"], alpha=self.lr)
        t.log({"probe_loss": loss / count, "probe_top1_train": 100 * right / count})

    def after_epoch(self, t: Trainer) -> None:
        if not t.run.data.test or not _due(t, self.every) or "mean" not in self.state:
            return
        x, labels = self.cache(t, t.run.data.test, t.loader)
        right = in_top_k(self._prepare(x) @ self.state["classifier"].T, labels, 1)
        t.log({"probe_top1": 100 * right.float().mean().item()})

    def _track(self, mean: Tensor, variance: Tensor, weight: Tensor) -> None:
        for name, value in {"mean": mean.float(), "variance": variance.float()}.items():
            self.state[name] = self.state[name].lerp_(value, weight) if name in self.state else value

    def _prepare(self, x_ND: Tensor) -> Tensor:
        """Standardised features of length about 1, with a column of ones for the bias."""
        x = (x_ND - self.state["mean"]) / (self.state["variance"] + 1e-5).sqrt() / x_ND.shape[1] ** 0.5
        return F.pad(x, (0, 1), value=1.0)

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in self.state.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():  # in place: a CUDA graph keeps the addresses
            self.state[name] = self.state[name].copy_(value) if name in self.state else value


class Collapse(Hook):
    """Measures of collapse of the features (and embeddings "z" or "q") of the global batch, every n steps.

    std: of the L2-normalised rows, per dimension, times sqrt(dim): 1 where rows are spread evenly over the sphere, 0
    where all are equal (https://arxiv.org/abs/2011.10566).  rank: exp of the entropy of the singular values, 1 to
    min(rows, dim) (RankMe, https://arxiv.org/abs/2210.02885), of the first ROWS / ranks rows of each rank.
    """

    ROWS = 512  # with more, the measure takes longer than the step on small images; the rank cannot exceed it

    def __init__(self, every_steps: int = 50):
        if every_steps < 1:
            raise ValueError(f"Collapse(every_steps={every_steps}) must be 1 or more")
        self.every = every_steps

    @torch.no_grad()
    def after_step(self, t: Trainer, out: Outputs, batch: Batch) -> None:
        if t.step % self.every:
            return
        measured = {"feature": out["features"]}
        for name in ("z", "q"):
            if name in out:
                measured.setdefault("embedding", out[name] if out[name].ndim == 2 else out[name][:, 0])  # view 0
        for name, x_ND in measured.items():
            # eigenvalues are computed on the host: on the device PyTorch would wait for them
            t.log(
                {f"{name}_std": normalized_std(x_ND), f"{name}_rank": HostScalar(gram(x_ND, self.ROWS), effective_rank)}
            )


def moments(x_ND: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and variance (over n - 1) per dimension of the rows of all ranks, in float64.  `rows`, of shape
    (1,): the number of rows that count, where the others are zeros."""
    x = x_ND.double()
    rows = x.new_full((1,), len(x)) if rows is None else rows
    sums = dist.sum_(torch.cat([rows, x.sum(0), x.square().sum(0)]))
    n = sums[0]
    mean, square = sums[1:].view(2, -1) / n.clamp(min=1)
    return n, mean, ((square - mean.square()) * n / (n - 1).clamp(min=1)).clamp(min=0)


def normalized_std(x_ND: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of the normalised rows of all ranks, times sqrt(D)."""
    return moments(F.normalize(x_ND.double(), dim=1))[2].sqrt().mean() * x_ND.shape[1] ** 0.5


def gram(x_ND: Tensor, rows: int) -> Tensor:
    """The smaller of X X^T and X^T X of at most `rows` rows, the same number from each rank.  In float64, since the
    square roots of its eigenvalues have half the digits."""
    x = dist.gather(x_ND[: max(1, rows // dist.world())].contiguous()).double()
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


def effective_rank(gram: Tensor) -> Tensor:
    """exp(entropy of the singular values) of the rows of which `gram`, on the CPU, is the Gram matrix."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other without sleeping: seconds where cores have other work
    try:
        s = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0)).clamp(min=0).sqrt()  # eigvalsh raises for NaN
    finally:
        torch.set_num_threads(threads)
    p = s / s.sum().clamp(min=torch.finfo(s.dtype).tiny)
    return torch.special.entr(p).sum().exp() + 0 * gram.sum()  # NaN stays NaN
