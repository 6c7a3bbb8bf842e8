"""Each loss against its paper's formula written out in float64, and settings that a method refuses."""

from types import SimpleNamespace

import method_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_tools import LABEL, D, N, Tiny, array, batch, build, close, log_softmax, rows, unit
from torch import nn

from fastssl import dist
from fastssl.trainer import Context


def test_byol_loss_is_the_squared_distance_of_unit_vectors():
    p, z = rows(N, 2, D), rows(N, 2, D, seed=2)
    u, v = unit(array(p)), unit(array(z))
    want = ((u[:, 0] - v[:, 1]) ** 2).sum(1).mean() + ((u[:, 1] - v[:, 0]) ** 2).sum(1).mean()
    close(build("byol").loss({"p": p, "z": z}, batch())["loss"], want)


def test_simsiam_loss_is_half_the_negative_cosine_of_each_view():
    p, z = rows(N, 2, D), rows(N, 2, D, seed=2)
    u, v = unit(array(p)), unit(array(z))
    want = -0.5 * (u[:, 0] * v[:, 1]).sum(1).mean() - 0.5 * (u[:, 1] * v[:, 0]).sum(1).mean()
    close(build("simsiam").loss({"p": p, "z": z}, batch())["loss"], want)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_loss_and_queue_update_equal_the_formulas(symmetric):
    method = build("moco", dims=(D,), queue=8, temperature=0.3, symmetric=symmetric)
    sides = 1 + symmetric
    q, k = rows(N, sides, D), rows(N, sides, D, seed=2)
    u, v, queue = unit(array(q)), unit(array(k)), array(method.queue)
    assert queue.shape == (sides, 8, D) and len({row.tobytes() for row in queue.reshape(-1, D)}) == 8 * sides
    want = 0.0
    for i in range(sides):
        logits = np.concatenate([(u[:, i] * v[:, i]).sum(1, keepdims=True), u[:, i] @ queue[i].T], 1) / 0.3
        want -= log_softmax(logits)[:, 0].mean() / sides
    close(method.loss({"q": q, "k": k}, batch())["loss"], want)
    method.after_step({"q": q.detach(), "k": k.detach()}, batch(), 0.5)
    np.testing.assert_allclose(array(method.queue[:, :N]), v.transpose(1, 0, 2), rtol=1e-12)
    np.testing.assert_array_equal(array(method.queue[:, N:]), queue[:, N:])
    assert method.pointers.tolist() == [N] * sides


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_keys_are_of_the_other_view(symmetric):
    method = build("moco", symmetric=symmetric, shuffle=False)
    views = [torch.rand(N, 3, 4, 4).double() for _ in range(2)]
    out = method(views, batch())
    queries, keys = ([0, 1], [1, 0]) if symmetric else ([0], [1])
    torch.testing.assert_close(out["q"], torch.stack([method.projector(method.backbone(views[i])) for i in queries], 1))
    torch.testing.assert_close(out["k"], torch.stack([method.target(views[i]) for i in keys], 1))
    assert not out["k"].requires_grad


@pytest.mark.parametrize("name", ["moco", "densecl"])
def test_keys_are_computed_in_shuffled_order(name, monkeypatch):
    """Of two ranks, the second of which is left out: what is exchanged is what this one sends."""
    method, seen = build(name), []
    views = [torch.rand(N, 3, 4, 4).double() for _ in range(2)]
    want = method(views, batch())["k"]
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr("fastssl.methods.parts.momentum._exchange", lambda x: x)
    method.target[0].conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(method(views, batch())["k"], want)
    assert not torch.equal(seen[0], views[1])
    assert sorted(seen[0].sum((1, 2, 3)).tolist()) == pytest.approx(sorted(views[1].sum((1, 2, 3)).tolist()))
    with pytest.raises(ValueError, match="sends equal parts of 5 samples to 2 ranks"):
        method([view[:5] for view in views], batch(5))


def test_mocov3_loss_equals_the_formula():
    q, k = rows(N, 2, D), rows(N, 2, D, seed=2)
    want = 0.0
    for a, b in ((0, 1), (1, 0)):
        logits = unit(array(q))[:, a] @ unit(array(k))[:, b].T / 0.3
        want += -np.diag(log_softmax(logits)).mean() * 2 * 0.3
    close(build("mocov3", temperature=0.3).loss({"p": q, "z": k}, batch())["loss"], want)


