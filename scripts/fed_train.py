"""Train a federated dual-adapter recommender, evaluate it, and leave a run folder."""

import argparse

from _cli import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", default=None, help="YAML file (default: configs/quickstart.yaml)"
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. federation.num_rounds=20; takes several, may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run of that name")
    parser.add_argument(
        "--from-round",
        type=int,
        metavar="N",
        help="with --resume: go back to the kept commit of round N first; later rounds are lost",
    )
    arguments = parser.parse_args()
    if arguments.from_round is not None and not arguments.resume:
        parser.error("--from-round goes with --resume")
    run_safely(train, arguments)


def train(arguments: argparse.Namespace) -> None:
    from _cli import default_config, is_main_process

    from pfm_llm.config.schema import load_config
    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import terminal_table
    from pfm_llm.runs.experiment import run_experiment
    from pfm_llm.runs.folders import RESULTS_FILE

    config = load_config(arguments.config or default_config(), arguments.set)
    run = run_experiment(config, resume=arguments.resume, from_round=arguments.from_round)
    if is_main_process():
        rows, _ = read_results(run / RESULTS_FILE)
        print(f"\n{terminal_table(rows)}\nrun folder: {run}")


if __name__ == "__main__":
    main()
