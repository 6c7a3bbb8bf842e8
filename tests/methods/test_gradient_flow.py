"""Which outputs have gradients, and updates without gradients: momentum encoders, prototypes, queues."""

import method_cases as cases
import numpy as np
import pytest
import torch
from loss_tools import D, N, array, batch, build, mae, rows, unit

# method: (outputs that get no gradient, outputs that do)
FLOW = {
    "moco": ("k", "q"),
    "moco symmetric": ("k", "q"),
    "byol": ("z", "p"),
    "simsiam": ("z", "p"),
    "mocov3": ("z", "p"),
    "nnclr": ("z", "p"),
    "dino": ("teacher", "student"),
    "swav": ("z", "scores"),
    "densecl": ("k k_dense", "q q_dense"),
    "mae": ("target", "pred"),
    "barlow": ("", "z"),
    "vicreg": ("", "z"),
    "lejepa": ("", "z"),
}


@pytest.mark.parametrize("name", FLOW)
def test_targets_change_the_loss_and_have_no_gradient(name):
    case = cases.CASES[name]
    method = mae() if name == "mae" else build(name)
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(N, 3, v.size, v.size, generator=g).double() for v in case.views]
    out = {k: v.detach().clone() for k, v in method(views, batch()).items()}
    for value in out.values():
        value.requires_grad_(value.is_floating_point())
    stopped, flowing = (names.split() for names in FLOW[name])
    loss = method.loss(out, batch())["loss"]
    for key in stopped:
        assert torch.autograd.grad(loss, out[key], retain_graph=True, allow_unused=True)[0] is None, key
        if (name, key) not in {("swav", "z")}:  # the embeddings of SwAV wait for the queue
            moved = {**out, key: out[key].detach() + torch.randn(out[key].shape, generator=g).double()}
            assert method.loss(moved, batch())["loss"] != loss, key
    for key in flowing:
        grad = torch.autograd.grad(loss, out[key], retain_graph=True)[0]
        assert grad.abs().max() > 1e-6, key
        if name in ("barlow", "vicreg", "lejepa", "dino", "swav"):
            assert (grad.abs().amax((0, 2)) > 1e-9).all(), "every view gets a gradient"


@pytest.mark.parametrize("name", ["moco", "byol", "mocov3", "dino", "densecl"])
def test_momentum_encoder_update_equals_the_formula(name):
    method = build(name, momentum=0.8)
    pairs = [(n, p) for n, p in method.named_parameters() if n.startswith("target.")]
    assert pairs and not any(p.requires_grad for _, p in pairs)
    online = {n: p for n, p in method.named_parameters() if not n.startswith("target.")}
    with torch.no_grad():
        for p in online.values():
            p += 1
    before = {n: p.clone() for n, p in pairs}
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(N, 3, v.size, v.size, generator=g).double() for v in cases.CASES[name].views]
    out = {k: v.detach() for k, v in method(views, batch()).items()}
    method.after_step(out, batch(), 0.0)
    names = {"0": "backbone", "1": "head" if name == "dino" else "projector", "2": "dense_projector"}
    for n, p in pairs:
        _, part, rest = n.split(".", 2)
        want = 0.8 * before[n] + 0.2 * online[f"{names[part]}.{rest}"]
        torch.testing.assert_close(p, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_frozen_prototypes_have_zero_gradient(name):
    method = build(name, freeze_epochs=2)
    weights = [p for n, p in method.named_parameters() if n.endswith("prototypes.weight") and p.requires_grad]
    views = [torch.rand(N, 3, v.size, v.size).double() for v in cases.CASES[name].views]
    for epoch, frozen in ((0, True), (1, True), (2, False)):
        loss = method.loss(method(views, batch(epoch=epoch)), batch(epoch=epoch))["loss"]
        (grad,) = torch.autograd.grad(loss, weights)
        assert (grad.abs().max() == 0) == frozen


def test_prototypes_are_normalised_in_forward():
    from fastssl.methods import parts

    prototypes = parts.Prototypes(D, 4).double()
    x = rows(N, D)
    before = prototypes(x)
    with torch.no_grad():
        prototypes.weight *= torch.tensor([[0.1], [2.0], [3.0], [40.0]])
    torch.testing.assert_close(prototypes(x), before)
    np.testing.assert_allclose(array(before), array(x) @ unit(array(prototypes.weight)).T, rtol=1e-12)


def test_nnclr_and_swav_enqueue_the_embeddings_of_the_step():
    method = build("nnclr", dims=(D,), predictor_dim=4, queue=8)
    z = rows(N, 2, D).detach()
    method.after_step({"z": z}, batch(), 0.5)
    np.testing.assert_allclose(array(method.queue[:N]), unit(array(z[:, 0])), rtol=1e-12)
    method = build("swav", dims=(4, D), prototypes=3, queue=8)
    method.after_step({"z": z}, batch(), 0.5)
    for i in range(2):
        np.testing.assert_allclose(array(method.queue[i, :N]), unit(array(z[:, i])), rtol=1e-12)
    assert method.pointers.tolist() == [N, N]
