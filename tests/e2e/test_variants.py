"""Every setting that changes what is trained or evaluated, from data to report, in small."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli.evaluate import print_ending
from pfm_llm.config.choices import Schedule, ServerOptimizer
from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.config.schema import dump_config, load_config
from pfm_llm.model.private import make_private_part
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RunFolders
from tests.support.leaks import files_below
from tests.support.tiny import Tiny, metrics_of, results_of, tensor_files

SMALL: dict[str, Any] = {
    "federation__num_rounds": 2,
    "data__max_users": 8,
    "evaluation__baselines": [],
}
KINDS = [
    (schedule, kind)
    for schedule, (kind, spec) in itertools.product(Schedule, PRIVATE_KINDS.items())
    if spec.schedule in (None, schedule)
]


def values(run: Path, mode: str) -> list[float]:
    """All values of a mode, in the order of the rows."""
    return [row["value"] for row in results_of(run)["rows"] if row["mode"] == mode]


def some_user(run: Path) -> str:
    """A user of the run, by the name of a client's folder."""
    clients = run.with_name(f"{run.name}.private") / "clients"
    return min(path.name for path in clients.iterdir()).removeprefix("user-")


def modes(run: Path) -> set[str]:
    return {row["mode"] for row in results_of(run)["rows"]} - {"none"}


@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
@pytest.mark.parametrize(("schedule", "kind"), KINDS)
def test_every_schedule_kind_and_server_optimizer(
    schedule: Schedule, kind: str, optimizer: ServerOptimizer, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config(
        tmp_path,
        **SMALL,
        federation__local={"schedule": schedule.value, "personalise_steps": 1},
        adapters__private__kind=kind,
        federation__server__optimizer=optimizer.value,
        evaluation__private_weights=[],  # so few rounds that validation would leave it out
    )
    part = make_private_part(config, Sizes(8, {"model.layers.0.mlp.up_proj": (8, 8)}, num_items=1))
    run = run_experiment(config)
    assert all(np.isfinite(record["loss"]) for record in metrics_of(run))
    pieces = {f"shared_{piece}" for piece in part.pieces}
    assert modes(run) == pieces | {"zero_shot", "shared_only", "private_only", "shared_private"}
    trained = list(run.with_name("tiny.private").rglob("private.r*"))
    # Otherwise private parts are fitted for evaluation alone.
    by_steps = part.takes_steps and schedule is not Schedule.PRIVATE_AFTER
    assert bool(trained) is by_steps
    assert len(list(run.with_name("tiny.private").rglob("personalised.r*"))) == 8
    has_basis = (run / "shared_adapter" / "private_basis.safetensors").exists()
    assert has_basis is bool(part.shared_parameters())
    assert Recommender.from_pretrained(run, some_user(run)).recommend(k=3)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"federation__local__shared_optimizer": "adamw"}, id="adamw"),
        pytest.param(
            {"federation__local__shared_local_steps": 3, "federation__local__max_grad_norm": 0.1},
            id="local steps and clipping",
        ),
        pytest.param({"federation__server__weighting": "num_examples"}, id="weighting"),
        pytest.param({"federation__server__aggregator": "median"}, id="median"),
        pytest.param({"federation__server__lr_schedule": "constant"}, id="constant"),
        pytest.param({"federation__local__private_local_steps": 0}, id="no private steps"),
        pytest.param({"federation__local__personalise_steps": 0}, id="no personalisation"),
        pytest.param({"head__dropout": 0.3, "adapters__shared__dropout": 0.2}, id="dropout"),
        pytest.param({"head__item_bias": False}, id="no bias"),
        pytest.param({"adapters__private__head_rank": 0}, id="no private head"),
        pytest.param({"adapters__targets": ["q_proj", "v_proj"]}, id="two modules"),
        pytest.param({"adapters__num_layers": 3}, id="all layers"),
        pytest.param({"window__max_windows": 1}, id="newest window"),
        pytest.param({"window__items": 1}, id="one item to a window"),
        pytest.param({"cache__max_gb": 0}, id="no trunk cache"),
        pytest.param({"backbone__dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"evaluation__max_users": 3, "evaluation__every": 1}, id="few validated"),
    ],
)
def test_every_other_switch(settings: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, **{**SMALL, **settings}))
    assert all(np.isfinite(record["loss"]) for record in metrics_of(run))
    assert {row["num_users"] for row in results_of(run)["rows"]} == {8}


def test_clients_clip_and_the_round_tells_of_it(tiny: Tiny, tmp_path: Path) -> None:
    plain, wide, narrow = (
        run_experiment(tiny.config(tmp_path / name, **SMALL, federation__stages=stages))
        for name, stages in (
            ("plain", []),
            ("wide", [{"clip": {"norm": 1e6}}]),
            ("narrow", [{"clip": {"norm": 1e-3}}]),
        )
    )
    figures = [record["stages"]["clip"] for record in metrics_of(wide)]
    assert all(found["clipped"] == 0 for found in figures)
    assert all(1e-3 < found["median_norm"] <= found["largest_norm"] < 1e6 for found in figures)
    trained = [
        # The server's files name the settings, which differ.
        {name: content for name, content in tensor_files(run).items() if "/server/" not in name}
        for run in (plain, wide, narrow)
    ]
    assert len(trained[0]) > 8
    assert trained[0] == trained[1] != trained[2]
    # The server sees what the clients have clipped.
    for record in metrics_of(narrow):
        assert record["stages"]["clip"]["clipped"] == 4
        assert 0.9e-3 < record["stages"]["clip"]["largest_norm"] <= 1e-3
        assert record["aggregated_norm"] <= 1e-3
    last = results_of(narrow)["costs"]["stages_in_last_round"]
    assert last == metrics_of(narrow)[-1]["stages"]


