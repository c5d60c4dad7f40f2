"""Compare llama.cpp on a device with our likelihood scorer: the same answers, the same top ten?

A shared LoRA is trained on few questions by the federated engine, and a private one for each of
some users, with the settings that `benchmarks.likelihood` chose. Both leave as GGUF files. For each
user, items that the user has not met are asked about: by our scorer in float32, and by llama.cpp,
which mixes the two LoRAs per request. Nothing is measured on test, and no answer of a user is read.

- base ``f32``: the file's weights in float32, as ours are. Differences are of rounding alone.
- base ``f16``: the same in float16, with llama.cpp's usual settings.
- base ``q4_1``: the file as it is, with llama.cpp's usual settings: what a device sees.
- base ``bfloat16``: our own scorer in bfloat16, for comparison.

``top_ten_equal`` is the share of users whose ten best items are the same ten; ``order_equal`` that
of users for whom they also stand in the same order; ``overlap`` the mean share of common items::

    pip install -c constraints-device.txt -e ".[device]"
    python benchmarks/device.py
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from benchmarks.device_llama import Llama
    from benchmarks.device_ours import TrainedLoras

TOP, BATCHED_ITEMS = 10, 12
Scores = Mapping[str, np.ndarray]
"""Name of a mixture of LoRAs to log-odds [users, items]."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="ml100k", help="a shipped config, or a file")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--items", type=int, default=100, help="items in question of each user")
    parser.add_argument("--mixed-users", type=int, default=2, help="users of the other mixtures")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "device" / "films.json")
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train, export, compare, write the result and print it."""
    import xllamacpp

    from benchmarks.device_llama import dequantise
    from benchmarks.device_ours import ROUNDS, SEED, SHOTS, TrainedLoras
    from pfm_llm.base import assets, files
    from pfm_llm.runs.environment import environment

    with tempfile.TemporaryDirectory() as name:
        folder, counts = Path(name), (arguments.users, arguments.items)
        trained = TrainedLoras.of(arguments.config, arguments.overrides, counts, folder / "clients")
        ours = trained.scores()
        rows = effects(ours)
        rows += compared("bfloat16", ours, {"both": trained.scores_in_bfloat16(folder)})
        q4_1 = assets.smollm2_135m_gguf()
        bases = {"f32": folder / "f32.gguf", "f16": folder / "f16.gguf", "q4_1": q4_1}
        for base in ("f32", "f16"):
            dequantise(q4_1, bases[base], half=base == "f16")
        loras, costs = trained.export(folder, q4_1), dict[str, dict[str, float]]()
        for base, path in bases.items():
            found = Measured(trained, path, loras, exact=base == "f32")
            mixed = 0 if base == "f16" else arguments.mixed_users
            rows += compared(base, ours, found.scores(mixed))
            rows += [row | {"base": base} for row in found.checks()] if mixed else []
            costs[base] = found.costs
    about = {key: getattr(arguments, key) for key in ("users", "items", "mixed_users")}
    about |= {"shots": SHOTS, "rounds": ROUNDS, "xllamacpp": xllamacpp.__version__}
    result = {
        "rows": [row | {"split": "train", "candidates": "unmet items"} for row in rows],
        "config": trained.task.config.model_dump(mode="json"),
        "device": about | {"llama_cpp": xllamacpp.get_system_info()},
        "costs": costs,
        "environment": environment(seed=SEED, dtype="float32", threads=1, num_processes=1),
    }
    files.write_json(arguments.out, result)
    for row in rows:
        where = f"{row.get('base', ''):8} {row.get('mixture', ''):8}"
        print(f"{where} {row['metric']:26} {row['value']:.6g}")


class Measured:
    """llama.cpp with the LoRAs of all users in one loaded model.

    Args:
        trained: What is asked.
        base: The file of the language model.
        loras: The files of the shared LoRA, of each user's own, and of each user's two in one.
        exact: See `Llama`.

    Attributes:
        costs: Seconds and tokens for one user's questions with both LoRAs.
    """

    def __init__(
        self,
        trained: "TrainedLoras",
        base: Path,
        loras: tuple[Path, list[Path], list[Path]],
        exact: bool,
    ) -> None:
        shared, own, cat = loras
        self._trained, self._users = trained, len(own)
        self._given = base, [shared, *own, *cat]
        self._exact = exact
        self._llama = self._load(slots=1)
        self.costs: dict[str, float] = {}

    def scores(self, mixed_users: int) -> Scores:
        """Log-odds of all users with both LoRAs, and of some users with the other mixtures."""
        from benchmarks.device_ours import MIXTURES

        started = time.perf_counter()
        found = {"both": [self._ask(user, MIXTURES["both"]) for user in self._all]}
        self.costs = {
            "seconds_per_user": (time.perf_counter() - started) / self._users,
            "tokens_per_user": self._trained.num_tokens / self._users,
        }
        for name in MIXTURES if mixed_users else ():
            if name != "both":
                found[name] = [self._ask(user, MIXTURES[name]) for user in range(mixed_users)]
        if mixed_users:
            found["cat"] = [
                self._llama.log_odds(
                    self._trained.prompts(user),
                    self._trained.answers,
                    {1 + self._users + user: 1.0},
                )
                for user in range(mixed_users)
            ]
        return {name: np.array(odds) for name, odds in found.items()}

    def checks(self) -> list[dict[str, Any]]:
        """Whether llama.cpp makes our tokens of the text, and mixes requests that run together."""
        from benchmarks.device_ours import MIXTURES

        tokenizer = self._trained.task.parts.backbone.tokenizer
        prompts = [prompt for user in self._all for prompt in self._trained.prompts(user)]
        texts = [tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in prompts]
        same = [self._llama.tokenise(t) == p for t, p in zip(texts, prompts, strict=True)]
        alone = {name: self._ask(0, mixture, BATCHED_ITEMS) for name, mixture in MIXTURES.items()}
        self._llama = self._load(slots=len(MIXTURES))
        with ThreadPoolExecutor(len(MIXTURES)) as pool:
            together = list(
                pool.map(lambda one: self._ask(0, one, BATCHED_ITEMS), MIXTURES.values())
            )
        apart = np.abs(np.array(together) - np.array(list(alone.values())))
        return [
            {"metric": "tokens_equal", "value": float(np.mean(same)), "num_prompts": len(same)},
            {"metric": "together_difference", "value": float(np.max(apart))},
        ]

    @property
    def _all(self) -> range:
        return range(self._users)

    def _load(self, slots: int) -> "Llama":
        from benchmarks.device_llama import Llama

        return Llama(*self._given, slots, self._exact)

    def _ask(
        self, user: int, mixture: tuple[float, float], count: int | None = None
    ) -> list[float]:
        prompts = self._trained.prompts(user)[:count]
        scales = {0: mixture[0], 1 + user: mixture[1]}
        return self._llama.log_odds(prompts, self._trained.answers, scales)


def compared(base: str, ours: Scores, theirs: Scores) -> list[dict[str, Any]]:
    """The rows that tell how near the answers of llama.cpp are to ours, by mixture.

    Args:
        base: Name of the base model's file.
        ours: Our log-odds.
        theirs: Those to compare, of the first of the users; those of ``cat`` are of both LoRAs.
    """
    from pfm_llm.evaluation.personality.estimates import Bootstrap, estimate

    rows: list[dict[str, Any]] = []
    for mixture, found in theirs.items():
        wanted = ours["both" if mixture == "cat" else mixture][: len(found)]
        pairs = list(zip(top(wanted), top(found), strict=True))
        common = np.array([len(set(one) & set(other)) / TOP for one, other in pairs])
        of_user = {
            "top_ten_equal": common == 1.0,
            "order_equal": [one == other for one, other in pairs],
            "overlap": common,
            "correlation": [np.corrcoef(*pair)[0, 1] for pair in zip(wanted, found, strict=True)],
        }
        where = {"base": base, "mixture": mixture}
        for metric, values in of_user.items():
            figures = vars(estimate(np.asarray(values, np.float64), Bootstrap(seed=0)))
            rows.append({"metric": metric, **where, **figures})
        apart = float(np.abs(found - wanted).max())
        rows.append({"metric": "largest_difference", **where, "value": apart})
    return rows


def effects(ours: Scores) -> list[dict[str, Any]]:
    """The rows that tell how much the LoRAs change: there must be something to get wrong."""
    before, after = top(ours["shared"]), top(ours["both"])
    changed = [set(one) != set(other) for one, other in zip(before, after, strict=True)]
    moves = {
        f"moved_by_{name}": np.abs(ours[name] - ours["none"]).mean() for name in ("shared", "both")
    }
    moves["moved_by_private"] = np.abs(ours["both"] - ours["shared"]).mean()
    figures = {"top_ten_changed_by_private": np.mean(changed), **moves}
    figures["spread"] = ours["both"].std(1).mean()
    return [{"metric": name, "value": float(value)} for name, value in figures.items()]


def top(scores: np.ndarray) -> list[list[int]]:
    """The ten best items of each user, the best first; ties keep the order of the items."""
    return [row[:TOP] for row in np.argsort(-scores, axis=1, kind="stable").tolist()]


if __name__ == "__main__":
    main()
