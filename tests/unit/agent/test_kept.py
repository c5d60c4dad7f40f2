"""What is kept of a history: one user's own, used again, and of no effect on what is shown."""

from collections.abc import Callable

import numpy as np
import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.data.history import History
from pfm_llm.model.layers import CohortLayers
from pfm_llm.model.private.last_layer import LastTokens
from pfm_llm.recommender import Recommender
from pfm_llm.recommender.serving import Served

HISTORIES = [History(np.array(items)) for items in ([3, 8, 1], [20, 4], [5, 6, 7, 9, 2])]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The users of each run of all layers."""
    found: list[int] = []
    run: Callable[..., object] = CohortLayers._run

    def noted(self: CohortLayers, hidden: object, sight: object) -> object:
        found.append(len(hidden))  # type: ignore[arg-type]
        return run(self, hidden, sight)

    monkeypatch.setattr(CohortLayers, "_run", noted)
    return found


def test_what_is_kept_changes_no_score_and_spares_the_layers(
    model: Recommender, runs: list[int]
) -> None:
    serving, kept = model.serving, [LastTokens() for _ in HISTORIES]
    private = serving.fit(HISTORIES)
    plain = [Served(*one) for one in zip(HISTORIES, private, strict=True)]
    keeping = [Served(*one) for one in zip(HISTORIES, private, kept, strict=True)]
    expected = [serving.scores(plain, weight) for weight in (None, 0.4)]
    assert runs == [3, 3]
    serving.scores([Served(keeping[1].history, None, kept[1])])
    np.testing.assert_allclose(serving.scores(keeping), expected[0], atol=1e-5)
    assert runs[2:] == [1, 2]  # for the two who were not read yet
    np.testing.assert_allclose(serving.scores(keeping[::-1], 0.4), expected[1][::-1], atol=1e-5)
    assert len(runs) == 4
    np.testing.assert_array_equal(serving.scores(plain), expected[0])


def test_what_is_kept_of_another_history_is_seen(model: Recommender) -> None:
    """The tests of many users fail where what is kept reaches somebody else."""
    one, other = (Served(history, None, LastTokens()) for history in HISTORIES[:2])
    expected = model.serving.scores([one, other])
    mixed = [Served(one.history, None, other.kept), Served(other.history, None, one.kept)]
    assert np.abs(model.serving.scores(mixed) - expected).max() > 1e-3


def test_an_agent_reads_a_history_once(agent: PersonalAgent, runs: list[int]) -> None:
    first = agent.recommend(5)
    assert runs == [1]
    agent.recommend(5, weight=0.3)
    assert agent.recommend(5) == first
    assert runs == [1]
    agent.feedback(first[0].item_id, "like")
    agent.recommend(5)
    assert runs == [1, 1]
