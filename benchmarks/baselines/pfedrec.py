"""Train PFedRec, one user per client, and measure it as our runs are measured.

The round, and with --grid the rate of the item embeddings, is the one with the best NDCG@10 on
validation. The equations are in pfedrec_model.py. With --negatives published the training
negatives exclude held-out items, as in the published code: these rows leak and are named so.
A run takes minutes: one that was killed is started again.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.baselines.measuring import Train


def trainer(arguments: argparse.Namespace) -> "Train":
    from benchmarks.baselines.pfedrec_training import GRID, Negatives, train

    settings = GRID if arguments.grid else GRID[:1]
    return functools.partial(train, settings=settings, negatives=Negatives(arguments.negatives))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # so that `benchmarks` is a package
    from benchmarks.baselines import cli

    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--negatives", choices=("honest", "published"), default="honest", help="see above"
    )
    cli.main(parser, trainer)
