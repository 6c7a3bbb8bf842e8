"""One file per method.  `fastssl methods` lists them; a config chooses one by its Config,
`method=simclr.Config(...)`."""

from __future__ import annotations

import importlib
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.parsing import Parser

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {
    "pretext task": "relative_loc rotation",
    "clustering": "deepcluster odc deepclusterv2 swav",
    "instance discrimination": "npid moco simclr dcl nnclr densecl mocov3",
    "prediction of a target network": "byol simsiam dino",
    "statistics of the embeddings": "barlow vicreg lejepa",
    "masked images": "mae",
    "labels": "supcon supervised",
}


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "parts")


def state(method: nn.Module) -> list[str]:
    """Names in the checkpoint of what the method keeps beside trained weights: momentum encoders and buffers."""
    buffers = {re.sub(r"_?\d+$", "", name) for name, _ in method.named_buffers(recurse=False)}
    encoders = {
        name
        for name, child in method.named_children()
        if any(True for _ in child.parameters()) and not any(p.requires_grad for p in child.parameters())
    }
    return sorted(encoders) + sorted(buffers)


def describe(name: str) -> str:
    """Title, paper, views, state, settings and configs of a method, from its file and its configs."""
    from fastssl import config, plan  # seconds: torchvision

    module = importlib.import_module(f"{__name__}.{name}")
    about = module.__doc__ or ""
    folder = config.quickstart().parent
    run = config.load(folder / "smoke" / f"{name}.py")
    built = plan.build_method(run, 50_000, "meta")
    lines = {
        "": re.sub(r"\s*https?://\S+", "", about.split("\n\n")[0]).replace("\n", " ").strip(),
        "paper": " ".join(re.findall(r"https?://\S+", about)),
        "views": "any number" if built.views is None else str(built.views),
        "state": ", ".join(state(built)) or "none",
        "settings": ", ".join(f"{key}={value!r}" for key, value in vars(module.Config()).items()),
        "configs": " ".join(
            f"configs/{Path(file).relative_to(folder)}"
            for file in [*sorted(folder.glob(f"{name}/*.py")), folder / "smoke" / f"{name}.py"]
        ),
    }
    return "\n".join(
        textwrap.fill(
            f"{key:9}{text}".strip() if key else text,
            118,
            initial_indent="    ",
            subsequent_indent=" " * (13 if key else 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for key, text in lines.items()
    )


def main(argv: list[str] | None = None) -> int:
    """List all methods by family, with a description of each."""
    Parser("fastssl methods", description="List the methods.").parse_args(argv)
    for family, members in FAMILIES.items():
        print(f"{family}\n")
        for name in members.split():
            print(f"  {name}\n{describe(name)}\n")
    return 0
