"""Resampled positions equal those of DINO's interpolate_pos_encoding, which is copied here, and not timm's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl import backbones
from fastssl.backbones import positions
from fastssl.config import Backbone


def dino(table, rows, columns):
    """One (1, 1 + N, D) table at another size: https://github.com/facebookresearch/dino, vision_transformer.py."""
    side = math.sqrt(table.shape[1] - 1)
    patches = table[0, 1:].t().reshape(1, -1, int(side), int(side))
    patches = F.interpolate(patches, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
    assert patches.shape[2:] == (rows, columns)
    return torch.cat([table[:, :1], patches.reshape(1, -1, rows * columns).transpose(1, 2)], 1)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    net = backbones.build(Backbone("vit_tiny_patch16_224", options={"depth": 2})).eval()
    nn.init.normal_(net.body.cls_token)
    return net


@pytest.mark.parametrize("rows, columns", [(6, 6), (14, 14), (20, 20), (4, 9)])
def test_a_vision_transformer_resamples_like_dino(vit, rows, columns):
    """The reference is a network of that size with the table from the formula."""
    body, size = vit.body, (16 * rows, 16 * columns)
    fixed = backbones.build(Backbone("vit_tiny_patch16_224", options={"depth": 2, "img_size": size})).eval()
    table = body.pos_embed if (rows, columns) == (14, 14) else dino(body.pos_embed, rows, columns)
    fixed.body.load_state_dict({**body.state_dict(), "pos_embed": table})
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(vit(x), fixed(x), rtol=0, atol=1e-6)
        last = vit.forward_stages(x)[-1]
        torch.testing.assert_close(last, fixed.forward_stages(x)[-1], rtol=0, atol=1e-6)
    assert last.shape[2:] == (rows, columns)


def test_gradients_reach_the_table(vit):
    vit(torch.randn(1, 3, 96, 96)).sum().backward()
    assert vit.body.pos_embed.grad.abs().sum() > 0
    vit.zero_grad()


@pytest.mark.parametrize(
    "options", [{"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": True}, {"class_token": False}]
)
def test_tokens_before_the_patches_are_not_resampled(options):
    """timm's code runs at the table's own size, ours at another: a table of equal rows must give equal tokens."""
    if "class_token" in options:
        options = {**options, "global_pool": "avg"}
    body = backbones.build(Backbone("test_vit", options={"img_size": 64, **options})).eval().body
    prefix = body.pos_embed.shape[1] - 16
    body.pos_embed.data[:, prefix:] = body.pos_embed.data[:, prefix : prefix + 1].clone()
    patches = torch.randn(2, 1, 1, body.embed_dim)
    own, other = (body._pos_embed(patches.expand(2, side, side, -1)) for side in (4, 6))
    tokens = body.num_prefix_tokens
    torch.testing.assert_close(own[:, : tokens + 1], other[:, : tokens + 1], rtol=0, atol=1e-5)
    assert other.shape[1] == tokens + 36 and own.shape[1] == tokens + 16


def test_fixed_tables_are_recognised():
    for first in (True, False):
        table = F.pad(positions.sincos(14, 14, 192, columns_first=first), (0, 0, 1, 0))[None]
        assert positions.is_sincos(table) and positions.is_sincos(table.half())
        assert not positions.is_sincos(table + 0.02 * torch.randn_like(table))
        assert not positions.is_sincos(table[:, 1:])
