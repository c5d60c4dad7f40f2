"""Scoring histories: alone, together, some items alone, and for a user as for an evaluation."""

import numpy as np

from pfm_llm.data.history import History
from pfm_llm.evaluation.evaluator import OUR_MODES, parts_of
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.protocol.types import Mode, PrivateState
from pfm_llm.recommender import Recommender
from pfm_llm.runs.measuring import evaluation_task
from tests.conftest import TinyRun

HISTORIES = {
    "a": [History(np.array([3, 4, 6])), History(np.array([1]))],
    "b": [History(np.array([9, 8, 7, 6, 5, 4, 3, 2]))],
}


def test_each_history_scores_as_if_alone(tiny_run: TinyRun) -> None:
    run = tiny_run()
    modes = parts_of([Mode.ZERO_SHOT, Mode.SHARED_ONLY], 1.0)
    stacked = [run.scorer.stack(run.model.shared, {}, count) for count in (1, 2)]
    together = run.scorer.score(HISTORIES, stacked[1], modes)
    alone = [
        run.scorer.score({client: [history]}, stacked[0], modes)
        for client, own in HISTORIES.items()
        for history in own
    ]
    for mode in modes:
        assert together[mode].shape == (3, 30)
        expected = np.concatenate([scores[mode] for scores in alone])
        np.testing.assert_allclose(together[mode], expected, atol=1e-5)


def test_candidates_are_columns_of_the_catalogue(tiny_run: TinyRun) -> None:
    run = tiny_run()
    modes, stacked = parts_of(OUR_MODES[:2], 1.0), run.scorer.stack(run.model.shared, {}, 2)
    some = run.scorer.score(HISTORIES, stacked, modes, np.array([20, 2, 11]))
    for mode, scores in run.scorer.score(HISTORIES, stacked, modes).items():
        np.testing.assert_array_equal(some[mode], scores[:, [20, 2, 11]])


def test_known_vectors_belong_to_clients_and_to_the_shared_lora(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm_embedding")
    known: UserVectors = {}
    stacked = run.scorer.stack(run.model.shared, {}, 2)
    run.scorer.score(HISTORIES, stacked, parts_of([Mode.SHARED_ONLY], 1.0), known=known)
    assert {key: [len(v) for v in found] for key, found in known.items()} == {
        (("a", "b"), True): [2, 1]
    }


def test_a_user_is_served_by_the_scores_that_an_evaluation_ranks(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    trained = run.as_set(run.model.shared)
    task = evaluation_task(run, trained, run.data.split.test, [Mode.SHARED_PRIVATE])
    client_id = run.clients.histories.client_of(int(task.held_out.users[0]))
    scored = run.evaluator.score_chunk([client_id], task)
    state = PrivateState(client_id, 0, {name: value[0] for name, value in scored.private.items()})
    assert any(bool(tensor.any()) for tensor in state.tensors.values())
    model = Recommender.of_run(run, trained)
    history = [model.catalogue.item_ids[i] for i in task.held_out.histories[0]]
    served = model.score(history, private=state)
    np.testing.assert_array_equal(served, scored.scores[Mode.SHARED_PRIVATE][0])
