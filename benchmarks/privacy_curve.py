"""Measure what differential privacy of users costs at ε of infinity, 16, 8 and 4.

What is learned of an item is a row of its own (``rows``), vectors that items share (``codes``), or
nothing but a bias (``text``: an item is what its public text says, and few numbers are learned).
For each of these and each ε, runs differ in their plan: cohort, rounds and learning rates. With a
cohort of all users each takes part in every round; a smaller one is a Poisson sample (a slice of a
pass where there is no noise). Validation chooses among plans by NDCG@10; the last film of each
user, the test split, is measured once, for the chosen ones alone. ε of infinity is the same
federation, with the same bound and no noise.

The method is pfm_embedding without the language model's pass over histories: fewer numbers, so less
noise. The model's reading of the items stays.

``kept`` compares with ε of infinity of the same table: the share of its NDCG@10, and of what its
mean log rank gains over popularity.

    pip install -c constraints-dp.txt -e ".[dp]"
    python benchmarks/privacy_curve.py --tables text
"""

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.base.processes import Processes
    from pfm_llm.config.schema import ExperimentConfig
    from pfm_llm.data.splits import HeldOut
    from pfm_llm.evaluation.ranking import Ranks
    from pfm_llm.runs.run import Corpus, Run, Trained
    from pfm_llm.server.privacy.mechanism import Spent

TABLES = {
    "rows": ["head.item_ids=both", "head.id_dim=16", "adapters.private.taste.read_rank=16"],
    "codes": [
        "head.item_ids=codes", "head.id_dim=16", "adapters.private.taste.read_rank=16",
        "head.codes.hash_size=256", "head.codes.text_size=64",
    ],
    "text": ["head.item_ids=none"],
}  # fmt: skip
"""Name of what is learned of items to its settings; sizes are small, since noise is on each."""
COMMON = ("method=pfm_embedding", "ablation=no_pass", "head.dim=64")
PLANS = ("64x60@4", "256x24@8", "943x8@20")
NDCG, BOTH = "ndcg@10", "shared_private"


