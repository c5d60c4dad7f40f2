"""Measure an adapter on a catalogue that it was not trained on.

``films``: a federation of a random half of the users of MovieLens-100K trains on a random half of
the films. Its published adapter serves the other half of the users on the other half of the films,
untrained, from a file of item texts: neither a user nor a film is common. ``games``: the same
adapter serves 2,000 users of video games, whose files are named by ``--set data.source=...`` and
``--set data.items=...``; see configs/games.yaml.

Each user's last event is ranked among all items that the user has not met. Measured are

- zero_shot: the adapter as it was published, and zero_shot_personal: with a private part that is
  fitted to the user's history;
- adapted: the same after 20 rounds on the other catalogue (init_from), with private parts;
- scratch: the same method after these 20 rounds alone, with private parts;
- popularity, which counts events of the other catalogue; cosine, of the vectors of the texts; and
  the mean of a random order.

Three methods are compared: by text alone (pfm_text), with a row for each item (pfm_embedding, with
head.item_dropout), and with codes. Runs and figures that are there are not made again.

    python benchmarks/transfer.py films --budget full
    python benchmarks/transfer.py games --budget full --set data.source=... --set data.items=...
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from benchmarks.transferring.figures import Asked, Qualities
    from benchmarks.transferring.serving import Ranks
    from benchmarks.transferring.worlds import World
    from pfm_llm.config.schema import ExperimentConfig
    from pfm_llm.runs.run import Corpus

METHODS: Mapping[str, Mapping[str, Any]] = {
    "text": {"method": "pfm_text"},
    "rows": {"method": "pfm_embedding", "head": {"item_dropout": 0.1}},
    "codes": {"method": "pfm_embedding", "head": {"item_ids": "codes"}},
}
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "small": {"passes": 0.3, "seeds": 1},
    "full": {"passes": 3.4, "seeds": 3},
}
ROUNDS = 20
"""Of a quick adaptation, and of training from scratch beside it."""

_GAMES = {"columns": {"timestamp": "position"}, "min_interactions": 10, "max_users": 2000}
_PERSONAL = "zero_shot_personal"
_UNTRAINED = ("popularity", "random", "cosine", "cosine_whitened")
_COMPARED = [
    *((own, other) for own in ("zero_shot", _PERSONAL, "adapted") for other in _UNTRAINED),
    *((_PERSONAL, "zero_shot"), ("zero_shot", "scratch")),
    *(("adapted", other) for other in ("zero_shot", "scratch")),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=("films", "games"))
    parser.add_argument("--budget", choices=BUDGETS, default="full")
    parser.add_argument("--seeds", type=int, default=None, help="how many (default: the budget's)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting of all runs; data.… is of the games alone",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "transfer")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/transfer/<target>.json"
    )
    parser.add_argument(
        "--openings", type=Path, default=ROOT / "results" / "test_openings.json", metavar="FILE",
        help="file that counts measurements of test (default: that of the results)",
    )  # fmt: skip
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train, publish, serve and compare; write the result and print it."""
    from benchmarks.transferring import figures
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.evaluation.openings import OPENINGS
    from pfm_llm.runs.environment import environment

    threads = start_processes(None).threads
    count = arguments.seeds or BUDGETS[arguments.budget]["seeds"]
    seeds = [_Seed.of(arguments, seed) for seed in range(count)]
    # A seed after the other, so that an interrupted measurement has whole ones.
    measured = [{method: seed.measured(method) for method in arguments.methods} for seed in seeds]
    found = {method: [one[method] for one in measured] for method in arguments.methods}
    result = {
        "target": arguments.target,
        "budget": arguments.budget,
        "rounds": ROUNDS,
        "seeds": [seed.number for seed in seeds],
        "settings": [one for one in arguments.settings if not one.startswith("data.")],
        "methods": {method: METHODS[method] for method in found},
        "environment": environment(seed=0, dtype="auto", threads=threads, num_processes=1),
        "rows": [
            {"method": method, **row}
            for method, own in found.items()
            for row in figures.rows(_pooled(seeds, own), _COMPARED)
        ],
        "per_seed": {
            method: [figures.rows(one, _COMPARED) for one in own] for method, own in found.items()
        },
        OPENINGS: [seed.counts for seed in seeds],
    }
    out = arguments.out or ROOT / "results" / "transfer" / f"{arguments.target}.json"
    files.write_json(out, result)
    for row in result["rows"]:
        if row["metric"].endswith("ndcg"):
            interval = f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
            print(f"{row['method']:6} {row['metric']:50} {row['value']:8.4f} {interval}")


