"""Evaluation: ranks by brute force, whatever the chunks, and everybody personalised."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import DataError
from pfm_llm.client.histories import ClientHistories
from pfm_llm.config.choices import Task
from pfm_llm.config.running import EvaluationConfig
from pfm_llm.data.history import NO_LABEL, History
from pfm_llm.data.splits import HeldOut, TrainData
from pfm_llm.evaluation import evaluator, ranking, scoring
from pfm_llm.evaluation.candidates import sample_negatives
from pfm_llm.evaluation.evaluator import OUR_MODES, EvaluationTask, Measured
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.private import taste
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.runs.run import Run
from tests.conftest import TinyRun
from tests.support.queries import held_out_of
from tests.support.tiny_models import stirred

STEPS = {"federation__local__personalise_steps": 3, "federation__local__private_lr": 0.05}
# Without adaptive steps nothing hangs on rounding; and each user's shortened history is a query.
SETTINGS = {**STEPS, "federation__local__private_optimizer": "sgd"}


def _task(
    run: Run,
    modes: Sequence[Mode] = OUR_MODES,
    held_out: HeldOut | None = None,
    keep: bool = False,
) -> EvaluationTask:
    held_out = held_out or run.data.split.test
    config = run.config
    return EvaluationTask(
        held_out=held_out,
        negatives=sample_negatives(
            held_out, run.model.model.num_items, config.evaluation.num_negatives, config.seed
        ),
        shared=SharedState(stirred(run.model.shared.tensors, 1, 0.1), 4),
        parts=evaluator.parts_of(modes, config.adapters.private.weight),
        keep=keep,
    )


def _measure(run: Run, task: EvaluationTask, tokens_per_chunk: int = 300) -> Measured:
    chunks = run.evaluator.chunks(task, tokens_per_chunk)
    return evaluator.combine([run.evaluator.rank_chunk(chunk, task) for chunk in chunks])


def _scores_alone(run: Run, task: EvaluationTask, query: int) -> dict[Mode, np.ndarray]:
    """Scores of one query in every mode, in passes of its own."""
    user = int(task.held_out.users[query])
    client_id = run.clients.histories.client_of(user)
    window = run.model.encoder.query_window(task.held_out.query(query).history)
    batch = collate([[window]], [run.clients.cache.states([window], client_id)], last_only=True)
    private = run.clients.trainer.personalise([client_id], task.shared)
    stacked = run.scorer.stack(task.shared, private, 1)
    return {
        mode: (
            run.model.model.zero_shot_scores(batch)
            if parts is None
            else run.model.model.scores(batch, stacked, parts)
        )[0].numpy()
        for mode, parts in task.parts.items()
    }


@pytest.mark.parametrize("split", ["last_fraction", "leave_last_out"])
def test_ranks_equal_brute_force(split: str, tiny_run: TinyRun) -> None:
    """One query at a time; rank = 1 + unseen others that score at least as high."""
    run = tiny_run(data__split=split, data__held_out=0.4, **SETTINGS)
    held_out = evaluator.sample_users(run.data.split.test, 10, seed=0)
    task = _task(run, held_out=held_out)
    measured = _measure(run, task)
    row = 0
    for query, targets in enumerate(task.held_out.targets):
        seen = set(task.held_out.histories[query].tolist())
        for mode, scores in _scores_alone(run, task, query).items():
            for offset, target in enumerate(targets.tolist()):
                others = [i for i in range(30) if i != target and i not in seen]
                negatives = [i for i in task.negatives[row + offset].tolist() if i >= 0]
                found = measured.ranks[mode]
                assert found.users[row + offset] == task.held_out.users[query]
                for ranks, rivals in ((found.full, others), (found.sampled, negatives)):
                    # Another order of summation moves a score by a rounding error.
                    low = 1 + sum(scores[i] > scores[target] + 1e-5 for i in rivals)
                    high = 1 + sum(scores[i] > scores[target] - 1e-5 for i in rivals)
                    assert low <= ranks[row + offset] <= high, (mode, query)
        row += len(targets)
    assert row == len(measured.ranks[Mode.SHARED_ONLY].full)
    by_mode = {tuple(ranks.full.tolist()) for ranks in measured.ranks.values()}
    assert len(by_mode) == len(OUR_MODES)  # every mode scores in its own way


def _equal(a: Ranks, b: Ranks) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("users", "full", "sampled"))


@pytest.mark.parametrize("users_per_client", [1, 5])
def test_the_result_does_not_depend_on_chunks(users_per_client: int, tiny_run: TinyRun) -> None:
    run = tiny_run(data__users_per_client=users_per_client, **SETTINGS)
    task = _task(run)
    small, large = _measure(run, task, 1), _measure(run, task, 10**6)
    assert len(run.evaluator.chunks(task, 1)) == len(run.clients.histories.clients)
    assert len(run.evaluator.chunks(task, 10**6)) == 1
    for mode in OUR_MODES:
        assert _equal(small.ranks[mode], large.ranks[mode]), mode
    assert np.array_equal(small.users, large.users)
    none = np.zeros(0)
    assert replace(small, ranks={}, users=none) == replace(large, ranks={}, users=none)


def test_a_silo_of_many_users_is_ranked_some_users_at_a_time(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Personalised once, with the same figures as at once, and never more than so many scores."""
    run = tiny_run(**SETTINGS, data__users_per_client=24)
    task = _task(run)
    (chunk,) = run.evaluator.chunks(task, 10_000)
    whole = run.evaluator.rank_chunk(chunk, task)
    monkeypatch.setattr(evaluator, "_MOST_QUERIES", 5)
    seen: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        scored = score(*args, **kwargs)
        seen.append(len(scored.order))
        return scored

    score = run.evaluator.score_chunk
    monkeypatch.setattr(run.evaluator, "score_chunk", spy)
    parts = run.evaluator.rank_chunk(chunk, task)
    assert max(seen) == 5
    assert sum(seen) == whole.num_users == parts.num_users
    assert parts.private_steps == whole.private_steps > 0
    assert parts.num_personalised == whole.num_personalised
    one, other = evaluator.combine([whole]), evaluator.combine([parts])
    assert np.array_equal(one.users, other.users)
    for mode in OUR_MODES:
        assert np.array_equal(one.ranks[mode].full, other.ranks[mode].full)
        assert np.array_equal(one.ranks[mode].sampled, other.ranks[mode].sampled)


