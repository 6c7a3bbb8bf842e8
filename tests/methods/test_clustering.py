"""Methods with a memory of the whole training set: their losses in float64, their banks, labels and sampling orders."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_losses import D, N, Tiny, array, batch, build, close, log_softmax, rows, unit

# ---- NPID ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_npid_tells_a_samples_own_row_from_its_negatives(shared):
    method = build("npid", dims=(D,), negatives=10, temperature=0.3, shared=shared, ensure_neg=False)
    z, some = rows(N, D), batch(epoch=3, step=2)
    some.index = torch.tensor([59, 3, 7, 20, 0, 41])
    negatives = array(method.draw_shared(some) if shared else method.draw(some))
    assert negatives.shape == ((10,) if shared else (N, 10))
    bank, want = array(method.bank), 0.0
    for i, q in enumerate(unit(array(z))):
        others = bank[negatives if shared else negatives[i]]
        want -= log_softmax(np.concatenate([[q @ bank[some.index[i]]], others @ q]) / 0.3)[0] / N
    close(method.loss({"z": z}, some)["loss"], want)


def test_npid_draws_by_sample_and_epoch():
    method = build("npid", dims=(D,), negatives=4001, ensure_neg=False)
    whole = method.draw(SimpleNamespace(index=torch.arange(8), epoch=3))
    again = method.draw(SimpleNamespace(index=torch.tensor([5, 2]), epoch=3))
    assert torch.equal(again, whole[[5, 2]])
    assert not torch.equal(method.draw(SimpleNamespace(index=torch.arange(8), epoch=4)), whole)
    counts = torch.bincount(whole.flatten(), minlength=60)
    assert counts.shape == (60,) and (counts - 8 * 4001 / 60).abs().max() < 6 * (8 * 4001 / 60) ** 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_ensure_neg_leaves_out_the_positives_and_nothing_else(shared):
    method = build("npid", dims=(D,), negatives=20_000, ensure_neg=True, shared=shared)
    some = batch()
    some.index = torch.tensor([59, 3, 4, 20, 0, 41])
    drawn = method.draw_shared(some) if shared else method.draw(some)
    for i, one in enumerate(some.index):
        mine, out = (drawn, some.index) if shared else (drawn[i], one[None])
        counts = torch.bincount(mine, minlength=60)
        expected = 20_000 / (60 - len(out))
        assert counts.shape == (60,) and counts[out].sum() == 0
        counts[out] = round(expected)
        assert (counts - expected).abs().max() < 6 * expected**0.5, "uniform over all others"
    later = SimpleNamespace(index=some.index, epoch=0, step=1)
    assert not shared or not torch.equal(method.draw_shared(later), drawn)


def test_npid_mixes_new_embeddings_into_the_bank():
    method = build("npid", dims=(D,), momentum=0.25)
    before, z = array(method.bank).copy(), rows(N, D).detach()
    some = SimpleNamespace(index=torch.tensor([9, 3, 7, 20, 0, 41]))
    method.after_step({"z": z}, some, 0.5)
    want = before.copy()
    want[some.index] = unit(0.75 * before[some.index] + 0.25 * unit(array(z)))
    np.testing.assert_allclose(array(method.bank), want, rtol=0, atol=1e-12)


def test_npid_needs_something_to_be_negative():
    import method_cases as cases

    for settings, samples, left in (({"shared": False}, 1, 1), ({"shared": True}, 8, 8)):
        with pytest.raises(ValueError, match=f"data.train has {samples} samples and none is left beside the {left} "):
            cases.config("npid", **settings).build(Tiny(), samples=samples, classes=None, batch=8)