def _pooled(seeds: list["_Seed"], own: list[dict[str, "Qualities"]]) -> dict[str, "Qualities"]:
    from benchmarks.transferring import figures

    asked = [seed.asked for seed in seeds]
    return {name: figures.pooled(asked, [one[name] for one in own]) for name in own[0]}


@dataclass(frozen=True)
class _Seed:
    """One seed: its two worlds, and where its runs are.

    Attributes:
        number: Draws the halves, and seeds all runs.
        work: The folder of all seeds.
        source, target: The worlds.
        data: The data of the target world.
        passes: Mean participations of a client of the source world.
        settings: Of all runs, as overrides.
        openings: The file that counts measurements of test.
        methods: What is measured on test, by name; with its settings.
    """

    number: int
    work: Path
    source: "World"
    target: "World"
    data: "Corpus"
    passes: float
    settings: tuple[str, ...]
    openings: Path
    methods: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: argparse.Namespace, number: int) -> "_Seed":
        from benchmarks.transferring.worlds import World, halves
        from pfm_llm.base.errors import ConfigError
        from pfm_llm.config.schema import ExperimentConfig
        from pfm_llm.config.text import apply_override
        from pfm_llm.data.sources import load_interactions
        from pfm_llm.runs.run import load_corpus

        films = load_interactions(ExperimentConfig(name="films").data, number)[0]
        work = arguments.work.resolve()
        source, target = halves(films, work / "worlds" / f"s{number}", number)
        if arguments.target == "games":
            tree: dict[str, Any] = {"data": dict(_GAMES)}
            for one in arguments.settings:
                if one.startswith("data."):
                    apply_override(tree, one)
            if not {"source", "items"} <= tree["data"].keys():
                raise ConfigError(
                    "the games are not shipped; name them with --set data.source=FILE and "
                    "--set data.items=FILE (configs/games.yaml tells where they are from)"
                )
            target = World(tree["data"], Path(tree["data"]["items"]))
        passes = BUDGETS[arguments.budget]["passes"]
        settings = tuple(one for one in arguments.settings if not one.startswith("data."))
        data = load_corpus(_config("target", target, number))
        return cls(number, work, source, target, data, passes, settings, arguments.openings)

    @property
    def asked(self) -> "Asked":
        """The users who are served."""
        import numpy as np

        from benchmarks.transferring.figures import Asked

        test, interactions = self.data.split.test, self.data.interactions
        met = [len(np.unique(history)) for history in test.histories]
        users = tuple(interactions.user_ids[user] for user in test.users.tolist())
        return Asked(users, len(interactions.catalogue) - np.array(met))

    def measured(self, method: str) -> dict[str, "Qualities"]:
        """Name of each way of serving to the qualities of all users."""
        from benchmarks.transferring import figures, serving

        source = self._published(method, "source", self.source)
        folders = {
            "zero_shot": source,
            "adapted": self._published(method, "adapted", self.target, source),
            "scratch": self._published(method, "scratch", self.target),
        }
        asked = self.asked
        found: dict[str, Qualities] = {}
        for name, folder in folders.items():
            ways = (serving.PERSONAL, *((serving.SHARED,) if folder == source else ()))
            ranks = self._served(folder, f"{method}_{name}", ways)
            found[name] = figures.qualities(ranks[ways[-1]], asked)
            if folder == source:
                found[_PERSONAL] = figures.qualities(ranks[serving.PERSONAL], asked)
        self._count(dict.fromkeys(("popularity", "cosine", "cosine_whitened"), source.name))
        for name, own in serving.yardsticks(source, self.target.items, self.data).items():
            found[name] = figures.qualities(own, asked)
        return {**found, figures.RANDOM: figures.by_chance(asked)}

    def _published(self, method: str, what: str, world: "World", start: Path | None = None) -> Path:
        """The published folder of a run, which is trained where it is not there yet.

        Args:
            method: One of `METHODS`.
            what: Names the run.
            world: What it is trained on.
            start: A published folder to start from.
        """
        from benchmarks.transferring import serving
        from pfm_llm.config.schema import training_hash
        from pfm_llm.publish.artefact import MANIFEST_FILE
        from pfm_llm.runs.experiment import run_experiment
        from pfm_llm.runs.folders import RunFolders

        more: dict[str, Any] = {
            "federation": {"passes": self.passes} if what == "source" else {"num_rounds": ROUNDS},
            "init_from": None if start is None else {"adapter": str(start)},
            "evaluation": {"every": 0, "baselines": []},
            "output": {"dir": str(self.work / "runs")},
        }
        config = _config("x", world, self.number, self.settings, {**METHODS[method], **more})
        name = f"{method}-{what}-s{self.number}-{training_hash(config)[:8]}"
        run, folder = self.work / "runs" / name, self.work / "published" / name
        # The manifest of the final export is the last file of a run.
        if not (RunFolders.of(run).shared_adapter / MANIFEST_FILE).is_file():
            run_experiment(config.model_copy(update={"name": name}), resume=run.is_dir())
        if not folder.is_dir():
            partial = folder.with_name(f"{name}.partial")  # what fails the checks is never served
            shutil.rmtree(partial, ignore_errors=True)
            serving.published(run, partial).rename(folder)
        return folder

    def _served(self, folder: Path, name: str, ways: Sequence[str]) -> "Ranks":
        """The ranks of an adapter on the target world, computed where they are not there yet."""
        from benchmarks.transferring import serving
        from pfm_llm.base import files
        from pfm_llm.evaluation.openings import fingerprint

        interactions = self.data.interactions
        # The events and the queries; and the texts, which the former does not depend on.
        split = fingerprint(interactions, self.data.split.test)[:8]
        known = f"{interactions.content_hash()[:8]}-{split}"
        path = self.work / "served" / f"{folder.name}-on-{known}.json"
        self.methods[name] = folder.name
        if not path.is_file():
            self._count({name: folder.name})
            what = f"serving {name} (seed {self.number})"
            ranks = serving.served(folder, self.target.items, self.data, what, ways)
            files.write_json(path, ranks)
        found: Ranks = files.read_json(path)
        return found

    def _count(self, methods: Mapping[str, str]) -> None:
        """Count a measurement of test, before it is made."""
        from pfm_llm.evaluation.openings import count_opening

        self.methods.update(methods)
        count_opening(self.openings, self.data.interactions, self.data.split, methods)

    @property
    def counts(self) -> dict[str, Any]:
        """How often test was measured so far; see `openings.counts_of`."""
        from pfm_llm.evaluation.openings import counts_of

        return counts_of(self.openings, self.data.interactions, self.data.split, self.methods)


def _config(
    name: str,
    world: "World",
    seed: int,
    settings: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> "ExperimentConfig":
    """The defaults with the data of a world, some sections and overrides."""
    from pfm_llm.config.schema import parse_config
    from pfm_llm.config.text import apply_override

    tree: dict[str, Any] = {"name": name, "seed": seed, "data": dict(world.data), **(more or {})}
    for one in settings:
        apply_override(tree, one)
    return parse_config(tree)


if __name__ == "__main__":
    main()
