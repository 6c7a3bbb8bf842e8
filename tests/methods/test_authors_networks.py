"""Networks and prototypes of methods as the authors' code initialises, freezes and updates them."""

import method_cases as cases
import pytest
import torch
import torch.nn.functional as F
from test_authors import N, Net, assert_close, build
from torch import nn

from fastssl import backbones, clustering, optim
from fastssl.config import Backbone, Optim
from fastssl.methods import dino, mae, mocov3, rotation, simclr
from fastssl.trainer import Context


def std(weight):
    return float(weight.detach().std())


def test_rotation_head_initialisation():
    head = build(rotation.Config(), Net(2048)).head
    assert std(head.weight) == pytest.approx((2 / 2048) ** 0.5, rel=0.03) and head.bias.abs().max() == 0


@pytest.mark.parametrize("name, heads", [("vit_small_patch16_224", 12), ("vit_base_patch16_224", None)])
def test_mocov3_vit_initialisation_equals_the_authors(name, heads):
    options = {"depth": 2, **({"num_heads": heads} if heads else {})}
    body = backbones.build(Backbone(name, options=options), mocov3.Config(freeze_patch_embed=True)).body
    width = body.embed_dim
    assert width // body.blocks[0].attn.num_heads == (32 if heads else 64)
    xavier = {
        "patch_embed.proj": (768, width),
        "blocks.1.attn.qkv": (width, width),
        "blocks.1.mlp.fc1": (width, 4 * width),
        "blocks.1.attn.proj": (width, width),
        "blocks.1.mlp.fc2": (4 * width, width),
    }
    for layer, fans in xavier.items():
        layer = body.get_submodule(layer)
        assert std(layer.weight) == pytest.approx((2 / sum(fans)) ** 0.5, rel=0.02)
        assert layer.bias.abs().max() == 0
    assert body.cls_token.abs().max() < 1e-4 and not body.patch_embed.proj.weight.requires_grad
    assert body.blocks[0].norm1.eps == 1e-6


@pytest.mark.filterwarnings("ignore:method.shuffle=True has no effect on one GPU:UserWarning")
def test_openselfsup_initialisation():
    torch.manual_seed(0)
    net = backbones.build(Backbone("resnet18", init="fan_in"))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            assert std(m.weight) == pytest.approx((2 / m.weight[0].numel()) ** 0.5, rel=0.05)
    for name in ("moco", "simclr", "npid", "byol", "densecl"):
        projector = (
            cases.config(name, dims=(600, 400), init="openselfsup")
            .build(Net(512), Context(samples=600, batch=4))
            .projector
        )
        for layer, fan in zip([m for m in projector if isinstance(m, nn.Linear)], (512, 600)):
            assert std(layer.weight) == pytest.approx((2 / fan) ** 0.5, rel=0.03), name
            assert layer.bias is None or layer.bias.abs().max() == 0
    head = cases.config("supervised", init="openselfsup").build(Net(512), Context(1, 1, ["a"] * 90)).head
    assert std(head.weight) == pytest.approx(0.01, rel=0.03) and head.bias.abs().max() == 0


def test_simclr_last_shift_false_freezes_the_last_bias():
    projector = build(simclr.Config(dims=(6, 4), last_shift=False)).projector
    last = projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad and last.bias.abs().max() == 0
    assert projector[1].bias.requires_grad


def test_byol_last_bias_false_removes_the_last_biases():
    method = build(cases.config("byol", last_bias=False, norm=True))
    for head in (method.projector, method.predictor):
        assert head[0].bias is not None and head[-1].bias is None


