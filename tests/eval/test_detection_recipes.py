"""The recipes for detectron2 are the published ones, and its network gets the norm behind res5."""

import ast
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fastssl.weights.export.common import MEAN, STD

ROOT = Path(__file__).parents[2]


def recipe(name):
    """A recipe over its base as detectron2 merges them; tuples are written as it reads them, by literal_eval."""
    own = yaml.safe_load((ROOT / "configs/detection" / f"{name}.yaml").read_text())

    def merge(a, b):
        return {
            k: merge(a.get(k, {}), b.get(k, {})) if isinstance(b.get(k, a.get(k)), dict) else b.get(k, a.get(k))
            for k in a | b
        }

    def literal(v):
        return (
            {k: literal(x) for k, x in v.items()}
            if isinstance(v, dict)
            else (ast.literal_eval(v) if isinstance(v, str) and v.startswith("(") else v)
        )

    own = literal(own)
    return merge(recipe(own.pop("_BASE_").removesuffix(".yaml")), own) if "_BASE_" in own else own


RECIPES = {  # OpenSelfSup's: steps, milestones, short sides from, mask, head
    "pascal_voc_R_50_C4_24k": (24000, (18000, 22000), 480, False, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_C4_1x": (90000, (60000, 80000), 640, True, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_C4_2x": (180000, (120000, 160000), 640, True, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_FPN_1x": (90000, (60000, 80000), 640, True, "StandardROIHeads"),
    "coco_R_50_FPN_2x": (180000, (120000, 160000), 640, True, "StandardROIHeads"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    steps, milestones, short, mask, heads = RECIPES[name]
    cfg = recipe(name)
    model, solver, source = cfg["MODEL"], cfg["SOLVER"], cfg["INPUT"]
    assert (solver["MAX_ITER"], solver["STEPS"], solver["IMS_PER_BATCH"], solver["BASE_LR"]) == (
        steps,
        milestones,
        16,
        0.02,
    )
    assert source["MIN_SIZE_TRAIN"] == tuple(range(short, 801, 32)) and source["MIN_SIZE_TEST"] == 800
    assert model["MASK_ON"] is mask and model["ROI_HEADS"]["NAME"] == heads and model["BACKBONE"]["FREEZE_AT"] == 0
    assert source["FORMAT"] == "RGB" and cfg["TEST"]["PRECISE_BN"]["ENABLED"] is True
    assert (model["RESNETS"]["NORM"], model["RESNETS"]["STRIDE_IN_1X1"]) == ("SyncBN", False)
    for key, values in (("PIXEL_MEAN", MEAN), ("PIXEL_STD", STD)):
        assert np.allclose(np.array(model[key]) / 255, values)
    if "voc" in name:
        assert cfg["DATASETS"] == {"TRAIN": ("voc_2007_trainval", "voc_2012_trainval"), "TEST": ("voc_2007_test",)}
        assert solver["WARMUP_ITERS"] == 100 and model["ROI_HEADS"]["NUM_CLASSES"] == 20
    else:
        assert cfg["DATASETS"] == {"TRAIN": ("coco_2017_train",), "TEST": ("coco_2017_val",)}
    if "FPN" in name:
        assert model["FPN"]["NORM"] == "SyncBN" and model["BACKBONE"]["NAME"] == "build_resnet_fpn_backbone"


def test_every_recipe_is_tested():
    files = {f.stem for f in (ROOT / "configs/detection").glob("*.yaml")}
    assert files == {*RECIPES, "Base-RCNN-C4-BN", "Base-RCNN-FPN-BN"}


def test_the_c4_recipe_has_a_norm_behind_res5(monkeypatch):
    """tools/detectron2_train.py over stand-ins of the names that it imports: detectron2 is in no package index."""
    registered = {}

    class Res5ROIHeads(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.res5 = nn.Sequential(nn.Conv2d(4, 6, 1))

    class Registry:
        def register(self):
            return lambda kind: registered.setdefault(kind.__name__, kind)

    known = {
        "checkpoint": ["DetectionCheckpointer"],
        "config": ["CfgNode", "get_cfg"],
        "evaluation": ["COCOEvaluator", "DatasetEvaluator", "PascalVOCDetectionEvaluator"],
        "layers": ["ShapeSpec", "get_norm"],
        "modeling.roi_heads": ["ROI_HEADS_REGISTRY", "Res5ROIHeads"],
        "engine": ["DefaultTrainer", "default_argument_parser", "default_setup", "launch"],
        "": [],
        "modeling": [],
    }
    given = {
        "get_norm": lambda norm, channels: {"SyncBN": nn.BatchNorm2d}[norm](channels),
        "Res5ROIHeads": Res5ROIHeads,
        "ROI_HEADS_REGISTRY": Registry(),
        "DefaultTrainer": object,
    }
    for name, members in known.items():
        module = types.ModuleType(f"detectron2.{name}".rstrip("."))
        vars(module).update({member: given.get(member) for member in members})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runpy.run_path(str(ROOT / "tools/detectron2_train.py"))
    cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(RESNETS=types.SimpleNamespace(NORM="SyncBN")))
    heads = registered["Res5ROIHeadsExtraNorm"](cfg, None)
    assert list(dict(heads.res5.named_children())) == ["0", "norm"]
    assert heads.res5(torch.randn(2, 4, 3, 3)).mean((0, 2, 3)).abs().max() < 1e-5
