"""Train eSASRec on the pooled training data, and measure it as our runs are measured.

The epoch, and with --grid the setting, is the one with the best NDCG@10 on validation, among as
many trials as SASRec has. The equations are in esasrec_model.py. A run takes minutes: one that was
killed is started again.
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

    arguments = make_parser(__doc__).parse_args()
    run_safely(functools.partial(run, arguments), "interrupted; start it again")


def run(arguments: argparse.Namespace) -> None:
    from benchmarks.baselines import measuring
    from benchmarks.baselines.esasrec_model import GRID, METHOD, ESasRec
    from benchmarks.baselines.sasrec_training import train

    settings = GRID if arguments.grid else GRID[:1]
    how = functools.partial(train, settings=settings, method=METHOD, network=ESasRec)
    print(measuring.run(arguments, how))


if __name__ == "__main__":
    main()
