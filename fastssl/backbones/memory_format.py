"""Convolutions in channels-last memory format."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """nn.Conv2d that stores its weight as a contiguous (O, H, W, I) Parameter and convolves with a channels_last view.

    DeepSpeed 0.19.8 crashes on parameters whose memory is not contiguous; cuDNN and oneDNN want this layout.  Its
    state dict holds the ordinary (O, I, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"]
        if weight.ndim == 4:  # ZeRO-3 leaves an empty placeholder outside its gathering context
            destination[prefix + "weight"] = weight.permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.ndim == 4:
            state_dict = {**state_dict, prefix + "weight": weight.permute(0, 2, 3, 1).contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def channels_last_(module: nn.Module) -> nn.Module:
    """Turn every plain nn.Conv2d of `module` into `Conv2d` above, in place; Parameters keep name and identity.

    Call it after initialisation and before wrapping.  Subclasses of nn.Conv2d (timm's weight standardisation) keep
    their own layout, which is slower and equally right.
    """
    for m in module.modules():
        if type(m) is nn.Conv2d:
            m.weight.data = m.weight.data.permute(0, 2, 3, 1).contiguous()
            m.__class__ = Conv2d
    return module
