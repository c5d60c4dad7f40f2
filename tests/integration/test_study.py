"""The study of a tiny run: every measure is there, finite, and what it says it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfm_llm.client import private_steps
from pfm_llm.data.splits import new_items
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RESULTS_FILE, TABLE_FILE
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.study.cold_start import first_events
from pfm_llm.runs.study.run import study_run
from tests.support.tiny import Tiny, random_histories

LIKES: dict[str, Any] = {
    "tasks": ["next_item", "like"],
    "data__split": "last_fraction",
    "data__held_out": 0.6,
    "data__columns": {"rating": "rating", "timestamp": None},
    "evaluation__splits": ["validation"],
    "federation__num_rounds": 4,
}

OWN = ("shared_private", "next_item")
"""Mode and task of what a private part is worth for the next item."""


@pytest.fixture(scope="module")
def rated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny histories with ratings: even items are liked."""
    lines = ["user_id,item_id,rating"]
    for user, items in random_histories().items():
        lines += [f"{user},i{item},{5 if (item + len(user)) % 2 else 2}" for item in items]
    path = tmp_path_factory.mktemp("rated") / "interactions.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


def _study(tiny: Tiny, rated: Path, output: Path, **settings: Any) -> tuple[Path, list[ResultRow]]:
    config = tiny.config(output, data__source=str(rated), **LIKES, **settings)
    run = run_experiment(config)
    return run, study_run(run, "small")


def test_each_measurement_of_test_is_counted(tiny: Tiny, rated: Path, tmp_path: Path) -> None:
    settings = LIKES | {"data__source": str(rated), "evaluation__splits": ["test"]}
    run = run_experiment(tiny.config(tmp_path, method="pfm", regime="fedsgd", **settings))
    study_run(run, "small")
    methods = json.loads((run / RESULTS_FILE).read_text())["test_openings"]["methods"]
    assert {"pfm", "popularity", "like_rate", "like_ridge"} <= methods.keys()
    assert {own["times"] for own in methods.values()} == {2}  # at the end of training, and now
    study_run(run, "small", tmp_path / "elsewhere.json")
    evaluate_run(run)
    counted = json.loads((run / RESULTS_FILE).read_text())["test_openings"]["methods"]["pfm"]
    assert counted == {"times": 3, "times_with_these_settings": 3}
    # Validation alone opens nothing.
    config = tiny.config(tmp_path / "other", evaluation__splits=["validation"])
    folder = run_experiment(config)
    assert "test_openings" not in json.loads((folder / RESULTS_FILE).read_text())
    assert not (tmp_path / "other" / "test_openings.json").exists()


def test_users_without_a_query_take_no_part(tiny: Tiny, rated: Path, tmp_path: Path) -> None:
    """They train, and neither lend nor borrow an adapter."""
    path = tmp_path / "interactions.csv"
    path.write_text(rated.read_text() + "new,i1,5\nnew,i2,2\n")
    settings = {"method": "pfm", "regime": "fedsgd", "data__min_interactions": 2}
    _, rows = _study(tiny, path, tmp_path / "runs", **settings)
    (identified,) = [r for r in rows if (r.task, r.metric) == ("next_item", "identification")]
    assert identified.num_users == 24


def test_ours_is_measured_in_every_way(tiny: Tiny, rated: Path, tmp_path: Path) -> None:
    run, rows = _study(tiny, rated, tmp_path, method="pfm", regime="fedsgd")
    by_name = {(row.task, row.metric): row for row in rows if row.mode == "shared_private"}
    for name in (
        "gain_log_rank", "gain_ndcg", "gain_log_rank_over_private", "swap_log_rank",
        "identification", "not_harmed", "integrity_rbo", "integrity_rbo_retuned", "memory_4",
        "cold_start_0", "cold_start_1", "cold_start_5", "ndcg_over_popularity", "ndcg_over_ease",
    ):  # fmt: skip
        assert ("next_item", name) in by_name, name
    for name in (
        "auc", "gain_auc", "swap_auc", "swap_log_likelihood", "identification",
        "identification_joint",
    ):  # fmt: skip
        assert ("like", name) in by_name, name
    assert all(row.split == "test" and row.budget == "small" for row in rows)
    assert by_name["next_item", "cold_start_0"].value == 0  # nothing is known, nothing is gained
    gains = json.loads((run / RESULTS_FILE).read_text())["per_user"]
    gain = by_name["next_item", "gain_log_rank"]
    assert np.mean(gains["gain_log_rank"]) == pytest.approx(gain.value)
    assert all(values == sorted(values) for values in gains.values())  # nobody's can be told
    assert len(gains["gain_auc"]) == by_name["like", "gain_auc"].num_users


