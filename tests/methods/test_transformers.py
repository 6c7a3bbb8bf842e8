"""MAE's masks and targets; position embeddings and frozen patch projection of MAE and MoCo v3."""

import math

import method_cases as cases
import numpy as np
import pytest
import torch
from loss_tools import Tiny, array, batch, build, close, mae


def test_mae_prediction_does_not_depend_on_masked_pixels():
    method = mae(mask_ratio=0.5)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    out = method([x], batch(2))
    visible, masked = method.draw_mask(torch.arange(2), 0, 16)
    assert sorted(torch.cat([visible, masked], 1)[0].tolist()) == list(range(16)) and visible.shape == (2, 8)
    other = x.clone()
    for i in range(2):
        for patch in masked[i].tolist():
            r, c = divmod(patch, 4)
            other[i, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] += 3 * torch.randn(3, 16, 16).double()
    changed = method([other], batch(2))
    assert torch.equal(changed["pred"], out["pred"]) and torch.equal(changed["features"], out["features"])
    assert not torch.allclose(changed["target"], out["target"])
    r, c = divmod(int(masked[1, 3]), 4)
    patch = array(x)[1, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].reshape(-1)
    want = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(array(out["target"])[1, 3], want, rtol=1e-5, atol=1e-6)  # targets are float32
    close(method.loss(out, batch())["loss"], ((array(out["pred"]) - array(out["target"])) ** 2).mean())


def test_mae_masks_depend_on_sample_and_epoch():
    method = mae()
    whole = method.draw_mask(torch.arange(8), 3, 16)[1]
    assert torch.equal(method.draw_mask(torch.tensor([5, 2]), 3, 16)[1], whole[[5, 2]])
    assert not torch.equal(method.draw_mask(torch.arange(8), 4, 16)[1], whole)
    counts = torch.bincount(method.draw_mask(torch.arange(4000), 0, 16)[1].flatten(), minlength=16) / 4000
    assert (counts - 0.5).abs().max() < 0.05, "every patch is masked equally often"


def test_vit_settings_with_a_resnet_raise():
    for name, settings in (("mae", {}), ("mocov3", {"freeze_patch_embed": True})):
        with pytest.raises(ValueError, match="'tiny' is not a vision transformer; use one of timm's"):
            cases.config(name, **settings).init_backbone(Tiny())
    with pytest.raises(ValueError, match=r"method.mask_ratio=1.0 must be between 0 and 1"):
        build("mae", mask_ratio=1.0)
    with pytest.raises(ValueError, match=r"method.mask_ratio=0.95 leaves 0 of 16 patches of 16 pixels"):
        mae(mask_ratio=0.95)([torch.rand(2, 3, 64, 64).double()], batch(2))


def test_mocov3_freezes_the_patch_projection_and_position_embeddings():
    from fastssl import backbones
    from fastssl.config import Backbone

    backbone = backbones.build(Backbone("test_vit"), cases.config("mocov3", freeze_patch_embed=True))
    method = build("mocov3", backbone, freeze_patch_embed=True)
    frozen = {n for n, p in method.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"body.pos_embed", "body.patch_embed.proj.weight", "body.patch_embed.proj.bias"}


@pytest.mark.parametrize("method, columns_first", [("mae", True), ("mocov3", False)])
def test_fixed_position_embeddings_equal_the_authors(method, columns_first):
    """Element by element, as in MAE's get_2d_sincos_pos_embed and MoCo v3's build_2d_sincos_position_embedding."""
    from fastssl import backbones
    from fastssl.config import Backbone

    settings = {"freeze_patch_embed": True} if method == "mocov3" else {}
    body = backbones.build(Backbone("test_vit", options={"img_size": (48, 80)}), cases.config(method, **settings)).body
    quarter = body.embed_dim // 4
    assert body.pos_embed.shape == (1, 1 + 3 * 5, 4 * quarter) and body.pos_embed[0, 0].abs().max() == 0
    for row, column in ((0, 3), (2, 1)):
        first, second = (column, row) if columns_first else (row, column)
        want = [
            f(position / 10000 ** (i / quarter))
            for position in (first, second)
            for f in (math.sin, math.cos)
            for i in range(quarter)
        ]
        np.testing.assert_allclose(body.pos_embed[0, 1 + 5 * row + column], want, atol=1e-6)