@pytest.mark.parametrize("name", ["vit_small_patch16_224"])
def test_dino_vit_initialisation_equals_the_authors(name):
    """vision_transformer.py: truncated normal of std 0.02 for linear layers, positions and class token."""
    torch.manual_seed(0)
    body = backbones.build(Backbone(name, options={"depth": 2}), dino.Config()).body
    linear = [m for m in body.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 8
    for weight in [m.weight for m in linear] + [body.pos_embed, body.cls_token]:
        assert std(weight) == pytest.approx(0.02, rel=0.1)
    assert not any(m.bias.any() for m in linear)


def test_dino_drops_paths_in_the_student_only():
    backbone = backbones.build(Backbone("vit_small_patch16_224", options={"depth": 3, "drop_path_rate": 0.1}))
    method = dino.Config(prototypes=8, dims=(6, 4)).build(backbone, Context(60, N))
    drops = [
        [m.drop_prob for m in part.modules() if hasattr(m, "drop_prob")] for part in (method.backbone, method.target)
    ]
    assert max(drops[0]) == pytest.approx(0.1) and len(drops[1]) == len(drops[0]) and not any(drops[1])


def test_mae_decoder_equals_the_authors():
    method = mae.Config(decoder_dim=32, decoder_depth=1, decoder_heads=2).build(
        backbones.build(Backbone("test_vit")), Context(60, N)
    )
    norms = [m for part in (method.decoder, method.head) for m in part.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 3 and {m.eps for m in norms} == {1e-6}
    groups = optim.group_parameters(
        method.named_parameters(), Optim(name="adamw", paramwise={"ndim<=1": {"weight_decay": 0.0}}), 1.0
    )
    decayed = {id(p) for g in groups if g.options["weight_decay"] for p in g.params}
    assert id(method.mask_token) in decayed


@pytest.mark.parametrize("name, optimizer, zero", [("dino", "adamw", 0), ("dino", "adamw", 2), ("swav", "lars", 3)])
def test_resume_while_prototypes_are_frozen_gives_the_same_weights(name, optimizer, zero, tmp_path):
    """The optimizer has no state for them when the checkpoint is written."""
    import shutil

    from fastssl import dist, engine
    from fastssl.zero import full_state_dict

    dist.init("cpu")
    run = cases.run(name, steps=6, zero=zero, freeze_epochs=1)  # of four steps an epoch
    run.name, run.log.root, run.log.checkpoint_steps, run.log.keep = "x", str(tmp_path), 2, 9
    run.optim.name, run.optim.lr = optimizer, 1e-2
    whole = full_state_dict(engine.fit(run, device="cpu", loader=cases.loader(run)).method)
    for folder in (tmp_path / "x" / "checkpoints").glob("step_*[46]"):
        shutil.rmtree(folder)
    resumed = full_state_dict(engine.fit(run, device="cpu", resume=True, loader=cases.loader(run)).method)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_exact_views_are_float32_in_bf16_runs():
    from fastssl import dist
    from fastssl.step import batch_views

    dist.init("cpu")
    kinds = {}
    for name in ("mae", "rotation"):
        run = cases.run(name)
        run.optim.precision = "bf16"
        t = cases.build(run)
        kinds[name] = batch_views(t, next(t.loader.epoch(0)))[0].dtype
    assert kinds == {"mae": torch.float32, "rotation": torch.bfloat16}


def test_kmeans_with_empty_keep_keeps_the_centroids_of_empty_clusters():
    """main_deepclusterv2.py: means where there are members, and the old centroid where there are none."""
    x = F.normalize(torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=1)
    x[20:] = x[20]
    found = clustering.KMeans(12, iterations=4, spherical=True, empty="keep", seed=1).fit(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:12]
    want = x[order].clone()
    for _ in range(4):
        own = (x @ want.T).argmax(1)
        for k in range(12):
            if (own == k).any():
                want[k] = x[own == k].mean(0)
        want = F.normalize(want, dim=1)
    assert (found.counts == 0).any()
    assert_close(found.centroids, want)
    split = clustering.KMeans(12, iterations=4, spherical=True, seed=1).fit(x)
    assert (split.counts == 0).sum() < (found.counts == 0).sum()


def test_deepclusterv2_first_embeddings_use_batch_statistics():
    from fastssl import dist
    from fastssl.outputs import extract_outputs
    from fastssl.step import batch_views

    dist.init("cpu")
    run = cases.run("deepclusterv2", norm=True)
    run.backbone = Backbone("resnet10", stem="cifar", width=8)
    t = cases.build(run)
    before = {k: v.clone() for k, v in t.method.state_dict().items()}
    z, index = extract_outputs(t, "z", augmented=True, training=True)
    assert sorted(index.tolist()) == list(range(72))
    first = next(t.loader.epoch(0))
    with torch.no_grad():
        want = t.method.forward(batch_views(t, first), first)["z"]
    assert_close(z[:16], want, rtol=1e-5, atol=1e-6)
    evaluated, order = extract_outputs(t, "z", augmented=True)
    assert F.cosine_similarity(z[index.argsort()][:, 0], evaluated[order.argsort()][:, 0]).mean() < 0.9
    for k, v in before.items():
        if "num_batches" not in k and "running" not in k:
            assert torch.equal(v, t.method.state_dict()[k]), k


@pytest.mark.parametrize("name", ["moco", "densecl"])
def test_shuffle_on_one_rank_warns(name, recwarn):
    with pytest.warns(UserWarning, match="no effect on one GPU"):
        cases.config(name).build(Net(), Context(60, 4))
    recwarn.clear()
    cases.config(name, shuffle=False).build(Net(), Context(60, 4))
    cases.config(name).build(backbones.build(cases.PLAIN), Context(60, 4))
    assert not [w for w in recwarn if "no effect" in str(w.message)]
