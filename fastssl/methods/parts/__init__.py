"""Parts that several methods use.  A method imports this package and calls `parts.mlp`, `parts.ema_`, ...

Shapes: n samples of this rank, V views, D features, K prototypes.
"""

from fastssl.methods.parts.heads import (
    Prototypes,
    fixed_positions_,
    kaiming_,
    mlp,
    projector,
    random_directions,
    vision_transformer,
)
from fastssl.methods.parts.losses import mean_cosine, off_diagonal, require_labels, standardize, view_classification
from fastssl.methods.parts.momentum import (
    Shuffle,
    assign_,
    check_bank_momentum,
    check_queue,
    check_shuffle,
    cosine,
    disable_drop_path_,
    ema_,
    frozen_copy,
)
from fastssl.methods.parts.two_views import Contrastive, TwoViews, WithMomentumEncoder, WithPredictor
from fastssl.methods.parts.views import encode, multi_crop

__all__ = [
    "Contrastive",
    "Prototypes",
    "Shuffle",
    "TwoViews",
    "WithMomentumEncoder",
    "WithPredictor",
    "assign_",
    "check_bank_momentum",
    "check_queue",
    "check_shuffle",
    "cosine",
    "disable_drop_path_",
    "ema_",
    "encode",
    "fixed_positions_",
    "frozen_copy",
    "kaiming_",
    "mean_cosine",
    "mlp",
    "multi_crop",
    "off_diagonal",
    "projector",
    "random_directions",
    "require_labels",
    "standardize",
    "view_classification",
    "vision_transformer",
]
