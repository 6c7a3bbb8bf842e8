"""A linear classifier on frozen features: our probe on cached features (probe.py), or with --recipe the published
protocols, which train on augmented images (published.py).
"""

from __future__ import annotations

import argparse

from fastssl.eval.common.target import EvalTarget
from fastssl.eval.linear.probe import ProbeOptions, linear_probe
from fastssl.eval.linear.published import train_and_test
from fastssl.eval.linear.recipes import RECIPES

NEEDS = ("train", "test")


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    if args.recipe == "probe":
        if args.layers or args.no_augment:
            raise ValueError(
                f"--{'layers' if args.layers else 'no-augment'} is for the published recipes: give "
                f"--recipe, one of {', '.join(RECIPES)}"
            )
        if args.solver == "lbfgs" and args.probe_batch is not None:
            raise ValueError(f"--probe-batch {args.probe_batch} is for --solver sgd: lbfgs sees all rows at once")
        given = {"solver": args.solver, "epochs": args.epochs, "batch": args.probe_batch, "held_out": args.held_out}
        given = {name: value for name, value in given.items() if value is not None}
        options = ProbeOptions(grid=args.grid, seed=args.seed, **given)
        return linear_probe(*target.features(target.train), *target.features(target.test), options)
    if args.solver:
        raise ValueError(f"--solver is the probe's: leave it out with --recipe {args.recipe}")
    return train_and_test(
        target,
        args.recipe,
        rates=args.grid,
        epochs=args.epochs,
        batch=args.probe_batch,
        layers=args.layers,
        held_out=args.held_out or 0.0,
        augment=not args.no_augment,
    )
