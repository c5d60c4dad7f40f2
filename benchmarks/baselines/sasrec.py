"""Train SASRec on the pooled training data, and measure it as our runs are measured.

The epoch, and with --grid the setting, is the one with the best NDCG@10 on validation. The
equations are in sasrec_model.py. A run takes minutes: one that was killed is started again.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.baselines.measuring import Train


def trainer(arguments: argparse.Namespace) -> "Train":
    from benchmarks.baselines.sasrec_training import GRID, train

    return functools.partial(train, settings=GRID if arguments.grid else GRID[:1])


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # so that `benchmarks` is a package
    from benchmarks.baselines import cli

    cli.main(cli.make_parser(__doc__), trainer)