def test_users_who_never_were_in_a_cohort_are_personalised(tiny_run: TinyRun) -> None:
    """24 clients, 3 steps each; nobody has a private state yet."""
    run = tiny_run(**SETTINGS)
    measured = _measure(run, _task(run))
    assert not any(run.clients.store.versions(c) for c in run.clients.histories.clients)
    assert (measured.num_users, measured.num_personalised) == (24, 24)
    assert measured.private_steps == 24 * 3
    shared, private = (measured.ranks[m] for m in (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE))
    assert not np.array_equal(shared.full, private.full)


def test_without_personalise_steps_private_adapters_are_zero_and_said_to_be(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(federation__local__personalise_steps=0)
    measured = _measure(run, _task(run))
    assert (measured.num_personalised, measured.private_steps) == (0, 0)
    shared, private = (measured.ranks[m] for m in (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE))
    assert np.array_equal(shared.full, private.full)


def test_modes_without_private_parts_train_nobody(tiny_run: TinyRun) -> None:
    run = tiny_run(**SETTINGS)
    task = _task(run, [Mode.ZERO_SHOT, Mode.SHARED_ONLY])
    assert not task.uses_private
    measured = _measure(run, task)
    assert list(measured.ranks) == [Mode.ZERO_SHOT, Mode.SHARED_ONLY]
    assert (measured.num_personalised, measured.private_steps) == (0, 0)
    weightless = replace(task, parts=evaluator.parts_of(OUR_MODES, private_weight=0.0))
    assert not weightless.uses_private


@pytest.mark.parametrize("keep", [True, False])
def test_personalised_adapters_are_kept_for_serving_when_asked(
    keep: bool, tiny_run: TinyRun
) -> None:
    run = tiny_run(**SETTINGS)
    held_out = evaluator.sample_users(run.data.split.test, 6, seed=0)
    task = _task(run, held_out=held_out, keep=keep)
    _measure(run, task, 10**6)
    for client_id in (run.clients.histories.client_of(int(user)) for user in held_out.users):
        state = run.clients.store.load_personalised(client_id)
        assert (state is not None) is keep
        if state is not None:
            assert state.version == 4
            alone = run.clients.trainer.personalise([client_id], task.shared)
            for name, value in state.tensors.items():
                torch.testing.assert_close(value, alone[name][0], atol=1e-5, rtol=1e-5)
        assert run.clients.store.versions(client_id) == ()  # training does not go on from it


def test_clients_of_other_users_are_passed_over(tiny_run: TinyRun) -> None:
    run = tiny_run(data__users_per_client=5, **SETTINGS)
    held_out = evaluator.sample_users(run.data.split.test, 4, seed=0)
    task = _task(run, [Mode.SHARED_ONLY], held_out)
    measured = _measure(run, task)
    assert measured.ranks[Mode.SHARED_ONLY].users.tolist() == held_out.users.tolist()
    everybody = _measure(run, _task(run, [Mode.SHARED_ONLY])).ranks[Mode.SHARED_ONLY]
    kept = np.isin(everybody.users, held_out.users)
    assert np.array_equal(measured.ranks[Mode.SHARED_ONLY].full, everybody.full[kept])


def test_a_large_catalogue_makes_chunks_smaller(tiny_run: TinyRun, monkeypatch) -> None:
    """Room for 150 scores is room for the queries of 5 clients with 30 items; 24 clients: 5."""
    run = tiny_run(**SETTINGS)
    task = _task(run)
    monkeypatch.setattr(scoring, "_SCORES_AT_ONCE", 150)
    assert len(run.evaluator.chunks(task, 10**6)) == 5


def test_clients_without_training_windows_fill_a_chunk_too(tiny_run: TinyRun) -> None:
    """With one item of training history nothing is trained, but the query takes its place."""
    run = tiny_run(data__split="last_fraction", data__held_out=0.99)
    task = _task(run, held_out=run.data.split.validation)
    assert run.clients.histories.trainable == ()
    assert len(run.evaluator.chunks(task, 1)) == 24
    measured = _measure(run, task)
    assert (measured.num_personalised, measured.private_steps) == (0, 0)


def test_a_sample_of_users_is_fixed_and_whole(tiny_run: TinyRun) -> None:
    held_out = tiny_run().data.split.validation
    sample = evaluator.sample_users(held_out, 5, seed=3)
    again = evaluator.sample_users(held_out, 5, seed=3)
    assert sample.users.tolist() == again.users.tolist() == sorted(set(sample.users.tolist()))
    assert len(sample.users) == 5
    for index, user in enumerate(sample.users.tolist()):
        origin = held_out.users.tolist().index(user)
        assert np.array_equal(sample.histories[index], held_out.histories[origin])
        assert np.array_equal(sample.targets[index], held_out.targets[origin])
    other = evaluator.sample_users(held_out, 5, seed=4)
    assert other.users.tolist() != sample.users.tolist()
    assert evaluator.sample_users(held_out, None, seed=3) is held_out
    assert evaluator.sample_users(held_out, 24, seed=3) is held_out


def test_a_sample_keeps_ratings_with_their_users() -> None:
    held_out = held_out_of(histories=[[0], [1], [2]], targets=[[3], [3], [3]])
    rated = replace(held_out, history_ratings=tuple(np.array([u / 2]) for u in range(3)))
    sample = evaluator.sample_users(rated, 2, seed=0)
    assert sample.history_ratings is not None
    assert [r[0] * 2 for r in sample.history_ratings] == sample.users.tolist()


def test_rank_scores_takes_each_querys_own_negatives() -> None:
    """Queries 1 and 0, in this order; of 5 items with scores 5, 4, 3, 2, 1 item i has rank i + 1.

    Query 0 has targets 4 and 1 (seen: 0): full ranks 4 and 1; against negatives 3 and 2, 3.
    Query 1 has target 2 (seen: 1): full rank 2; against negative 4, rank 1.
    """
    held_out = held_out_of(histories=[[0], [1]], targets=[[4, 1], [2]])
    negatives = np.array([[3, 3], [2, 3], [4, -1]])
    scores = np.array([[5.0, 4, 3, 2, 1]] * 2)
    ranks = ranking.rank_scores(scores, held_out, [1, 0], negatives)
    assert ranks.users.tolist() == [1, 0, 0]
    assert ranks.full.tolist() == [2, 4, 1]
    assert ranks.sampled.tolist() == [1, 3, 1]


def test_ranks_of_a_split_do_not_depend_on_the_batches() -> None:
    held_out = held_out_of([[0], [1, 2], [5], [3]], [[4, 1], [5], [0], [5]])

    def score(queries: Sequence[int]) -> np.ndarray:
        """Item i scores i times the length of the history."""
        return np.array([np.arange(6) * len(held_out.histories[q]) for q in queries])

    negatives = np.full((5, 1), -1)
    small, large = (ranking.rank_all(score, held_out, negatives, batch) for batch in (1, 100))
    assert _equal(small, large)
    assert small.full.tolist() == [2, 5, 1, 5, 1]


def test_combine_orders_by_user_and_adds_up() -> None:
    def part(users: list[int], count: int) -> Measured:
        ranks = Ranks(np.array(users), np.array(users) + 1, np.array(users) + 2)
        return Measured(
            ranks={Mode.SHARED_ONLY: ranks},
            users=np.unique(users),
            aucs={Mode.SHARED_ONLY: np.unique(users) / 10},
            like_fits={Mode.SHARED_ONLY: -np.unique(users)},
            choice_fits={Mode.SHARED_ONLY: -np.unique(users) * 2},
            num_personalised=count,
            private_steps=10 * count,
        )

    measured = evaluator.combine([part([4, 1, 1], 2), part([3, 0], 1)])
    ranks = measured.ranks[Mode.SHARED_ONLY]
    assert ranks.users.tolist() == [0, 1, 1, 3, 4]
    assert ranks.full.tolist() == [1, 2, 2, 4, 5]
    assert (measured.num_users, measured.num_personalised, measured.private_steps) == (4, 3, 30)
    assert measured.aucs[Mode.SHARED_ONLY].tolist() == [0.0, 0.1, 0.3, 0.4]
    assert measured.like_fits[Mode.SHARED_ONLY].tolist() == [0, -1, -3, -4]
    assert measured.choice_fits[Mode.SHARED_ONLY].tolist() == [0, -2, -6, -8]
    assert evaluator.combine([]).num_users == 0


def test_parts_of_each_mode() -> None:
    assert evaluator.parts_of(OUR_MODES, 0.5) == {
        Mode.ZERO_SHOT: None,
        Mode.SHARED_ONLY: Parts(shared_lora=True, private_weight=0.0),
        Mode.PRIVATE_ONLY: Parts(shared_lora=False, private_weight=0.5),
        Mode.SHARED_PRIVATE: Parts(shared_lora=True, private_weight=0.5),
    }


def test_result_rows_hold_every_metric_cut_off_and_candidate_set() -> None:
    """Users 0 and 1 with ranks (1), (4, 2): hit rate at 2 is (1 + 1/2) / 2 = 0.75 over users."""
    ranks = Ranks(np.array([0, 1, 1]), np.array([1, 4, 2]), np.array([1, 1, 1]))
    config = EvaluationConfig(ks=(2, 4), bootstrap=20, num_negatives=9)
    what = {"method": "m", "mode": "none", "task": "t", "protocol": "p", "budget": "b"}
    describe = partial(ResultRow, **what, split="test", seed=0)
    rows = ranking.result_rows(ranks, describe, config, seed=0)
    table = {(row.candidates, row.metric, row.k): row for row in rows}
    assert len(table) == len(rows) == 2 * 3 * 2
    assert table["full", "hit_rate", 2].value == pytest.approx(0.75)
    assert table["full", "hit_rate", 4].value == 1.0
    assert table["sampled9", "mrr", 2].value == 1.0
    for row in rows:
        assert row.num_users == 2
        assert row.ci_low <= row.value <= row.ci_high


def test_the_headline_is_ndcg_and_hit_rate_over_the_full_catalogue() -> None:
    """Ranks 1, 3 and 11: NDCG is (1 + 1/log2(4) + 0) / 3 = 0.5."""
    ranks = Ranks(np.array([0, 1, 2]), np.array([1, 3, 11]), np.array([9, 9, 9]))
    assert ranking.headline(ranks) == {
        "ndcg@10": pytest.approx(0.5), "hit_rate@10": pytest.approx(2 / 3),
    }  # fmt: skip
    assert ranking.headline(ranks, 2) == {
        "ndcg@2": pytest.approx(1 / 3), "hit_rate@2": pytest.approx(1 / 3),
    }  # fmt: skip


def test_a_cut_off_that_is_given_twice_is_measured_once() -> None:
    ranks = Ranks(np.array([0]), np.array([1]), np.array([1]))
    what = {"method": "pfm", "mode": "none", "task": "", "protocol": "", "budget": ""}
    describe = partial(ResultRow, **what, split="test", seed=0)
    rows = ranking.result_rows(ranks, describe, EvaluationConfig(ks=(5, 5), bootstrap=2), seed=0)
    assert [row.k for row in rows] == [5] * 6


def test_a_taste_vector_reads_what_the_query_shows_and_no_target(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(method="pfm", data__split="last_fraction")
    split = run.data.split
    found = {}
    for held_out in (split.validation, split.test):
        blind = replace(held_out, targets=tuple(t[::-1] for t in held_out.targets))
        private = [
            run.evaluator.score_chunk(chunk, _task(run, held_out=targets)).private
            for targets in (held_out, blind)
            for chunk in [run.clients.histories.trainable]
        ]
        name = taste.vector_name(Task.NEXT_ITEM)
        assert torch.equal(private[0][name], private[1][name])
        found[held_out.name] = private[0][name]
    task = _task(run)
    on_train = run.clients.trainer.personalise(run.clients.histories.trainable, task.shared)
    assert torch.equal(found["validation"], on_train[taste.vector_name(Task.NEXT_ITEM)])
    assert not torch.allclose(found["test"], found["validation"])


def test_a_history_that_does_not_go_on_from_train_is_refused(
    tiny_run: TinyRun,
) -> None:
    histories = tiny_run(method="pfm").clients.histories
    own, client_id = histories._train.interactions.history(0), histories.client_of(0)
    for refuses in (histories.later_windows, histories.history):
        with pytest.raises(DataError, match="does not begin with the training history"):
            refuses(client_id, History(own[::-1], None))
    assert histories.later_windows(client_id, History(own, None)) == ()
    known = histories.history(client_id)
    assert np.array_equal(known.items, own)
    assert set(known.labels.tolist()) == {NO_LABEL}


def test_a_history_has_all_events_each_with_its_own_label(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    train = run.data.split.train.interactions
    ratings = np.arange(len(train.items), dtype=np.float32) % 6
    histories = ClientHistories(
        list(run.clients.histories.clients.values()),
        TrainData(replace(train, ratings=ratings)),
        run.model.encoder,
        run.clients.cache.states,
        like_threshold=3.0,
    )
    client_id = histories.client_of(1)
    own = slice(train.offsets[1], train.offsets[2])
    known = histories.history(client_id)
    assert known.items.tolist() == train.items[own].tolist()
    assert known.labels.tolist() == [int(r >= 3) for r in ratings[own]]
    grown = History(np.append(known.items, 0), np.append(ratings[own], 5.0))
    assert histories.history(client_id, grown).labels.tolist() == [*known.labels.tolist(), 1]


def test_user_vectors_are_read_out_once_for_all_taste_vectors(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(method="pfm_embedding")
    task = _task(run, [Mode.SHARED_ONLY, Mode.SHARED_PRIVATE])
    chunk = run.clients.histories.trainable[:2]
    evaluator, model = run.evaluator, run.model.model
    private = evaluator.score_chunk(chunk, task).private
    swapped = {name: value.flip(0) for name, value in private.items()}
    expected = [evaluator.score_chunk(chunk, task, own).scores for own in (private, swapped)]
    count, read = 0, model.user_vectors

    def counted(*arguments: Any) -> list[torch.Tensor]:
        nonlocal count
        count += 1
        return read(*arguments)

    monkeypatch.setattr(model, "user_vectors", counted)
    known: UserVectors = {}
    found = [evaluator.score_chunk(chunk, task, own, known).scores for own in (private, swapped)]
    assert count == 1
    for one, other in zip(found, expected, strict=True):
        for mode in task.parts:
            assert np.array_equal(one[mode], other[mode])
    assert not np.array_equal(found[0][Mode.SHARED_PRIVATE], found[1][Mode.SHARED_PRIVATE])
