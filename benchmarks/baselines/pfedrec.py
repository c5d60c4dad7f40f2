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

if __name__ == "__main__":  # so that `benchmarks` is a package however this is started
    sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    from benchmarks.baselines.cli import make_parser
    from pfm_llm.cli.start import run_safely

    parser = make_parser(__doc__)
    parser.add_argument(
        "--negatives", choices=("honest", "published"), default="honest", help="see above"
    )
    arguments = parser.parse_args()
    run_safely(functools.partial(run, arguments), "interrupted; start it again")


def run(arguments: argparse.Namespace) -> None:
    from benchmarks.baselines import measuring
    from benchmarks.baselines.pfedrec_training import GRID, Negatives, train

    settings = GRID if arguments.grid else GRID[:1]
    negatives = Negatives(arguments.negatives)
    how = functools.partial(train, settings=settings, negatives=negatives)
    print(measuring.run(arguments, how))


if __name__ == "__main__":
    main()