def test_barlow_loss_equals_the_papers_pseudocode():
    z = rows(N, 2, D)
    norm = nn.BatchNorm1d(D, affine=False).double()
    c = norm(z[:, 0]).T @ norm(z[:, 1]) / N
    want = sum((c[i, j] - 1) ** 2 if i == j else 0.0051 * c[i, j] ** 2 for i in range(D) for j in range(D))
    out = build("barlow", scale=0.3).loss({"z": z}, batch())
    close(out["loss"], 0.3 * want.item())
    close(out["on_diagonal"] + 0.0051 * out["off_diagonal"], want.item())
    for ours, theirs in zip(*(torch.autograd.grad(x, z) for x in (out["loss"], 0.3 * want))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [D, N, 3 * N])  # fewer features than samples, as many, more
def test_vicreg_terms_equal_the_formulas(width):
    z = rows(N, 2, width)
    x = array(z)
    cov = [np.cov(x[:, v].T) for v in (0, 1)]
    std = [np.sqrt(x[:, v].var(0, ddof=1) + 1e-4) for v in (0, 1)]
    want = {
        "invariance": ((x[:, 0] - x[:, 1]) ** 2).mean(),
        "variance": sum(np.maximum(0, 1 - s).mean() for s in std) / 2,
        "covariance": sum((c**2).sum() - (np.diag(c) ** 2).sum() for c in cov) / width,
    }
    out = build("vicreg", invariance=25.0, variance=24.0, covariance=2.0).loss({"z": z}, batch())
    for name, value in want.items():
        close(out[name], value)
    assert want["variance"] > 0.01
    close(out["loss"], 25 * want["invariance"] + 24 * want["variance"] + 2 * want["covariance"])
    torch_cov = [torch.cov(z[:, v].T) for v in (0, 1)]
    by_hand = sum(c.fill_diagonal_(0).square().sum() for c in torch_cov) / width
    for ours, theirs in zip(*(torch.autograd.grad(x, z, retain_graph=True) for x in (out["covariance"], by_hand))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, width, whole", [("barlow", D, 1), ("vicreg", D, 2), ("vicreg", 3 * N, 0)])
def test_feature_matrices_are_all_reduced_in_forward_only(name, width, whole, monkeypatch):
    """How many D x D matrices two ranks (the second is simulated) all-reduce, none of them in backward; VICReg has none
    if there are fewer samples than features."""
    sizes, z = [], rows(N, 2, width)
    method = build(name)  # one rank's copy
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "gather", lambda x: torch.cat([x, x]))
    monkeypatch.setattr(dist, "sum_", lambda x: sizes.append(x.numel()) or x.mul_(2))
    loss = method.loss({"z": z}, batch())["loss"]
    assert sizes.count(width**2) == whole
    loss.backward()
    assert sizes.count(width**2) == whole and z.grad.abs().max() > 1e-6


def test_nnclr_loss_equals_the_formula():
    method = build("nnclr", dims=(D,), predictor_dim=4, queue=8, temperature=0.3)
    z, p = rows(N, 2, D), rows(N, 2, D, seed=2)
    queue, u, v, want = array(method.queue), unit(array(z)), unit(array(p)), 0.0
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-6)
    for a, b in ((0, 1), (1, 0)):
        near = unit(np.stack([queue[np.argmin(((queue - u[i, a]) ** 2).sum(1))] for i in range(N)]))
        for x, y in ((near, v[:, b]), (v[:, b], near)):  # both directions of the softmax, halved; both views, halved
            want += -np.diag(log_softmax(x @ y.T / 0.3)).mean() / 4
    close(method.loss({"z": z, "p": p}, batch())["loss"], want)


