"""Average precision of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from fastssl.eval.detection.data import Picture


def average_precision(
    pictures: list[Picture], classes: int, found: np.ndarray, eleven: bool = False
) -> dict[str, float]:
    """{"ap", "ap50", "ap75"} in percent by pycocotools: the mean over IoU 0.5 to 0.95, at 0.5 and at 0.75.

    `found`: (n, 7) rows of picture (from 0), label, score, x0, y0, x1, y1; the best 100 of each picture and class
    count.  `eleven`: precision at 11 recalls instead of 101, VOC2007's measure.  Difficult objects are not counted;
    detections of them are neither right nor wrong.
    """
    COCOeval: Any
    COCO: Any
    COCOeval, COCO = import_pycocotools()

    class Evaluation(COCOeval):
        """Difficult objects are crowds, which any number of detections may match, but with the IoU of plain objects."""

        def computeIoU(self, *key: int) -> Any:
            crowds = [(g, g["iscrowd"]) for g in self._gts[key]]
            for g, crowd in crowds:
                g["iscrowd"] = int(crowd and not g["difficult"])
            out = super().computeIoU(*key)
            for g, crowd in crowds:
                g["iscrowd"] = crowd
            return out

    truth = COCO()
    objects = [(i, p, k) for i, p in enumerate(pictures) for k in range(len(p.boxes))]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(pictures))],
        "categories": [{"id": c + 1} for c in range(classes)],
        "annotations": [
            {
                "id": n,
                "image_id": i,
                "category_id": p.labels[k],
                "bbox": _xywh(np.array(p.boxes[k])).tolist(),
                "area": p.areas[k],
                "iscrowd": int(p.crowd[k] or p.difficult[k]),
                "difficult": p.difficult[k],
            }
            for n, (i, p, k) in enumerate(objects, 1)
        ],
    }
    rows = np.column_stack([found[:, 0], _xywh(found[:, 3:]), found[:, 2], found[:, 1]])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth.createIndex()
        detected = truth.loadRes(rows) if len(rows) else COCO()
        run = Evaluation(truth, detected, "bbox")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        if eleven:
            run.params.recThrs = np.linspace(0, 1, 11)
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # IoU, recall, class; -1 where a class has no object
    precision = precision[:, :, (precision > -1).all((0, 1))]
    if not precision.size:
        raise ValueError("the test images have no object to find")
    per_iou = 100 * precision.mean((1, 2))
    return {"ap": float(per_iou.mean()), "ap50": float(per_iou[0]), "ap75": float(per_iou[5])}


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def import_pycocotools() -> tuple[Any, Any]:
    """COCOeval and COCO."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError("average precision needs pycocotools: pip install 'fastssl[detection]'") from None
    return COCOeval, COCO
