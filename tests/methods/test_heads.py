"""Layers and initial weights of the methods' heads as in the authors' code, and which features a method gives."""

from dataclasses import replace

import method_cases as cases
import pytest
import torch
from loss_tools import D, N, batch, build, rows, unit
from torch import nn

from fastssl import clustering

# (case, settings): {head: widths, "-" for a layer without bias or without scale and shift}
HEADS = {
    ("simclr", ""): {"projector": "24- bn relu 12- bn"},
    ("moco", ""): {"projector": "24 relu 12"},
    ("moco", "norm"): {"projector": "24- bn relu 12- bn"},
    ("byol", ""): {"projector": "24 bn relu 12", "predictor": "24 bn relu 12"},
    ("simsiam", ""): {"projector": "24- bn relu 24- bn relu 12- bn-", "predictor": "8- bn relu 12"},
    ("mocov3", ""): {"projector": "24- bn relu 12- bn-", "predictor": "24- bn relu 12-"},
    ("mocov3", "predictor_norm"): {"projector": "24- bn relu 12- bn-", "predictor": "24- bn relu 12- bn-"},
    ("barlow", ""): {"projector": "24- bn relu 24- bn relu 12-"},
    ("vicreg", ""): {"projector": "24 bn relu 24 bn relu 12-"},
    ("nnclr", ""): {"projector": "24 bn relu 24 bn relu 12 bn", "predictor": "24 bn relu 12"},
    ("dino", ""): {"head.mlp": "24 gelu 12"},
    ("dino", "norm"): {"head.mlp": "24 bn gelu 12"},
    ("swav", ""): {"projector": "24 bn relu 12"},
    ("densecl", ""): {"projector": "24 relu 12", "dense_projector": "24 relu 12"},
    ("lejepa", ""): {"projector": "24 bn relu 24 bn relu 12"},
    ("npid", ""): {"projector": "12"},
    ("deepclusterv2", ""): {"projector": "24 bn relu 12"},
}


def layers(head):
    names = {nn.ReLU: "relu", nn.GELU: "gelu"}
    for layer in head:
        if isinstance(layer, nn.Linear):
            yield f"{layer.out_features}{'-' * (layer.bias is None)}"
        elif isinstance(layer, nn.BatchNorm1d):
            yield "bn" + "-" * (not layer.affine)
        else:
            yield names[type(layer)]


@pytest.mark.parametrize("case", HEADS, ids=" ".join)
def test_heads_have_the_authors_layers(case):
    name, setting = case
    method = build(name, **({setting: True} if setting else {}))
    assert {head: " ".join(layers(method.get_submodule(head))) for head in HEADS[case]} == HEADS[case]


@pytest.mark.parametrize("name", [n for n in cases.CASES if n not in ("mae", "mocov3 vit")])
def test_features_are_the_backbones_output_for_view_0(name):
    module = cases.CASES[name].module or name
    method = build(name, **({"clusters": 5, "min_cluster_size": 2} if module == "odc" else {}))
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(N, 3, v.size, v.size, generator=g).double() for v in cases.CASES[name].views]
    features = method(views, batch())["features"]
    assert not features.requires_grad
    torch.testing.assert_close(features, method.backbone(views[0]).detach())


@pytest.mark.parametrize("name", ["simclr", "dcl", "supcon", "byol", "simsiam", "barlow", "vicreg", "nnclr"])
def test_views_are_one_batch_of_the_backbone_where_they_are_in_the_authors_code(name):
    """Batch statistics are those of both views (the first three) or of a view each."""
    method, sizes = build(name), []
    method.backbone.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    method([torch.rand(N, 3, v.size, v.size).double() for v in cases.CASES[name].views], batch())
    assert sizes == ([2 * N] if name in ("simclr", "dcl", "supcon") else [N, N])


@pytest.mark.parametrize("name", [n for n in cases.CASES if n not in ("mae", "mocov3 vit")])
def test_the_evaluated_network_is_the_authors(name):
    """The teacher of DINO; otherwise the network that has the gradients."""
    method = build(name, **({"min_cluster_size": 2} if name == "odc" else {}))
    of_target = name.partition(" ")[0] == "dino"
    assert getattr(method, "evaluated", "backbone") == ("target.0" if of_target else "backbone")


def test_embeddings_of_deepcluster_v2_have_unit_length():
    method = build("deepclusterv2")
    z = method([torch.rand(N, 3, v.size, v.size).double() for v in cases.CASES["deepclusterv2"].views], batch())["z"]
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:-1]).double())


@pytest.mark.parametrize("algorithm", ["kmeans", "faiss"])
def test_deepcluster_uses_the_k_means_that_is_set(algorithm, monkeypatch):
    used, fit = [], clustering.KMeans.fit
    monkeypatch.setattr(
        clustering.KMeans,
        "fit",
        lambda self, *rows: (used.append(self.backend), fit(replace(self, backend="torch"), *rows))[1],
    )
    method = build("deepcluster", algorithm=algorithm, clusters=4, pca_dim=0)
    x = rows(60, method.backbone.dim).detach()
    method.before_epoch(0, lambda *names, **options: (x, torch.arange(60)))
    assert used == ["torch" if algorithm == "kmeans" else "faiss"]


def test_dino_head_initialisation():
    """vision_transformer.py's DINOHead: truncated normal of std 0.02, zero biases; the last layer as nn.Linear."""
    head = build("dino", dims=(300, 200), prototypes=50).head
    first, last = (layer for layer in head.mlp if isinstance(layer, nn.Linear))
    for layer in (first, last):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.full((50,), 3**-0.5).double())
    assert nn.Linear(200, 50).weight.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.05)


def test_odc_initialisation_and_batch_norm():
    """OpenSelfSup's: Kaiming in the neck, N(0, 0.01) in the head; batch norm of momentum 0.001 without affine."""
    method = build("odc", dims=(300, 200), clusters=30, min_cluster_size=2, norm=True, dropout=0.3)
    for layer, fan in ((method.neck[0], 8), (method.neck[4], 300)):
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05) and not layer.bias.any()
    assert method.head.weight.std().item() == pytest.approx(0.01, rel=0.05) and not method.head.bias.any()
    norm, drop = method.neck[1], method.neck[3]
    assert (norm.momentum, norm.affine, drop.p) == (0.001, False, 0.3)
    assert method.sizes.tolist() == torch.bincount(method.labels).tolist() == [2] * 30


def test_byol_openselfsup_predictor_initialisation():
    predictor = build("byol", init="openselfsup", dims=(24, 300), predictor_dim=200).predictor
    for layer in (predictor[0], predictor[-1]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05) and not layer.bias.any()


def test_swav_weight_norm_normalises_in_forward_and_leaves_the_weights():
    method, z = build("swav", dims=(4, D), prototypes=3, weight_norm=True), rows(N, D)
    with torch.no_grad():
        method.prototypes.weight *= 3
    weight = method.prototypes.weight.detach().clone()
    torch.testing.assert_close(method.prototypes(z), z @ torch.from_numpy(unit(weight.numpy())).T)
    method.after_step({"z": rows(N, 2, D).detach()}, batch(), 0.5)
    assert torch.equal(method.prototypes.weight, weight)


def test_swav_queue_that_is_not_a_multiple_of_the_ranks_raises(monkeypatch):
    monkeypatch.setattr("fastssl.dist.world", lambda: 2)
    with pytest.raises(ValueError, match="method.queue=9 must be a multiple of the number of ranks, 2"):
        build("swav", queue=9)
