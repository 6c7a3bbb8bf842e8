"""The model card of a Hugging Face folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastssl import files
from fastssl.weights.export.common import image_size, normalization

CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- self-supervised-learning
---
# {title}

A backbone without a classifier; its outputs are pooled features.
{training}
Written by fastssl {version}. SHA-256 of model.safetensors: `{digest}`.

## How to use it

Images are normalised by mean {mean} and standard deviation {std}.

```python
import timm

net = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:OWNER/NAME"
features = net.eval()(images)
```

Licence and accuracy: not stated.
"""


def model_card(weights: Path, name: str, run: dict | None) -> str:
    """The text of a card: what the file `weights` holds, how it was trained and how to load it."""
    title, training = name, ""
    if run:
        method = run["method"]["type"].split(".")[-2]
        title = f"{name}, {method}"
        rows = {"method": method} | {f"method.{k}": v for k, v in run["method"].items() if k != "type"}
        length = "steps" if run["optim"].get("steps") else "epochs"  # optim.steps replaces optim.epochs
        rows |= {
            f"optim.{k}": run["optim"][k]
            for k in ("name", "lr", "batch", length, "weight_decay", "schedule", "precision")
        }
        if run.get("steps_done") is not None:
            rows |= {"steps made": run["steps_done"]}
        rows |= {"image size": image_size(run), "data": Path(run["data"]["train"]).name, "seed": run["seed"]}
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        training = f"\n## How it was trained\n\n| | |\n|---|---|\n{table}\n"
    mean, std = normalization(run)
    digest = files.sha256(weights)
    return CARD.format(
        title=title, training=training, version=version("fastssl"), digest=digest, mean=list(mean), std=list(std)
    )
