"""`fastssl replay CONFIG`: makes the step again in which a loss, a gradient or a weight of a run was not finite.

The step and its batch are in RUN/nonfinite.  Other settings may be given to see whether the step is finite with them,
such as `optim.precision=fp32`; the state of the method must fit.
"""

from __future__ import annotations

import argparse

from fastssl import config, train
from fastssl.parsing import Parser


def parser() -> argparse.ArgumentParser:
    p = Parser("fastssl replay", description=__doc__.splitlines()[0])
    p.add_argument("config", help="the config file of the run")
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the file")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)

    def work() -> None:
        run = config.load(args.config, args.overrides)
        train.choose_accelerator(args.device)
        from fastssl import dist, engine, nonfinite

        dist.print_main(nonfinite.replay(engine.build_plain(run, args.device), engine.batches))

    return train.guarded(work)


if __name__ == "__main__":
    raise SystemExit(main())