@dataclass(frozen=True)
class Plan:
    """The rounds of a training.

    Attributes:
        cohort_size: Clients of a round.
        rounds: Number of rounds.
        scale: Factor on the server's learning rates.
    """

    cohort_size: int
    rounds: int
    scale: float

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """A plan that is written as COHORTxROUNDS@SCALE."""
        sizes, _, scale = text.partition("@")
        cohort_size, _, rounds = sizes.partition("x")
        return cls(int(cohort_size), int(rounds), float(scale))

    def __str__(self) -> str:
        return f"{self.cohort_size}x{self.rounds}@{self.scale:g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="ml100k", help="a shipped config, or a file")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[math.inf, 16.0, 8.0, 4.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument(
        "--plans", nargs="+", type=Plan.parse, default=[Plan.parse(text) for text in PLANS],
        metavar="COHORTxROUNDS@SCALE", help="scale: of the server's learning rates",
    )  # fmt: skip
    parser.add_argument("--norm", type=float, default=0.3, help="bound of an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-test", action="store_true", help="choose, and leave test alone")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: results/privacy/<tables>.json")
    arguments = parser.parse_args()
    default = ROOT / "results" / "privacy" / f"{'-'.join(arguments.tables)}.json"
    arguments.out = arguments.out or default
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        table: A key of `TABLES`.
        epsilon: ε of the whole run; infinity: no noise.
        plan: Its rounds.
        participation: Who takes part, as in ``federation.privacy``.
    """

    table: str
    epsilon: float
    plan: Plan
    participation: str


@dataclass
class Outcome:
    """What became of a trial.

    Attributes:
        trial: The trial.
        run: Its run.
        trained: Its shared state.
        spent: What it has spent; None without noise.
        validation: Figures on validation, over all users.
        seconds: Of training, from the clock.
        cpu_seconds: Of training, of this process.
        test: Figures on test, if it was chosen.
    """

    trial: Trial
    run: "Run"
    trained: "Trained"
    spent: "Spent | None"
    validation: Mapping[str, Any]
    seconds: float
    cpu_seconds: float
    test: Mapping[str, Any] | None = None


def trials_of(arguments: argparse.Namespace, num_users: int) -> Iterator[Trial]:
    """All trials."""
    from pfm_llm.config.choices import Participation

    for table, epsilon, plan in itertools.product(
        arguments.tables, arguments.epsilons, arguments.plans
    ):
        is_sample = math.isfinite(epsilon) and plan.cohort_size < num_users
        chosen = Participation.POISSON if is_sample else Participation.PASSES
        yield Trial(table, epsilon, plan, chosen.value)


def run(arguments: argparse.Namespace) -> None:
    """Train all trials, choose, measure test once, write the result and print it."""
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.environment import environment
    from pfm_llm.runs.run import load_corpus

    processes = start_processes(arguments.threads)
    config = load_config(find_config(arguments.config), arguments.overrides)
    data = load_corpus(config)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for number, trial in enumerate(trials_of(arguments, data.interactions.num_users)):
            given = config_of(trial, arguments, Path(folder) / str(number))
            outcomes.append(train(trial, given, data, processes))
            print(told(outcomes[-1]), flush=True)
        chosen = chosen_of(outcomes)
        if not arguments.no_test:
            measure_test(chosen, arguments.out)
        first = outcomes[0].run
        result = {
            "popularity": popularity(first, with_test=not arguments.no_test),
            "rows": [row_of(one, any(one is other for other in chosen)) for one in outcomes],
            "arguments": {k: printable(v) for k, v in vars(arguments).items() if k != "out"},
            "environment": environment(
                seed=arguments.seed,
                dtype=str(first.model.backbone.dtype).removeprefix("torch."),
                threads=processes.threads,
                num_processes=processes.count,
                device=processes.device.type,
            ),
            "config": {one.trial.table: plain_config(one.run.config) for one in chosen},
        }
    result["kept"] = kept_of(result)
    files.write_json(arguments.out, result)
    print(table(result))


def config_of(trial: Trial, arguments: argparse.Namespace, folder: Path) -> "ExperimentConfig":
    """The experiment of a trial."""
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config

    settings = [
        f"seed={arguments.seed}",
        *COMMON,
        *TABLES[trial.table],
        "head.item_met=false",
        "head.item_dropout=0",
        f"federation.cohort_size={trial.plan.cohort_size}",
        f"federation.num_rounds={trial.plan.rounds}",
        f"federation.server.lr_scale={trial.plan.scale}",
        f"federation.stages=[{{clip: {{norm: {arguments.norm}}}}}]",
        "evaluation.every=0",
        "evaluation.max_users=null",
        "evaluation.baselines=[popularity]",
        f"output.dir={folder}",
    ]
    if math.isfinite(trial.epsilon):
        settings += [
            f"federation.privacy.epsilon={trial.epsilon}",
            f"federation.privacy.delta={arguments.delta:.12f}",
            f"federation.privacy.participation={trial.participation}",
        ]
    return load_config(find_config(arguments.config), [*settings, *arguments.overrides])


def train(
    trial: Trial, config: "ExperimentConfig", data: "Corpus", processes: "Processes"
) -> Outcome:
    """Train a trial and measure it on validation."""
    from pfm_llm.federation.privacy import spent_of
    from pfm_llm.federation.rounds import run_rounds
    from pfm_llm.runs.experiment import make_federation
    from pfm_llm.runs.folders import RunFolders
    from pfm_llm.runs.run import assemble, settled

    folders = RunFolders.of(Path(config.output.dir) / config.name)
    own = assemble(settled(config, data), data, folders, processes)
    federation = make_federation(own)
    started, cpu_started = time.perf_counter(), time.process_time()
    run_rounds(federation, 1, lambda: {})
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    trained = own.as_set(federation.server.shared)
    spent = spent_of(federation.server, federation.checkpoints)
    validation = figures_of(own, trained, data.split.validation)
    return Outcome(trial, own, trained, spent, validation, seconds, cpu_seconds)


def figures_of(run: "Run", trained: "Trained", held_out: "HeldOut") -> dict[str, Any]:
    """NDCG@10 and mean log rank of the shared part, and of it with the private one."""
    from pfm_llm.protocol.types import Mode
    from pfm_llm.runs.measuring import evaluation_task, measure

    modes = [Mode.SHARED_ONLY, Mode.SHARED_PRIVATE]
    measured = measure(run, evaluation_task(run, trained, held_out, modes))
    return {mode.value: figures(ranks) for mode, ranks in measured.ranks.items()}


def figures(ranks: "Ranks") -> dict[str, float]:
    """NDCG@10 and the mean of the logarithm of the rank, over users."""
    from pfm_llm.evaluation.personality.estimates import user_quality
    from pfm_llm.evaluation.ranking import headline

    log_rank = -user_quality("log_rank", ranks.full, ranks.users, 10).mean()
    return {NDCG: headline(ranks, 10)[NDCG], "log_rank": float(log_rank)}


def chosen_of(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each table and ε the trial that is best on validation."""
    best: dict[tuple[str, float], Outcome] = {}
    for one in outcomes:
        key = (one.trial.table, one.trial.epsilon)
        if key not in best or quality(one) > quality(best[key]):
            best[key] = one
    return list(best.values())


