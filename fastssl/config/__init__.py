"""The config of a run: dataclasses (sections), config files and overrides (loading), checks, and JSON (serialize)."""

from fastssl.config.bounds import Count, Fraction, NonNegative, Positive, PositiveInt
from fastssl.config.checks import validate
from fastssl.config.loading import check, load, quickstart, run_name, set_override
from fastssl.config.sections import STEMS, Backbone, Data, Log, Optim, Precision, Run, Speed
from fastssl.config.serialize import dump, with_defaults
