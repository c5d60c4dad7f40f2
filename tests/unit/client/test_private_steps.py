"""Private steps: each client's own, and kept where its own past speaks for them."""

from collections.abc import Mapping

import pytest
import torch

from pfm_llm.client.private_steps import EARLIER, LEAST_EVENTS, PrivateSteps
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.config.settings import with_setting
from pfm_llm.data.history import History
from pfm_llm.protocol.types import SharedState
from pfm_llm.runs.run import Run, make_trainer
from tests.conftest import TinyRun
from tests.support.tiny_models import stirred


@pytest.fixture
def run(tiny_run: TinyRun) -> Run:
    return tiny_run(method="pfm", adapters__private__steps=4)


@pytest.fixture
def shared(run: Run) -> SharedState:
    """A state in which every factor of the LoRA has an effect."""
    return SharedState(stirred(run.model.shared.tensors, seed=3), 5)


@pytest.fixture
def clients(run: Run) -> list[tuple[str, History]]:
    """The clients with enough events, each with its training history."""
    histories = run.clients.histories
    found = [(client_id, histories.history(client_id)) for client_id in histories.clients]
    return [(client_id, own) for client_id, own in found if len(own) >= LEAST_EVENTS]


@pytest.fixture
def steps(run: Run) -> PrivateSteps:
    return PrivateSteps(run.config, run.model.model, run.clients.histories)


def _trainer(run: Run, steps: int) -> LocalTrainer:
    config = with_setting(run.config, "adapters.private.steps", steps)
    return make_trainer(config, run.model, run.clients.histories, run.clients.store)


def _fit(
    run: Run, shared: SharedState, clients: list[tuple[str, History]], steps: int
) -> dict[str, torch.Tensor]:
    chunk = [client_id for client_id, _ in clients]
    return _trainer(run, steps).fit(chunk, shared, [None] * len(chunk))


def _changed(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[bool]:
    """Whether any tensor of each client differs."""
    differ = [(one[name] != value).flatten(1).any(1) for name, value in other.items()]
    found: list[bool] = torch.stack(differ).any(0).tolist()
    return found


def test_a_chunk_takes_the_steps_of_each_client_by_itself(
    steps: PrivateSteps, shared: SharedState, clients: list[tuple[str, History]]
) -> None:
    together = steps._changes(clients[:4], shared)
    for c, client in enumerate(clients[:4]):
        for name, change in steps._changes([client], shared).items():
            assert change.any()
            torch.testing.assert_close(together[name][c], change[0], atol=1e-5, rtol=1e-3)


def test_steps_lower_the_loss_that_they_are_taken_on(
    steps: PrivateSteps, shared: SharedState, clients: list[tuple[str, History]]
) -> None:
    changes = steps._changes(clients, shared)
    losses = steps._losses(clients, [0] * len(clients), shared)
    assert (torch.stack(losses(changes)) < torch.stack(losses({}))).all()


def test_steps_are_kept_where_the_earlier_past_taught_them_for_the_later_one(
    run: Run, steps: PrivateSteps, shared: SharedState, clients: list[tuple[str, History]]
) -> None:
    """The reference asks one client at a time, and takes the steps of the whole history."""
    read, stepped = (_fit(run, shared, clients, number) for number in (0, 4))
    changed = _changed(stepped, read)
    assert len(clients) > sum(changed) > 0
    for c, (client_id, history) in enumerate(clients):
        start = int(EARLIER * len(history))
        taught = steps._changes([(client_id, history[:start])], shared)
        losses = steps._losses([(client_id, history)], [start], shared)
        assert changed[c] == bool(losses(taught)[0] < losses({})[0])
        if changed[c]:
            whole = steps._changes([(client_id, history)], shared)
            for name, change in whole.items():
                torch.testing.assert_close(
                    stepped[name][c], read[name][c] + change[0], atol=1e-5, rtol=1e-3
                )
    # The embedding takes no step.
    embedding = "private.taste.next_item"
    assert torch.equal(stepped[embedding], read[embedding])


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_guard_keeps_what_was_read_where_steps_hurt(
    steps: PrivateSteps,
    shared: SharedState,
    clients: list[tuple[str, History]],
    monkeypatch: pytest.MonkeyPatch,
    sign: int,
) -> None:
    """A little up the gradient of the later part hurts everybody there, a little down nobody."""
    starts = [int(EARLIER * len(history)) for _, history in clients]
    losses = steps._losses(clients, starts, shared)
    at = {
        name: zero.repeat(len(clients), 1).requires_grad_() for name, zero in steps._zeros.items()
    }
    slopes = torch.autograd.grad(torch.stack(losses(at)).sum(), list(at.values()))
    taught = {name: sign * 0.01 * slope for name, slope in zip(at, slopes, strict=True)}
    monkeypatch.setattr(steps, "_changes", lambda *_: taught)
    assert steps._helped(clients, shared) == [sign < 0] * len(clients)


def test_a_short_history_keeps_what_was_read(
    run: Run, steps: PrivateSteps, shared: SharedState, clients: list[tuple[str, History]]
) -> None:
    chunk = [client_id for client_id, _ in clients]
    read = _fit(run, shared, clients, 0)
    for length in (0, 1, 2, LEAST_EVENTS - 1):
        short = [history[:length] for _, history in clients]
        assert not any(_changed(steps(chunk, short, shared, read), read))
    whole = [history for _, history in clients]
    assert any(_changed(steps(chunk, whole, shared, read), read))


def test_the_same_history_gives_the_same_bits_and_changes_nothing_shared(
    run: Run, shared: SharedState, clients: list[tuple[str, History]]
) -> None:
    before = {name: value.clone() for name, value in shared.tensors.items()}
    one, other = (_fit(run, shared, clients, 4) for _ in range(2))
    assert not any(_changed(one, other))
    assert all(torch.equal(value, before[name]) for name, value in shared.tensors.items())
    assert not any(value.requires_grad for value in one.values())


def test_steps_count_as_work_and_as_memory(run: Run, clients: list[tuple[str, History]]) -> None:
    client_id = clients[0][0]
    reads, steps = (_trainer(run, number) for number in (0, 4))
    assert reads.personalise_steps([client_id]) == reads.personalise_tokens(client_id) == 0
    assert steps.personalise_steps([client_id]) == 8  # four before the guard, four after it
    assert steps.personalise_tokens(client_id) == run.clients.histories.num_tokens(client_id)