def test_pieces_of_a_private_part_and_the_mean_of_all_are_served_too(
    tiny: Tiny, rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfm_llm.runs.study.run.MANY", 2)
    _, rows = _study(tiny, rated, tmp_path / "lora", method="pfm", window__items=8)
    found = {r.metric: r for r in rows if (r.mode, r.task) == OWN}
    for name in ("log_rank", "ndcg"):
        own, mean = found[f"own_over_mean_{name}"].value, found[f"mean_over_shared_{name}"].value
        assert own + mean == pytest.approx(found[f"gain_{name}"].value, abs=1e-12)
        assert f"lora_alone_{name}" in found  # too small to reorder anything in so few rounds
    assert found["embedding_alone_log_rank"].value != 0
    assert 0 < found["identification_2"].num_users <= found["identification"].num_users
    # Prompts of four items: the pieces are those of the whole history.
    assert found["memory_4"].value == pytest.approx(
        found["memory_4_own"].value - found["memory_4_shared"].value
    )
    assert {"memory_ndcg_4", "lora_alone_log_rank_4", "lora_alone_ndcg_4"} <= found.keys()
    assert found["embedding_alone_log_rank_4"].value not in (
        0, found["embedding_alone_log_rank"].value
    )  # fmt: skip
    assert found["own_over_mean_log_rank"].value != 0
    assert "steps_over_read_log_rank" not in found
    _, rows = _study(
        tiny, rated, tmp_path / "embedding", method="pfm_embedding"
    )  # reuses the user vectors
    of_embedding = {r.metric: r.value for r in rows if (r.mode, r.task) == OWN}
    parts = of_embedding["own_over_mean_log_rank"] + of_embedding["mean_over_shared_log_rank"]
    assert parts == pytest.approx(of_embedding["gain_log_rank"], abs=1e-12)
    assert of_embedding["own_over_mean_log_rank"] != 0
    _, rows = _study(tiny, rated, tmp_path / "fedrep", method="fedrep")
    kinds = {row.metric.rpartition("_")[0] for row in rows}
    # Factors of users' own LoRAs have no common basis in which a mean would be a user's.
    assert not {"own_over_mean_log", "lora_alone_log", "own_over_mean"} & kinds


def test_private_steps_are_compared_with_what_was_read(
    tiny: Tiny, rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they add is the gain with them less the gain without, over the same users."""
    monkeypatch.setattr(private_steps, "RATE", 1e8)  # so few rounds leave a LoRA of small factors
    monkeypatch.setattr(private_steps, "LEAST_EVENTS", 4)
    gains, added = [], {}
    for steps in (0, 4):
        _, rows = _study(
            tiny, rated, tmp_path / str(steps), method="pfm", adapters__private__steps=steps
        )
        found = {r.metric: r.value for r in rows if (r.mode, r.task) == OWN}
        gains.append([found["gain_log_rank"], found["gain_ndcg"]])
        added = {name: value for name, value in found.items() if name.startswith("steps_over")}
    differences = dict(zip(("log_rank", "ndcg"), np.subtract(gains[1], gains[0]), strict=True))
    assert added == {f"steps_over_read_{q}": pytest.approx(v) for q, v in differences.items()}
    assert added["steps_over_read_log_rank"] != 0


def test_every_group_has_its_p_values_and_every_auc_its_baselines(
    tiny: Tiny, rated: Path, tmp_path: Path
) -> None:
    run, rows = _study(tiny, rated, tmp_path, method="pfm", regime="fedsgd")
    content = json.loads((run / RESULTS_FILE).read_text())
    groups = {row.metric.removeprefix("harm_") for row in rows if row.metric.startswith("harm_")}
    assert content["harm"].keys() == groups != set()
    for test in content["harm"].values():
        assert 0 < test["p_value"] <= test["adjusted_p_value"] <= 1
    aucs = {row.method: row for row in rows if row.metric == "auc" and row.mode == "none"}
    own = next(row for row in rows if row.metric == "auc" and row.mode == "shared_only")
    assert aucs.keys() == {"like_rate", "like_ridge"}
    for row in aucs.values():
        assert (row.task, row.split, row.candidates) == ("like", "test", "full")
        assert row.num_users == own.num_users  # the same held-out events
    # The run itself reported validation; all that was chosen stands beside it.
    reported = {row["method"] for row in content["rows"] if row["metric"] == "auc"}
    assert reported == {"like_rate", "like_ridge", "pfm"}
    assert {"damping", "l2", "validation_auc"} == content["baselines"]["like_ridge"].keys()
    table = (run / TABLE_FILE).read_text()
    assert "Like AUC [95 %]" in table
    assert "| like_ridge | - |" in table


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("shared_only", {}),
        ("central", {}),
        ("ffa_lora", {}),
        ("local_only", {}),
        ("fedsa_lora", {"adapters__private__head_rank": 0}),
        ("fedrep", {}),
        ("pfm_text", {}),
        ("pfm_embedding", {}),
        ("pfm", {}),
        ("pfm", {"ablation": "no_pass"}),
    ],
)
def test_every_method_runs_and_leaves_untrained_what_it_says(
    tiny: Tiny, rated: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    from pfm_llm.config.methods import SPECS, Method

    run, rows = _study(tiny, rated, tmp_path, method=method, **settings)
    assert {row.method for row in rows if row.mode != "none"} == {method}
    opened, trained = open_run(run)
    for name, start in opened.model.shared.tensors.items():
        moved = not bool((trained.shared.tensors[name] == start).all())
        if not SPECS[Method(method)].trains(name):
            assert not moved, name
    moves = any(
        not bool((trained.shared.tensors[name] == start).all())
        for name, start in opened.model.shared.tensors.items()
    )
    assert moves == (method != "local_only")
    personal = {row.metric for row in rows if row.metric.startswith("gain")}
    assert bool(personal) == opened.config.adapters.private.enabled


def test_where_validation_drops_the_private_part_it_changes_nothing(
    tiny: Tiny, rated: Path, tmp_path: Path
) -> None:
    run, rows = _study(tiny, rated, tmp_path, method="pfm", evaluation__private_weights=[0.0])
    found = {r.metric: r.value for r in rows if r.task == "next_item" and r.mode != "none"}
    for name in ("gain_log_rank", "gain_ndcg", "swap_log_rank", "identification"):
        assert found[name] == pytest.approx(0.0, abs=1e-12)
    assert json.loads((run / RESULTS_FILE).read_text())["private_weight"] == 0.0


@pytest.mark.parametrize(("step", "alone"), [(2, False), (10, True)])
def test_users_who_come_after_training_are_cold_too(
    tiny: Tiny, tmp_path: Path, step: int, alone: bool
) -> None:
    """With one split in time, some have no train event and are asked on test; or one alone is."""
    lines = ["user_id,item_id,timestamp"]
    for late, (user, items) in enumerate(random_histories().items()):
        # Each starts a little later than the one before.
        known = [item for item in items if alone or item != 29]
        lines += [f"{user},i{item},{step * late + place}" for place, item in enumerate(known)]
    if not alone:
        lines.append(f"{user},i29,1000")  # comes late only
    path = tmp_path / "interactions.csv"
    path.write_text("\n".join([*lines, ""]))
    settings = {"data__source": str(path), "data__split": "global_temporal", "method": "pfm"}
    run = run_experiment(tiny.config(tmp_path, evaluation__splits=["validation"], **settings))
    split = open_run(run)[0].data.split
    lengths = np.diff(split.train.interactions.offsets)
    assert (lengths[split.test.users] == 0).any()
    assert (len(split.test.users) == 1) is alone
    found = {row.metric: row for row in study_run(run, "small")}
    assert found["cold_start_1"].num_users == len(split.test.users)
    was_met = set(split.train.interactions.items.tolist())
    waiting = [set(targets.tolist()) - was_met for targets in split.test.targets]
    num_waiting = sum(map(bool, waiting))
    assert bool(num_waiting) is not alone
    assert (found["new_items"].num_users if num_waiting else 0) == num_waiting
    assert ("new_items" in found) is bool(num_waiting)
    assert ("identification" in found) is not alone


def test_averaging_logs_its_error(tiny: Tiny, rated: Path, tmp_path: Path) -> None:
    local = {"shared_local_steps": 4, "shared_optimizer": "adamw", "shared_lr": 1e-2}
    server = {"optimizer": "average"}
    for method, is_exact in (("shared_only", False), ("ffa_lora", True)):
        config = tiny.config(
            tmp_path, data__source=str(rated), **LIKES, method=method, regime="fedavg",
            federation__local=local, federation__server=server,
        )  # fmt: skip
        lines = (run_experiment(config) / "metrics.jsonl").read_text().splitlines()
        errors = [json.loads(line)["aggregation_error"] for line in lines]
        assert (max(errors) < 1e-6) == is_exact


def test_first_events_are_copies_of_the_oldest(tiny_run: Callable[..., Any]) -> None:
    train = tiny_run().data.split.train.interactions
    few = first_events(train, 2)
    for user in range(train.num_users):
        assert few.history(user).tolist() == train.history(user)[:2].tolist()
    assert not np.shares_memory(few.items, train.items)


def test_new_items_are_placed_among_all_and_among_each_other(
    tiny: Tiny, rated: Path, tmp_path: Path
) -> None:
    """Held-out items are new; each of their figures is there, and is what it says it is."""
    settings = {"method": "pfm", "head__item_met": True, "data__hold_out_items": 0.3}
    run, rows = _study(tiny, rated, tmp_path, **settings)
    found = {row.metric: row for row in rows if row.metric.startswith("new_items")}
    places = [f"new_items_{place}" for place in ("percentile", "among_new")]
    kinds = ("", "_shared", "_cosine")
    shares = {f"new_items_in_{name}" for name in ("top_ten", "top_ten_shown", "targets")}
    assert {f"{place}{kind}" for place in places for kind in kinds} | shares <= found.keys()
    assert all(0 <= found[name].value <= 1 for name in (*shares, *places))
    assert -1 <= found["new_items_over_stranger"].value <= 1

    opened, trained = open_run(run)
    held_out = opened.data.split.test
    is_new = np.ones(30, dtype=bool)
    is_new[opened.data.split.train.interactions.items] = False
    assert is_new.sum() >= 9
    asked = [is_new[targets].mean() for targets in held_out.targets]
    assert found["new_items_in_targets"].value == pytest.approx(np.mean(asked))
    assert found["new_items_among_new"].num_users == sum(share > 0 for share in asked)
    assert found["new_items_in_top_ten_shown"].value >= found["new_items_in_top_ten"].value
    ours = Recommender.of_run(opened, trained)
    assert (ours.is_new >= is_new).all()  # not every client takes part
    ours.is_new = is_new
    changes, ids = [], np.array(opened.data.interactions.catalogue.item_ids)
    for user, history, targets in zip(
        held_out.users, held_out.histories, held_out.targets, strict=True
    ):
        own = Recommender.of_run(opened, trained, opened.data.interactions.user_ids[user]).owner
        assert own is not None
        lists = [
            [
                item.item_id
                for item in ours.recommend(
                    ids[history].tolist(), private=own.private, new_share=share
                )
            ]
            for share in (None, 0.0)
        ]
        shown, plain = (
            np.mean(
                [
                    1 / np.log2(2 + found.index(item)) if item in found else 0
                    for item in ids[targets].tolist()
                ]
            )
            for found in lists
        )
        changes.append(shown - plain)
    assert found["new_items_shown_ndcg"].value == pytest.approx(np.mean(changes), abs=1e-9)
    assert any(changes)
    chosen = new_items(opened.data.interactions.catalogue, 0.3)
    assert chosen.sum() == 9
    assert not any(chosen[history].any() for history in held_out.histories)
