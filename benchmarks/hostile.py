"""Measure what hostile clients cost a federation, and what each defence keeps.

A fifth of the clients of MovieLens-100K is hostile; each user's last film is held out. The attacks
are made here, on what arrives at the server (`benchmarks/attacking/attacks.py`):

- sign_flip: a fifth sends its update times -10;
- huge_once: one client sends a million times its update, once, after a quarter of the rounds;
- huge: a fifth does so in each round;
- promotion: a fifth pushes one film that few have met;
- collusion: a fifth sends the same plausible update against the mean of its honest ones, as long
  as the clip allows;
- disguise: as collusion, but each of the fifth adds a direction of its own, so that two of their
  updates have a cosine of `COSINE`.

The defences are settings of a federation; ``nothing`` is the mean without the bound on sizes that
every run of the library has, and that all others have here. ``clip`` acts before that bound; where
``refused`` and ``bounded`` are 0, it would have done the same alone. The length of the clip and the
share of the trimmed mean are chosen on validation, by the mean quality under sign_flip and
collusion. Test is measured once, at the end.

To be quick, the runs are short and without the language model's pass (ablation: no_pass), of the
method shared_only, with a smaller head: `SETTINGS` has them.

    python benchmarks/hostile.py
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.attacking.arena import Defence, Outcome
    from benchmarks.attacking.attacks import Attack
    from pfm_llm.base.processes import Processes
    from pfm_llm.runs.run import Run

SETTINGS: Mapping[str, Any] = {
    "method": "shared_only",
    "ablation": "no_pass",
    "data": {"split": "leave_last_out"},
    "head": {"dim": 64, "id_dim": 32},
    "federation": {"passes": 1.0, "cohort_size": 20, "server": {"lr_scale": 5.0}},
    "evaluation": {"every": 0, "baselines": []},
}
NORMS, SHARES = (0.5, 1.0), (0.2, 0.3)
"""The lengths of the clip, in median norms of honest updates, and the shares of the trimmed mean
that validation chooses from."""
SHARE = 0.2
"""Of the clients that is hostile."""
MET_BY = 3
"""How many users at least have met the film that is promoted; it is one that fewest have."""
NOBODY, ONCE = "nobody", "huge_once"
FLIP, _, PROMOTION, COLLUSION, DISGUISE = FIFTH = (
    "sign_flip", "huge", "promotion", "collusion", "disguise",
)  # fmt: skip
QUIET = (COLLUSION, DISGUISE)
"""Attacks whose updates have a length that honest ones have."""
COSINE = 0.5
ATTACKS = (NOBODY, ONCE, *FIFTH)
NOTHING = "nothing"
ANY_FIFTH = "any_fifth"
"""Names the attack of a fifth that keeps least quality."""
_RESAMPLES, _ENDS = 1000, (0.025, 0.975)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--openings", type=Path, default=ROOT / "results" / "test_openings.json", metavar="FILE",
        help="file that counts measurements of test (default: that of the results)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting of all runs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "hostile" / "films.json")
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


@dataclass(frozen=True)
class Match:
    """A federation under an attack, once it has ended.

    Attributes:
        outcome: What the rounds left.
        validation: NDCG@10 of each user, float64 [U].
    """

    outcome: "Outcome"
    validation: "np.ndarray"


@dataclass(frozen=True)
class Ring:
    """What all matches share.

    Attributes:
        run: The assembled run.
        hostile: The fifth of the clients.
        item: The film that is promoted.
        played: The matches so far, by defence, attack and length; none is played twice.
    """

    run: "Run"
    hostile: frozenset[str]
    item: int
    played: dict[str, Match] = field(default_factory=dict)

    def attack(self, name: str, length: float) -> "Attack | None":
        """A new attack; ``length`` is that of a colluder's update."""
        from benchmarks.attacking import attacks

        if name == NOBODY:
            return None
        if name == PROMOTION:
            return attacks.Promote(self.hostile, self.item)
        if name == COLLUSION:
            return attacks.Collude(self.hostile, length)
        if name == DISGUISE:
            return attacks.Disguise(self.hostile, length, COSINE, self.run.config.seed)
        if name == ONCE:
            return attacks.ScaleOnce(1 + self.rounds // 4, 1e6)
        return attacks.Scale(self.hostile, -10.0 if name == FLIP else 1e6)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        from pfm_llm.config.settle import known

        return known(self.run.config.federation.num_rounds)

    def match(self, name: str, defence: "Defence", attack: str, length: float) -> Match:
        """Train under an attack, and measure on validation."""
        from benchmarks.attacking import arena

        key = f"{defence} {attack} {length}"
        if key not in self.played:
            hostile = self.attack(attack, length)
            outcome = arena.play(self.run, defence, hostile, f"{name} against {attack}")
            validation = arena.quality(self.run, outcome.shared, self.run.data.split.validation)
            self.played[key] = Match(outcome, validation)
        return self.played[key]


def run(arguments: argparse.Namespace) -> None:
    """Choose on validation, play all matches, measure test, write the result and print it."""
    from benchmarks.attacking.arena import Defence
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.runs.environment import environment_of

    processes = start_processes(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        ring = assembled(arguments, Path(folder), processes)
        here = environment_of(ring.run)  # now: it names the commit of the code that runs
        plain = ring.match(NOTHING, Defence({}, bounded=False), NOBODY, 0.0)
        median = plain.outcome.norms["median"]
        norm, share, tried = chosen(ring, median)
        defences = defences_of(norm, share)
        played = {
            (name, attack): ring.match(name, defence, attack, norm if attack in QUIET else 0.0)
            for name, defence in defences.items()
            for attack in ATTACKS
        }
        result: dict[str, Any] = {
            "rows": rows_of(ring, played, measured_on_test(ring, played, arguments.openings)),
            "matches": [described(pair, match) for pair, match in played.items()],
            "chosen": {"clip_norm": norm, "trim_share": share, "on_validation": tried},
            "median_norm": median,
            "defences": {name: asdict(defence) for name, defence in defences.items()},
            "promoted": {"met_by_users": MET_BY},
            "hostile_share": SHARE,
            "rounds": ring.rounds,
            "cohort_size": ring.run.config.federation.cohort_size,
            "settings": {**SETTINGS, "overrides": arguments.settings},
            "environment": here,
        }
    files.write_json(arguments.out, result)
    print(table(result["rows"]))


def assembled(arguments: argparse.Namespace, folder: Path, processes: "Processes") -> Ring:
    """The run, its hostile clients, and the film that they promote."""
    import numpy as np

    from benchmarks.attacking.attacks import hostile_clients
    from pfm_llm.base.seeding import numpy_generator
    from pfm_llm.config.schema import parse_config
    from pfm_llm.config.text import apply_override
    from pfm_llm.runs.folders import RunFolders
    from pfm_llm.runs.run import assemble, load_corpus, settled

    tree: dict[str, Any] = {
        key: dict(v) if isinstance(v, dict) else v for key, v in SETTINGS.items()
    }
    tree |= {"name": "hostile", "seed": arguments.seed}
    for one in arguments.settings:
        apply_override(tree, one)
    config = parse_config(tree)
    data = load_corpus(config)
    run = assemble(settled(config, data), data, RunFolders.of(folder / "hostile"), processes)
    met = np.bincount(
        np.concatenate(data.split.validation.histories),
        minlength=len(data.interactions.catalogue),
    )
    rare = np.flatnonzero(met == met[met >= MET_BY].min())
    item = int(numpy_generator(arguments.seed, "hostile/item").choice(rare))
    clients = tuple(run.clients.histories.trainable)
    return Ring(run, hostile_clients(clients, SHARE, arguments.seed), item)


def defences_of(norm: float, share: float) -> dict[str, "Defence"]:
    """The defences by name, with the chosen numbers."""
    from benchmarks.attacking.arena import Defence

    clip = {"stages": [{"clip": {"norm": norm}}]}
    median = {"server": {"aggregator": "median"}}
    foolsgold = {"server": {"aggregator": "foolsgold"}}
    trimmed = {"server": {"aggregator": "trimmed_mean", "trim_share": share}}
    return {
        NOTHING: Defence({}, bounded=False),
        "bound": Defence({}),
        "clip": Defence(clip),
        "median": Defence(median),
        "trimmed_mean": Defence(trimmed),
        "clip_trimmed_mean": Defence({**clip, **trimmed}),
        "clip_foolsgold": Defence({**clip, **foolsgold}),
    }


def chosen(ring: Ring, median: float) -> tuple[float, float, list[dict[str, Any]]]:
    """The length of the clip and the share of the trimmed mean, and what was tried."""
    tried: list[dict[str, Any]] = []

    def best(kind: str, values: Sequence[float], norm_of: Mapping[float, float]) -> float:
        for value in values:
            norm = norm_of[value]
            settings = defences_of(norm, value)[kind]
            under = [
                float(ring.match(kind, settings, attack, length).validation.mean())
                for attack, length in ((FLIP, 0.0), (COLLUSION, norm))
            ]
            tried.append({"defence": kind, "value": value, "ndcg": sum(under) / len(under)})
        own = [one for one in tried if one["defence"] == kind]
        return float(max(own, key=lambda one: one["ndcg"])["value"])

    norms = [factor * median for factor in NORMS]
    norm = best("clip", norms, {value: value for value in norms})
    share = best("trimmed_mean", SHARES, dict.fromkeys(SHARES, norm))
    return norm, share, tried


def measured_on_test(
    ring: Ring, played: Mapping[tuple[str, str], Match], openings: Path
) -> dict[tuple[str, str], "np.ndarray"]:
    """NDCG@10 of each user on test, after every match; each is counted."""
    from benchmarks.attacking import arena
    from pfm_llm.config.schema import training_hash
    from pfm_llm.evaluation.openings import count_opening

    data = ring.run.data
    names = {f"hostile_{defence}_{attack}": (defence, attack) for defence, attack in played}
    settings = training_hash(ring.run.config)[:16]
    count_opening(openings, data.interactions, data.split, dict.fromkeys(names, settings))
    return {
        pair: arena.quality(ring.run, played[pair].outcome.shared, data.split.test)
        for pair in names.values()
    }


def rows_of(
    ring: Ring,
    played: Mapping[tuple[str, str], Match],
    test: Mapping[tuple[str, str], "np.ndarray"],
) -> list[dict[str, Any]]:
    """Rows: quality, quality kept, and ranks that the promoted film gained."""
    from benchmarks.attacking import arena
    from pfm_llm.evaluation.personality.estimates import Bootstrap, estimate

    rows = []
    for (defence, attack), own in test.items():
        about = {"defence": defence, "attack": attack}
        rows.append(row("ndcg", 10, asdict(estimate(own, Bootstrap())), about))
        for metric, whose in (("quality_kept", defence), ("quality_kept_of_mean", NOTHING)):
            rows.append(row(metric, 10, ratio(own, test[whose, NOBODY]), about))
    for defence, metric in itertools.product(
        dict.fromkeys(defence for defence, _ in test), ("quality_kept", "quality_kept_of_mean")
    ):
        found = [
            one
            for one in rows
            if one["defence"] == defence and one["metric"] == metric and one["attack"] in FIFTH
        ]
        rows.append({**min(found, key=lambda one: one["value"]), "attack": ANY_FIFTH})
    held_out = ring.run.data.split.test
    for defence in dict.fromkeys(defence for defence, _ in test):
        before, after = (
            arena.ranks_of_item(
                ring.run, played[defence, attack].outcome.shared, held_out, ring.item
            )
            for attack in (NOBODY, PROMOTION)
        )
        about = {"defence": defence, "attack": PROMOTION}
        for metric, values in (
            ("ranks_gained", (before - after).astype(float)),
            ("rank_before", before.astype(float)),
            ("in_first_ten", (after <= 10).astype(float)),
        ):
            rows.append(row(metric, 0, asdict(estimate(values, Bootstrap())), about))
    return rows


def ratio(own: "np.ndarray", reference: "np.ndarray") -> dict[str, float]:
    """The ratio of two means over the same users, with its interval over users."""
    import numpy as np

    from pfm_llm.evaluation.metrics import resampled_means

    resampled = [resampled_means(values, _RESAMPLES, 0) for values in (own, reference)]
    low, high = np.quantile(resampled[0] / resampled[1], _ENDS).tolist()
    return {
        "value": float(own.mean() / reference.mean()),
        "ci_low": low,
        "ci_high": high,
        "num_users": len(own),
    }


def row(
    metric: str, k: int, figures: Mapping[str, Any], about: Mapping[str, str]
) -> dict[str, Any]:
    """A row of the result."""
    return {"metric": metric, "k": k, "split": "test", "candidates": "full", **about, **figures}


def described(pair: tuple[str, str], match: Match) -> dict[str, Any]:
    """What a match was like."""
    defence, attack = pair
    outcome = match.outcome
    return {
        "defence": defence,
        "attack": attack,
        "refused": outcome.refused,
        "clipped": outcome.clipped,
        "bounded": outcome.bounded,
        "norms": outcome.norms,
        "validation_ndcg": float(match.validation.mean()),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines of text."""
    return "\n".join(
        f"{one['metric']:<22} {one['defence']:<18} {one['attack']:<12} {one['value']:9.4f} "
        f"[{one['ci_low']:.4f}, {one['ci_high']:.4f}]"
        for one in rows
    )


if __name__ == "__main__":
    main()
