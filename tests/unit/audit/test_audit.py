"""An audit of the tiny world: what is made by the federation's own code, and what comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.audit import adapter, audit, figures, report, view
from pfm_llm.audit.attacks import Suspects
from pfm_llm.audit.modes import AuditMode, Protection, config_of
from pfm_llm.base.errors import ConfigError
from pfm_llm.model.head import ITEM_IDS, ITEM_MET
from pfm_llm.protocol.types import ClientUpdate, euclidean_norm
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.run import Run
from tests.conftest import TinyConfig, TinyRun
from tests.support.leaks import files_below

PROTECTION = Protection(norm=0.5, noise_multiplier=20.0)
PLAN = audit.Plan(users=16, cohorts=(4, 8, 64), passes=2.0, protection=PROTECTION)
Rows = dict[tuple[str, str, str], dict[str, Any]]


def test_modes_are_settings_of_the_experiment(tiny_config: TinyConfig) -> None:
    own = tiny_config(federation__transport="bfloat16")
    found = {mode: config_of(own, mode, PROTECTION) for mode in AuditMode}
    federations = {mode: config.federation for mode, config in found.items()}
    assert {mode for mode in AuditMode if federations[mode].masks} == {"masks", "all"}
    assert {mode for mode in AuditMode if federations[mode].privacy} == {"noise", "all"}
    assert {mode for mode in AuditMode if federations[mode].stages} == set(AuditMode) - {"clear"}
    assert all(one.transport == "float32" for one in federations.values())
    assert found[AuditMode.CLEAR].head == own.head


def test_a_client_of_many_users_has_no_history_to_attack(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match="users_per_client: 1"):
        audit.audit_config(tiny_config(data__users_per_client=3), PLAN)
    with pytest.raises(ConfigError, match="sends no update"):
        audit.audit_config(tiny_config(method="local_only"), PLAN)


def watched(run: Run, mode: AuditMode) -> tuple[view.Seen, dict[str, Any]]:
    shared = run.new_server().broadcast
    clients = run.clients.histories.trainable[:4]
    updates = {u.client_id: u for u in adapter.updates_of(run, clients, shared, "updates")}
    return view.watch_round(run, shared, updates), updates


def protected(tiny_run: TinyRun, mode: AuditMode) -> Run:
    federation = config_of(tiny_run().config, mode, PROTECTION).federation
    settings = federation.model_dump(mode="json", include={"stages", "masks", "privacy"})
    head = {"head__item_met": False} if mode.is_noisy else {}
    return tiny_run(**{f"federation__{key}": value for key, value in settings.items()}, **head)


def test_in_the_clear_a_message_is_the_update_and_a_sum_their_sum(tiny_run: TinyRun) -> None:
    seen, updates = watched(protected(tiny_run, AuditMode.CLIP), AuditMode.CLIP)
    assert all(euclidean_norm(one.tensors) <= PROTECTION.norm for one in seen.messages)
    for message in seen.messages:
        [client] = message.members
        assert message.tensors is updates[client].delta
        assert message.num_examples == updates[client].num_examples
    for name, tensor in seen.summed.tensors.items():
        expected = sum(one.delta[name].double() for one in updates.values())
        assert torch.allclose(tensor, expected, atol=1e-9)
        assert torch.allclose(seen.released.tensors[name].double(), expected, atol=1e-5)


def test_under_masks_a_message_is_words_and_the_sum_comes_out(tiny_run: TinyRun) -> None:
    seen, updates = watched(protected(tiny_run, AuditMode.MASKS), AuditMode.MASKS)
    flat = torch.cat([t.flatten() for one in seen.messages for t in one.tensors.values()])
    largest = max(float(t.abs().max()) for one in updates.values() for t in one.delta.values())
    assert float(flat.abs().median()) > 10 * largest
    assert abs(float((flat > 0).double().mean()) - 0.5) < 0.02
    assert {one.num_examples for one in seen.messages} == {None}
    assert {c for one in seen.messages for c in one.members} == updates.keys()
    for name, tensor in seen.summed.tensors.items():
        expected = sum(one.delta[name].double() for one in updates.values())
        assert torch.allclose(tensor, expected, atol=1e-7)


def test_noise_is_on_what_is_released_and_not_on_what_the_server_sums(tiny_run: TinyRun) -> None:
    seen, updates = watched(protected(tiny_run, AuditMode.ALL), AuditMode.ALL)
    off = {"summed": 0.0, "released": 0.0}
    for name in seen.summed.tensors:
        expected = sum(one.delta[name].double() for one in updates.values())
        off["summed"] += float((seen.summed.tensors[name] - expected).square().sum())
        off["released"] += float((seen.released.tensors[name].double() - expected).square().sum())
    count = sum(tensor.numel() for tensor in seen.summed.tensors.values())
    deviation = PROTECTION.noise_multiplier * PROTECTION.norm
    assert off["summed"] < 1e-9
    assert (off["released"] / count) ** 0.5 == pytest.approx(deviation, rel=0.1)


def test_an_audit_finds_what_each_mode_leaks(tiny_config: TinyConfig) -> None:
    found = audit.audit_config(tiny_config(method="pfm"), PLAN)
    rows: Rows = {(row["mode"], row["surface"], row["metric"]): row for row in found["rows"]}
    surfaces = {(mode, surface) for mode, surface, _ in rows}
    sums = {f"{kind}_{size}" for kind in ("sum", "released") for size in (4, 8)}
    assert {surface for mode, surface in surfaces if mode == "all"} == {"update", *sums}
    assert {mode for mode, surface in surfaces if surface == "adapter"} == {
        "clear",
        "clip",
        "noise",
    }
    for mode in ("clear", "clip", "noise"):
        assert rows[mode, "update", "items_recall"]["value"] > 0.8
        assert rows[mode, "update", "membership_auc"]["value"] == 1.0
    for mode in ("masks", "all"):
        assert abs(rows[mode, "update", "membership_auc"]["value"] - 0.5) < 0.2
        row = rows[mode, "update", "items_recall"]
        assert abs(row["value"] - row["chance"]) < 0.2
        assert rows[mode, "sum_4", "membership_auc"]["value"] > 0.9
    assert abs(rows["all", "released_4", "membership_auc"]["value"] - 0.5) < 0.2
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values())
    assert found["environment"]["seed"] == 0
    said = report.report(found["rows"])
    assert "clear: leaks items from one message" in said


def test_an_audit_leaves_a_run_as_it_was(tiny_config: TinyConfig) -> None:
    folder = run_experiment(tiny_config())
    private = folder.with_name(f"{folder.name}.private")
    before = files_below(folder), files_below(private)
    plan = audit.Plan(users=8, cohorts=(3,), passes=0.0, protection=PROTECTION)
    found = audit.audit_run(folder, plan)
    assert (files_below(folder), files_below(private)) == before
    assert {row["surface"] for row in found["rows"]} == {"update", "sum_3", "released_3"}


def test_both_halves_are_everybody_and_nobody_is_in_both(tiny_run: TinyRun) -> None:
    run = tiny_run()
    inside, outside = adapter.halves(run)
    assert sorted([*inside, *outside]) == sorted(run.clients.histories.trainable)
    assert len(inside) - len(outside) in (0, 1)


def test_an_adapter_is_of_those_it_was_trained_on_alone(tiny_run: TinyRun) -> None:
    run = tiny_run()
    inside, _ = adapter.halves(run)
    taught: set[str] = set()
    real = run.clients.trainer.train_chunk
    run.clients.trainer.train_chunk = lambda chunk, shared: (  # type: ignore[method-assign]
        taught.update(chunk) or real(chunk, shared)
    )
    trained = adapter.train_on(run, inside, 4.0)
    assert taught <= set(inside)
    assert (
        trained.round_number == 10
    )  # four passes are 12 rounds of 4 clients; `settle` counts tens
    assert any(not torch.equal(t, run.model.shared.tensors[n]) for n, t in trained.tensors.items())


def test_the_auc_of_an_adapter_is_that_of_its_best_score() -> None:
    scores = {"loss": np.zeros(5), "rows": np.array([2.0, 3.0, 1.0, 0.0, 1.5])}
    row = figures.adapter_row(AuditMode.CLEAR, scores, 3)
    assert row.value == pytest.approx(5 / 6)
    assert row.ci_low < row.value <= row.ci_high == 1.0
    assert (row.num_users, row.reader) == (5, "rows")


def test_who_trained_much_is_told_by_the_rows_of_items(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm", head__dropout=0.0)
    inside, outside = adapter.halves(run)
    trained = adapter.train_on(run, inside, 60.0)
    row = figures.adapter_row(
        AuditMode.CLEAR, adapter.marks(run, [*inside, *outside], trained, "users"), len(inside)
    )
    assert row.value > 0.75


def test_a_sentence_says_what_leaks_by_a_margin_over_chance() -> None:
    def row(surface: str, metric: str, value: float, chance: float) -> dict[str, Any]:
        return {
            "mode": "noise", "surface": surface, "metric": metric, "value": value,
            "ci_low": value, "ci_high": value, "chance": chance,
        }  # fmt: skip

    rows = [
        row("update", "items_precision", 1.0, 0.1),
        row("update", "items_recall", 1.0, 0.1),
        row("update", "membership_auc", 1.0, 0.5),
        row("released_8", "items_precision", 0.31, 0.3),
        row("released_8", "items_recall", 0.42, 0.4),
        row("released_8", "membership_auc", 0.54, 0.5),
        row("adapter", "membership_auc", 0.56, 0.5),
    ]
    assert report.sentence(AuditMode.NOISE, rows) == (
        "noise: leaks items from one message, who is in one message, who trained the adapter; "
        "keeps items from what is released of 8, who is in what is released of 8"
    )


def test_figures_name_no_user(tiny_config: TinyConfig, tmp_path: Path) -> None:
    plan = audit.Plan(users=8, cohorts=(3,), passes=0.0, protection=PROTECTION)
    found = str(audit.audit_config(tiny_config(), plan))
    assert "user-" not in found


def test_a_reader_that_takes_everything_is_not_the_best() -> None:
    met = torch.zeros(6)
    met[[1, 4]] = 1e-3
    everywhere = torch.ones(6, 3)
    delta = {ITEM_MET: met, ITEM_IDS: everywhere}
    other = {ITEM_MET: torch.zeros(6), ITEM_IDS: -everywhere}
    updates = {c: ClientUpdate(c, 1, "h", 9, 1.0, d) for c, d in (("a", delta), ("b", other))}
    histories = {"a": frozenset({1, 2, 4}), "b": frozenset({0})}
    found = figures.Findings(AuditMode.CLEAR, "update", histories, torch.eye(6), 9)
    found.add(view.View(delta, frozenset("a"), 9), Suspects(updates))
    rows = {row.metric: row for row in found.rows()}
    assert rows["items_precision"].reader == rows["items_recall"].reader == ITEM_MET
    assert rows["items_precision"].value == 1.0
    assert rows["items_recall"].value == pytest.approx(2 / 3)
    assert rows["items_recall"].chance == pytest.approx(2 / 6)
    assert rows["membership_auc"].value == 1.0


def test_a_figure_above_chance_by_chance_is_no_leak() -> None:
    row = {"mode": "noise", "surface": "adapter", "metric": "membership_auc", "chance": 0.5}
    figures_of = {"value": 0.58, "ci_low": 0.49, "ci_high": 0.66}
    assert report.sentence(AuditMode.NOISE, [{**row, **figures_of}]) == (
        "noise: keeps who trained the adapter"
    )
