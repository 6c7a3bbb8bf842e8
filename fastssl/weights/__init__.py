"""Weights: reading those of our runs and of other projects, and writing them for other tools."""

from fastssl.weights.load import LoadReport, check_pretrained_kept, load_backbone
from fastssl.weights.source import has_sobel, metadata, read, run_config, spec_of
