"""Average precision against hand-computed values and VOC2007's own algorithm."""

import re
import sys

import numpy as np
import pytest
from detection_files import picture

from fastssl.eval.detection.average_precision import average_precision


def test_average_precision_equals_a_count_by_hand():
    """One object found exactly, nothing found, the other with an IoU of 0.62: precision 1, 1/2, 2/3."""
    truth = [picture((1, (0, 0, 100, 100))), picture((1, (0, 0, 100, 100)))]
    found = np.array([[0, 1, 0.9, 0, 0, 100, 100], [0, 1, 0.8, 200, 0, 250, 50], [1, 1, 0.7, 0, 0, 62, 100]])
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101  # of 101 recalls 51 are at most 1/2
    ours = average_precision(truth, 2, found)
    assert ours["ap50"] == pytest.approx(100 * both) and ours["ap75"] == pytest.approx(100 * one)
    assert ours["ap"] == pytest.approx(10 * (3 * both + 7 * one))
    eleven = average_precision(truth, 2, found, eleven=True)
    assert eleven["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    # detections of a difficult object or in a crowd are neither right nor wrong
    truth[0].add("x", (200, 0, 250, 50), 1, difficult=True)
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    truth[0].difficult[1] = False
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    truth[0].boxes[1], truth[0].crowd[1] = (150, 0, 300, 300), True
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    assert average_precision(truth, 2, found[:0]) == {"ap": 0, "ap50": 0, "ap75": 0}
    with pytest.raises(ValueError, match="no object to find"):
        average_precision([picture()], 2, found[:1])


def voc07(truth, label, found, threshold):
    """The development kit's VOCevaldet: every detection is compared with its nearest object alone."""

    def iou(a, b):
        return (w := max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))) / (
            (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w
        )

    own = {(i, k) for i, p in enumerate(truth) for k, n in enumerate(p.labels) if n == label}
    taken, right = set(), []
    for row in sorted((row for row in found.tolist() if row[1] == label), key=lambda row: -row[2]):
        near = [(iou(row[3:], truth[int(row[0])].boxes[k]), i, k) for i, k in own if i == row[0]]
        best, *place = max(near, default=(0, None, None))
        if best >= threshold and truth[place[0]].difficult[place[1]]:
            continue
        right.append(best >= threshold and tuple(place) not in taken)
        taken.add(tuple(place) if best >= threshold else None)
    right = np.array(right)
    recall = right.cumsum() / sum(not truth[i].difficult[k] for i, k in own)
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    return np.mean([max(precision[recall >= t], default=0) for t in np.linspace(0, 1, 11)])


def test_eleven_points_are_voc2007s():
    """Objects apart from one another, so that the nearest is the one that COCO's matching takes, too."""
    rng = np.random.default_rng(0)
    truth, found = [], []
    for i in range(40):
        corners = [(100 * k, 0) for k in range(4)]
        objects = [
            (int(rng.integers(1, 4)), (x, y, x + 60, y + 60), "difficult" * (rng.random() < 0.2)) for x, y in corners
        ]
        truth.append(picture(*objects))
        for label, (x0, y0, x1, y1), _ in objects:
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 5, 4)
                guess = label if rng.random() < 0.8 else int(rng.integers(1, 4))
                found.append([i, guess, rng.random(), x0 + shift[0], y0 + shift[1], x1 + shift[2], y1 + shift[3]])
    found = np.array(found)
    ours = average_precision(truth, 3, found, eleven=True)
    for key, threshold in (("ap50", 0.5), ("ap75", 0.75)):
        want = 100 * np.mean([voc07(truth, label, found, threshold) for label in (1, 2, 3)])
        assert 5 < want < 90 and ours[key] == pytest.approx(want)


def test_missing_pycocotools_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fastssl[detection]'")):
        average_precision([picture((1, (0, 0, 9, 9)))], 1, np.zeros((0, 7)))
