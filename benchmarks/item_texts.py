"""Measure, without training, how well each kind of item vector tells the next item.

The kinds are the sentence encoder, and the backbone's states by each pooling, of all its layers and
of the lower half of them; each whitened and cut to some numbers of dimensions. The held-out item of
each user is ranked by the cosine of these vectors with the fading mean of the history's, on the
validation split. Test is not touched. One rule over all domains then chooses encoder, pooling and
dimension (`item_texts_bench.RULE`), and the result says what it chose.

The games are not shipped; configs/games.yaml tells where to put them. Vectors are cached, so a
second run is short.

    python benchmarks/item_texts.py
    python benchmarks/item_texts.py --domains ml100k groceries
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    import torch

    from benchmarks.item_texts_bench import Kind, Qualities, Setting
    from pfm_llm.config.schema import ExperimentConfig

DOMAINS = ("ml100k", "groceries", "games")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", default=[*DOMAINS], help="configs, or files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument(
        "--sentences-only", nargs="+", default=[], metavar="DOMAIN",
        help="domains whose texts the backbone does not read, since it takes long",
    )  # fmt: skip
    parser.add_argument(
        "--half", nargs="*", default=["ml100k", "groceries"], metavar="DOMAIN",
        help="domains that the lower half of the layers reads as well (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "item-texts" / "validation.json"
    )
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measure all domains, apply the rule, write the result and print it."""
    from benchmarks import item_texts_bench as bench
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.environment import environment

    configs = {
        name: load_config(find_config(name), arguments.settings) for name in arguments.domains
    }
    first = next(iter(configs.values()))
    processes = start_processes(first.runtime.threads)
    found, about = {}, {}
    for name, config in configs.items():
        kinds = bench.SENTENCES if name in arguments.sentences_only else bench.WHOLE
        kinds += bench.HALF if name in arguments.half else ()
        found[name], about[name] = _measured(config, kinds, processes.device)
    machine = environment(
        seed=first.seed,
        dtype=first.backbone.dtype.value,
        threads=processes.threads,
        num_processes=1,
    )
    result = _result(found, bench.Setting.of(first))
    files.write_json(arguments.out, {**result, "domains": about, "environment": machine})
    _print(found, result)


def _result(
    found: "Mapping[str, Mapping[Setting, Qualities]]", default: "Setting"
) -> dict[str, Any]:
    """All figures, what the rule chooses, and what it would choose by another quality."""
    from benchmarks import item_texts_bench as bench

    chosen, table = bench.choose(found)
    others = {quality: bench.choose(found, quality)[0] for quality in ("log_rank", "ndcg")}
    return {
        "split": "validation",
        "rule": bench.RULE,
        "half_life": bench.HALF_LIFE,
        "chosen": chosen.as_row(),
        "chosen_by_another_quality": {name: one.as_row() for name, one in others.items()},
        "defaults": default.as_row(),
        "table": table,
        "rows": [row for name, own in found.items() for row in bench.rows(name, own)],
    }


def _print(found: "Mapping[str, Mapping[Setting, Qualities]]", result: dict[str, Any]) -> None:
    from benchmarks.item_texts_bench import Setting

    for name, own in found.items():
        for setting, values in own.items():
            means = ", ".join(f"{one} {figures.mean():.4f}" for one, figures in values.items())
            print(f"{name}: {setting}: {means}")
    for row in result["table"]:
        gap = row["below_best"]
        print(
            f"{Setting.from_row(row)}: {row['mean']:.4f}, {gap['value']:+.4f} "
            f"[{gap['ci_low']:.4f}, {gap['ci_high']:.4f}]{', level' if row['is_level'] else ''}"
        )
    chosen, default = (Setting.from_row(result[key]) for key in ("chosen", "defaults"))
    print(f"chosen: {chosen}; the default is {default}")


def _measured(
    config: "ExperimentConfig", kinds: "Sequence[Kind]", device: "torch.device"
) -> "tuple[dict[Setting, Qualities], dict[str, Any]]":
    """The qualities of each setting on validation of a domain, and what was measured."""
    from benchmarks import item_texts_bench as bench
    from pfm_llm.evaluation.openings import fingerprint
    from pfm_llm.model.backbone import load_backbone
    from pfm_llm.runs.run import load_corpus

    data = load_corpus(config)
    held_out = data.split.validation
    backbone = load_backbone(config.backbone, device)
    found = {}
    for kind in kinds:
        states = bench.item_vectors(kind, config, data, backbone)
        what = f"{config.name}, {kind}"
        for dim, own in bench.measure(states, held_out, what, bench.DIMS).items():
            found[bench.Setting(kind, dim)] = own
    return found, {
        "config": config.model_dump(mode="json"),
        "split": fingerprint(data.interactions, held_out),
        "num_users": len(held_out.users),
        "num_items": len(data.interactions.catalogue),
    }


if __name__ == "__main__":
    main()
