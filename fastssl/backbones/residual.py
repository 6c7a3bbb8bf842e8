"""The residual stream of vision transformers in the 16-bit dtype of autocast.

Under autocast PyTorch adds the float32 position embeddings to 16-bit patches, which gives a float32 stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TRANSFORMER = "timm.models.vision_transformer"
# Not ParallelThingsBlock, whose branches are summed by torch.sum, which autocast computes in float32.
BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock")


def use_autocast_dtype_(method: nn.Module, name: str) -> None:
    """Cast the input of every block of timm's vision transformers in `method`, and what its branches add to it, to the
    dtype of autocast where that is enabled.  Norms compute their statistics in float32 as before.

    ValueError if there is no such block.  `name`: of the backbone, for the message."""
    blocks = [m for m in method.modules() if type(m).__name__ in BLOCKS and type(m).__module__ == TRANSFORMER]
    if not blocks:
        raise ValueError(
            f"optim.residual_in_fp32=False: {name!r} is not a vision transformer with timm's {', '.join(BLOCKS)}; use "
            "one, such as 'vit_small_patch16_224', or leave optim.residual_in_fp32=True"
        )
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: (_cast(args[0]), *args[1:]))
        for path, branch in block.named_modules():
            if path.rpartition(".")[2].startswith("drop_path"):  # the last module of every branch
                branch.register_forward_hook(lambda module, args, output: _cast(output))


def _cast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
