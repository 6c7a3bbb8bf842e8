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
from fastssl.methods.parts.views import Contrastive, TwoViews, WithMomentumEncoder, WithPredictor, encode, multi_crop