@pytest.mark.parametrize("split", ["last_fraction", "global_temporal"])
def test_other_splits(split: str, tiny: Tiny, tmp_path: Path) -> None:
    # The events of a user are a minute apart: the tiny data only count them.
    data = tmp_path / "interactions.csv"
    header, *lines = Path(tiny.config(tmp_path).data.source).read_text().splitlines()
    events = (line.rsplit(",", 1) for line in lines)
    data.write_text("\n".join([header, *(f"{event},{60 * int(at)}" for event, at in events), ""]))
    settings = {"data__source": str(data), "data__split": split, "data__held_out": 0.3}
    run = run_experiment(tiny.config(tmp_path, **settings, federation__num_rounds=2))
    rows = results_of(run)["rows"]
    assert {row["protocol"] for row in rows} == {split}
    assert len({row["num_users"] for row in rows}) == 1
    assert modes(run) == {"zero_shot", "shared_only", "private_only", "shared_private"}
    assert {row["method"] for row in rows} == {"custom", "popularity", "ease", "markov_recency"}


def test_repeats_are_kept_when_allowed(tiny: Tiny, tmp_path: Path) -> None:
    once = run_experiment(tiny.config(tmp_path / "once", **SMALL))
    again = run_experiment(tiny.config(tmp_path / "again", **SMALL, data__repeats="allow"))

    def environment(run: Path) -> Any:
        return results_of(run)["environment"]["data"]

    repeated = next(n for what, n in environment(once)["dropped"].items() if "repeat" in what)
    assert repeated > 0
    assert not [what for what in environment(again)["dropped"] if "repeat" in what]
    assert results_of(again)["rows"]


@pytest.mark.parametrize(
    ("item_ids", "parameters"),
    [
        ("none", set()),
        ("output", {"head.item_ids", "head.item_ids_out"}),
        ("both", {"head.item_ids", "head.item_ids_out", "head.item_ids_in"}),
    ],
)
def test_item_ids(item_ids: str, parameters: set[str], tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, **SMALL, head__item_ids=item_ids))
    head, _ = read_artefact(run / "shared_adapter").contents()
    always = {
        "head.state_proj",
        "head.state_log_n",
        "head.item_proj",
        "head.item_bias",
        "head.item_met",
        "head.context_proj",
        "head.context_log_h",
        "head.context_log_n",
    }
    assert {name for name in head if name.startswith("head.")} == always | parameters


def test_without_private_adapters_there_is_nothing_private(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.by_tokens.config(tmp_path, **SMALL, adapters__private__enabled=False)
    run = run_experiment(config)
    assert modes(run) == {"zero_shot", "shared_only"}
    assert not (run / "plots" / "user_gain.png").exists()
    kept = files_below(run.with_name("tiny.private"))
    assert kept
    server = ("server/", "run.lock")
    assert all("/trunk/" in name or name.startswith(server) for name in kept)
    costs = results_of(run)["costs"]
    assert costs["share_of_users_with_private_adapter"] == 0
    assert costs["private_client_steps"] == costs["personalise_client_steps"] == 0
    assert Recommender.from_pretrained(run, some_user(run)).recommend(k=3)


def test_silos_of_three_users(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, data__users_per_client=3, federation__num_rounds=2)
    run = run_experiment(config)
    assert {row["num_users"] for row in results_of(run)["rows"]} == {24}
    clients = run.with_name("tiny.private") / "clients"
    names = sorted(path.name for path in clients.iterdir())
    assert names == [f"silo-{number:04d}" for number in range(8)]
    assert results_of(run)["costs"]["personalise_client_steps"] == 8 * 2
    lists = [Recommender.from_pretrained(run, user).recommend(k=5) for user in ("u0", "u1", "u2")]
    assert all(len(items) == 5 for items in lists)


def test_private_weight_scales_the_private_adapter_at_serving_time(
    finished: Path, tmp_path: Path
) -> None:
    def weighted(weight: float) -> Path:
        folder = tmp_path / str(weight)
        shutil.copytree(finished.parent, folder)
        config = load_config(folder / "tiny" / "config.yaml", [f"adapters.private.weight={weight}"])
        (folder / "tiny" / "config.yaml").write_text(dump_config(config))
        return evaluate_run(folder / "tiny")

    off, strong = weighted(0.0), weighted(1.5)
    assert values(off, "shared_private") == values(off, "shared_only")
    assert values(strong, "shared_private") != values(finished, "shared_private")
    for run in (off, strong):
        for mode in ("zero_shot", "shared_only"):
            assert values(run, mode) == values(finished, mode)
    with pytest.raises(ConfigError, match=r"adapters\.private\.weight"):
        weighted(1.6)


def test_same_seed_same_bits_other_seed_other_cohort(tiny: Tiny, tmp_path: Path) -> None:
    runs = [
        run_experiment(tiny.config(tmp_path / name, **SMALL, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    states = [(RunFolders.of(run).server / "round_000002.safetensors").read_bytes() for run in runs]
    assert states[0] == states[1] != states[2]
    rows = [results_of(run)["rows"] for run in runs]
    assert rows[0] == rows[1] != rows[2]


def test_unusual_evaluation_settings_are_shown_as_they_are(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "evaluation__ks": [5, 20],
        "evaluation__confidence": 0.5,
        "evaluation__splits": ["validation"],
    }
    run = run_experiment(tiny.config(tmp_path, **SMALL, **settings))
    print_ending(run)
    texts = capsys.readouterr().out, (run / "results.md").read_text()
    for text in (*texts, (run / "shared_adapter" / "README.md").read_text()):
        assert "NDCG@5 [50 %]" in text
        assert "Validation split" in text
        assert "No results" not in text