def test_dino_loss_and_center_equal_the_formulas():
    method = build(
        "dino", dims=(D,), prototypes=7, teacher_temperature=0.04, teacher_temperature_end=0.07, teacher_epochs=4
    )
    method.center += torch.randn(7).double()
    s, t = rows(N, 4, 7), rows(N, 2, 7, seed=2)
    teacher = np.exp(log_softmax((array(t) - array(method.center)) / 0.06))  # epoch 2 of 0, 1, 2, 3
    student = log_softmax(array(s) / 0.1)
    want = [-(teacher[:, i] * student[:, j]).sum(1).mean() for i in range(2) for j in range(4) if i != j]
    assert len(want) == 6
    close(method.loss({"student": s, "teacher": t}, batch(epoch=2))["loss"], np.mean(want))
    assert [round(method.teacher_temperature(e), 6) for e in (0, 1, 2, 3, 9)] == [0.04, 0.05, 0.06, 0.07, 0.07]
    one = build("dino", dims=(D,), prototypes=7, teacher_temperature_end=0.07, teacher_epochs=1)  # np.linspace(a, b, 1)
    assert [round(one.teacher_temperature(e), 6) for e in (0, 1, 2)] == [0.04, 0.07, 0.07]

    center = method.center.clone()
    method.after_step({"teacher": t.detach()}, batch(), 0.5)
    torch.testing.assert_close(method.center, 0.9 * center + 0.1 * t.detach().mean((0, 1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("queue, weight_norm", [(0, False), (8, False), (8, True)])
def test_swav_loss_equals_the_formula(queue, weight_norm):
    method = build(
        "swav",
        dims=(4, D),
        prototypes=3,
        queue=queue,
        queue_epoch=1,
        weight_norm=weight_norm,
        sinkhorn_iterations=3 + weight_norm,
    )
    method.prototypes.normalize_()
    with torch.no_grad():
        method.prototypes.weight *= 1 + weight_norm  # with it their length does not matter
    scores = rows(N, 3, 3, seed=4)
    want = []
    for i in range(2):
        own = array(scores)[:, i]
        if queue:
            w = array(method.prototypes.weight)
            own = np.concatenate([own, array(method.queue)[i] @ unit(w).T])
        q = np.exp(own / 0.05).T  # as in the paper's appendix: prototypes x samples
        q /= q.sum()
        for _ in range(3 + weight_norm):
            q /= q.sum(1, keepdims=True) * 3
            q /= q.sum(0, keepdims=True) * q.shape[1]
        q = (q * q.shape[1]).T[:N]
        np.testing.assert_allclose(q.sum(1), 1, rtol=1e-12)
        want += [-(q * log_softmax(array(scores)[:, j] / 0.1)).sum(1).mean() for j in range(3) if j != i]
    close(method.loss({"scores": scores}, batch(epoch=1))["loss"], np.mean(want))
    before = method.loss({"scores": scores}, batch(epoch=0))["loss"]
    assert (abs(before.item() - np.mean(want)) > 1e-3) == bool(queue), "the queue is used from queue_epoch on"


@pytest.mark.parametrize("name", ["supcon", "dcl", "simclr"])
def test_simclr_dcl_and_supcon_losses_equal_the_formulas(name):
    z = rows(N, 2, D)
    u = unit(array(z)).transpose(1, 0, 2).reshape(2 * N, D)  # view 0, then view 1
    s, want = u @ u.T / 0.5, 0.0
    for i in range(2 * N):
        label = LABEL[i % N]
        positives = [
            j
            for j in range(2 * N)
            if j != i and (j % N == i % N or (name == "supcon" and label >= 0 and LABEL[j % N] == label))
        ]
        others = [j for j in range(2 * N) if j != i and not (name == "dcl" and j in positives)]
        want += np.log(np.exp(s[i, others]).sum()) - s[i, positives].mean()
    close(build(name, temperature=0.5).loss({"z": z}, batch())["loss"], want / (2 * N))


def test_densecl_loss_and_queue_update_equal_the_formulas():
    method = build("densecl", dims=(4, D), queue=7, temperature=0.3, dense_weight=0.25)
    q, k, qd, kd = rows(N, D), rows(N, D, seed=2), rows(N, 4, D, seed=3), rows(N, 4, D, seed=4)
    match = torch.randint(0, 4, (N, 4), generator=torch.Generator().manual_seed(0))

    def info(a, b, queue):
        return -log_softmax(np.concatenate([[a @ b], queue @ a]) / 0.3)[0]

    single = np.mean([info(a, b, array(method.queue)) for a, b in zip(unit(array(q)), unit(array(k)))])
    dense = np.mean(
        [
            info(unit(array(qd))[i, s], unit(array(kd))[i, match[i, s]], array(method.dense_queue))
            for i in range(N)
            for s in range(4)
        ]
    )
    out = method.loss({"q": q, "k": k, "q_dense": qd, "k_dense": kd, "match": match}, batch())
    close(out["loss"], 0.75 * single + 0.25 * dense)

    method.after_step({"k": k.detach(), "k_dense": kd.detach()}, batch(), 0.5)
    np.testing.assert_allclose(array(method.dense_queue[:N]), unit(array(kd).mean(1)), rtol=1e-12)
    assert method.pointers.tolist() == [N, N]


def test_densecl_matches_positions_by_backbone_features():
    method = build("densecl", dims=(4, D), queue=7)
    x = torch.rand(2, 3, 4, 4).double()
    out = method([x, x.flip(3)], batch(2))  # the same image flipped: each position matches its mirror image
    assert out["match"].tolist() == [[1, 0, 3, 2]] * 2
    out = method([x, x.rot90(1, (2, 3))], batch(2))
    assert out["match"].tolist() == [[2, 0, 3, 1]] * 2


def test_supervised_ignores_images_without_labels():
    logits = rows(N, 3)
    some = [i for i in range(N) if LABEL[i] >= 0]
    want = -np.mean([log_softmax(array(logits))[i, LABEL[i]] for i in some])
    out = build("supervised").loss({"logits": logits}, batch())
    close(out["loss"], want)
    close(out["top1"], np.mean([array(logits)[i].argmax() == int(LABEL[i]) for i in some]))
    with pytest.raises(ValueError, match="several labels per image"):
        build("supervised").loss({"logits": logits}, SimpleNamespace(label=torch.zeros(N, 3)))


@pytest.mark.parametrize("name, count", [("rotation", 4), ("relative_loc", 8)])
def test_pretext_labels_are_the_indices_of_the_views(name, count):
    logits = rows(N, count, count)
    want = -np.mean([log_softmax(array(logits))[:, v, v].mean() for v in range(count)])
    close(build(name).loss({"logits": logits}, batch())["loss"], want)
    perfect = torch.eye(count).double().expand(N, -1, -1) * 50
    out = build(name).loss({"logits": perfect}, batch())
    assert out["loss"] < 1e-9 and out["top1"] == 1


def test_relative_loc_gradients_equal_those_of_all_pairs():
    method = build("relative_loc", hidden=16, dropout=0.0)
    views = [torch.rand(N, 3, 4, 4).double() for _ in range(9)]
    loss = method.loss(method(views, batch()), batch())["loss"]
    ours = torch.autograd.grad(loss, list(method.parameters()))
    neighbours = [i for i in range(9) if i != 4]
    pairs = torch.stack([torch.cat([method.backbone(views[i]), method.backbone(views[4])], 1) for i in neighbours], 1)
    logits = method.head(pairs.flatten(0, 1))
    theirs = torch.autograd.grad(F.cross_entropy(logits, torch.arange(8).repeat(N)), list(method.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert max(g.abs().max() for g in ours) > 1e-4


def test_sigreg_equals_the_integral():
    method = build("lejepa", directions=4, knots=2001, sigreg_weight=0.3, t_max=4.0)
    z = rows(N, 3, D)
    out = method.loss({"z": z}, batch(epoch=2, step=5))
    generator = torch.Generator().manual_seed(method.seed + (2 << 32) + 5)
    a = torch.randn(D, 4, generator=generator).numpy().astype(np.float64)
    a /= np.linalg.norm(a, axis=0)
    t = np.linspace(-4, 4, 20001)
    gauss, found = np.exp(-(t**2) / 2), []
    for v in range(3):
        for m in range(4):
            phi = np.exp(1j * np.outer(array(z)[:, v] @ a[:, m], t)).mean(0)
            found.append(N * np.trapezoid(np.abs(phi - gauss) ** 2 * gauss, t))
    np.testing.assert_allclose(out["sigreg"].item(), np.mean(found), rtol=1e-6)
    x = array(z)
    invariance = np.mean((x - x[:, :2].mean(1, keepdims=True)) ** 2)
    close(out["invariance"], invariance)
    close(out["loss"], 0.7 * invariance + 0.3 * out["sigreg"].item())
    again = [method.loss({"z": z}, batch(epoch=e, step=s))["sigreg"] for e, s in ((2, 5), (2, 6), (5, 2))]
    assert again[0] == out["sigreg"] and len({v.item() for v in again}) == 3, "new directions at every step"


def test_sigreg_is_large_for_collapsed_embeddings():
    method = build("lejepa", directions=64)
    z = torch.randn(512, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    good, bad = (method.loss({"z": v}, batch())["sigreg"] for v in (z, z * 0.01))
    assert good < 1.5 and bad > 50, (good, bad)


@pytest.mark.parametrize("name", ["supervised", "supcon"])
def test_methods_with_labels_and_no_classes_raise(name):
    with pytest.raises(
        ValueError, match=f"method '{name}' needs labels, but data.train has none: convert a labelled source"
    ):
        cases.config(name).build(Tiny(), Context(samples=60, batch=N))


@pytest.mark.parametrize("name", ["moco", "nnclr", "densecl", "swav"])
def test_queue_smaller_than_the_batch_raises(name):
    with pytest.raises(ValueError, match=r"method.queue=7 is smaller than optim.batch=8: .* at least 8"):
        cases.config(name, queue=7).build(Tiny(), Context(samples=60, batch=8))
    cases.config(name, queue=8).build(Tiny(), Context(samples=60, batch=8))


@pytest.mark.parametrize("name, sizes", [("dino", [8]), ("swav", [8, 4, 4]), ("lejepa", [8])])
def test_too_few_large_crops_raise(name, sizes):
    match = r"gives . views of \[8.* pixels, .* needs at least 2 views, the first 2 of equal size: change data.views or"
    with pytest.raises(ValueError, match=match):
        build(name)([torch.rand(2, 3, s, s).double() for s in sizes], batch(2))


def test_wrong_number_of_views_raises():
    from fastssl import views
    from fastssl.build import check_views

    with pytest.raises(ValueError, match="RelativeLoc needs a recipe of 9 views, data.views gives 2"):
        check_views(build("relative_loc"), views.simclr(16))