def quality(outcome: Outcome) -> float:
    """NDCG@10 on validation."""
    return outcome.validation[BOTH][NDCG]


def measure_test(chosen: Sequence[Outcome], out: Path) -> None:
    """Measure the chosen trials on test, once, and count that."""
    from pfm_llm.evaluation.openings import OPENINGS_FILE
    from pfm_llm.runs.measuring import count_test

    for one in chosen:
        count_test(one.run, out.parent / OPENINGS_FILE)
        one.test = figures_of(one.run, one.trained, one.run.data.split.test)


def popularity(run: "Run", with_test: bool) -> dict[str, dict[str, float]]:
    """The figures of popularity on each split: what needs no training."""
    from pfm_llm.runs.measuring import evaluation_task, fit_run_baselines, rank_baselines

    baselines, untrained = fit_run_baselines(run), run.as_set(run.new_server().shared)
    split = run.data.split
    return {
        held_out.name: figures(
            rank_baselines(baselines, evaluation_task(run, untrained, held_out))["popularity"]
        )
        for held_out in ([split.validation, split.test] if with_test else [split.validation])
    }


def row_of(outcome: Outcome, is_chosen: bool) -> dict[str, Any]:
    """A trial as JSON."""
    tree = dataclasses.asdict(outcome.trial) | {
        "chosen": is_chosen,
        "validation": outcome.validation,
        "test": outcome.test,
        "spent": outcome.spent and dataclasses.asdict(outcome.spent),
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
    }
    return {key: printable(value) for key, value in tree.items()}


def printable(value: Any) -> Any:
    """A value as JSON has it: infinity, which it lacks, as a word."""
    if isinstance(value, list):
        return [printable(one) for one in value]
    if isinstance(value, Plan):
        return str(value)
    return "inf" if value == math.inf else value


def plain_config(config: "ExperimentConfig") -> dict[str, Any]:
    """A config without folders of this machine."""
    tree = config.model_dump(mode="json")
    del tree["output"], tree["cache"]
    return tree


def kept_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each chosen trial keeps of the quality of its table without noise.

    Empty where ε of infinity was not among them.
    """
    split = "validation" if result["arguments"]["no_test"] else "test"
    floor = result["popularity"][split]["log_rank"]
    chosen = [row for row in result["rows"] if row["chosen"]]
    without = {row["table"]: row[split] for row in chosen if row["epsilon"] == "inf"}
    found = []
    for row in chosen:
        if row["table"] not in without:
            continue
        own, other = row[split][BOTH], without[row["table"]][BOTH]
        found.append(
            {
                "table": row["table"],
                "epsilon": row["epsilon"],
                "split": split,
                "ndcg_kept": own[NDCG] / other[NDCG],
                "log_rank_kept": (floor - own["log_rank"]) / (floor - other["log_rank"]),
            }
        )
    return found


def told(outcome: Outcome) -> str:
    """A trial in a line."""
    one, found = outcome.trial, outcome.validation[BOTH]
    noise = f"{outcome.spent.noise_multiplier:.3g}" if outcome.spent else "none"
    return (
        f"{one.table:<5} ε {one.epsilon:<4g} {one.plan!s:<10} {one.participation:<7} "
        f"noise {noise:<5} "
        f"validation {found[NDCG]:.4f}, log rank {found['log_rank']:.3f}, "
        f"{outcome.cpu_seconds:.0f} CPU s"
    )


def table(result: Mapping[str, Any]) -> str:
    """The chosen trials as lines of text."""
    kept = {(one["table"], one["epsilon"]): one for one in result["kept"]}
    lines = [f"{'table':<6} {'ε':>5} {'NDCG@10':>8} {'log rank':>9} {'kept':>7} {'kept':>7}"]
    for row in result["rows"]:
        if not row["chosen"]:
            continue
        found = (row["test"] or row["validation"])[BOTH]
        line = f"{row['table']:<6} {row['epsilon']:>5} {found[NDCG]:8.4f} {found['log_rank']:9.3f}"
        if own := kept.get((row["table"], row["epsilon"])):
            line += f" {own['ndcg_kept']:7.1%} {own['log_rank_kept']:7.1%}"
        lines.append(line)
    for split, found in result["popularity"].items():
        lines.append(f"popularity on {split}: {found[NDCG]:.4f}, log rank {found['log_rank']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
