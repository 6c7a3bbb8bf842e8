"""Convolutions in channels-last memory format."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weight is a contiguous (O, H, W, I) Parameter, used through a channels_last (O, I, H, W) view.

    This is the layout that cuDNN and oneDNN prefer, while DeepSpeed 0.19.8 fails for parameters that are not
    contiguous.  The state dict has the usual (O, I, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"]
        if weight.ndim == 4:  # under ZeRO-3, an ungathered parameter is an empty tensor
            destination[prefix + "weight"] = weight.permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.ndim == 4:
            state_dict = {**state_dict, prefix + "weight": weight.permute(0, 2, 3, 1).contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def channels_last_(module: nn.Module) -> nn.Module:
    """Convert every nn.Conv2d of `module` to `Conv2d`, in place; the Parameter objects and their names stay.

    Call it after initialisation and before wrapping.  Subclasses of nn.Conv2d (such as timm's weight standardisation)
    are not converted; they are slower.
    """
    for m in module.modules():
        if type(m) is nn.Conv2d:
            m.weight.data = m.weight.data.permute(0, 2, 3, 1).contiguous()
            m.__class__ = Conv2d
    return module
