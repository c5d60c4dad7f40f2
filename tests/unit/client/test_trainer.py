"""Local training: what moves and when, chunks that do not matter, and clients kept apart."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.client import histories as histories_module
from pfm_llm.client.histories import LocalWork, most_windows
from pfm_llm.client.local_steps import StackedOptimizer
from pfm_llm.client.trainer import plan_chunks
from pfm_llm.config.choices import Schedule
from pfm_llm.model.batches import ChunkBatch, Dropout, collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.private import taste
from pfm_llm.protocol.types import ClientUpdate, PrivateState, SharedState
from pfm_llm.runs.run import Run
from pfm_llm.text.encoding import Window
from tests.conftest import TinyRun

JOINT, ALTERNATE, AFTER = Schedule.JOINT, Schedule.ALTERNATE, Schedule.PRIVATE_AFTER
BOTH, SHARED, PRIVATE = (True, True), (True, False), (False, True)


@pytest.mark.parametrize(
    ("schedule", "shared", "private", "plan"),
    [
        (JOINT, 2, 2, [BOTH, BOTH]),
        (JOINT, 1, 3, [BOTH, PRIVATE, PRIVATE]),
        (JOINT, 2, 0, [SHARED, SHARED]),
        (ALTERNATE, 1, 2, [PRIVATE, PRIVATE, SHARED]),
        (ALTERNATE, 1, 0, [SHARED]),
        (ALTERNATE, 0, 3, [PRIVATE] * 3),
        (AFTER, 2, 5, [SHARED, SHARED]),
    ],
)
def test_the_plan_of_each_schedule(
    schedule: Schedule, shared: int, private: int, plan: list[tuple[bool, bool]]
) -> None:
    assert LocalWork(shared, private, schedule, "x", None).plan() == plan


@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 30), max_size=12),
    limit=st.integers(1, 40),
    seed=st.randoms(use_true_random=False),
)
def test_chunks_hold_every_client_once_within_the_limit(
    sizes: dict[str, int], limit: int, seed: Any
) -> None:
    chunks = plan_chunks(sizes, sizes.__getitem__, limit)
    assert sorted(client for chunk in chunks for client in chunk) == sorted(sizes)
    assert all(chunks)
    for chunk in chunks:
        assert len(chunk) == 1 or sum(sizes[client] for client in chunk) <= limit
    order = [sizes[client] for chunk in chunks for client in chunk]
    assert order == sorted(order)
    shuffled = list(sizes)
    seed.shuffle(shuffled)
    assert plan_chunks(shuffled, sizes.__getitem__, limit) == chunks


def _train(
    run: Run, chunks: Sequence[Sequence[str]] | None = None, round_number: int = 1
) -> dict[str, ClientUpdate]:
    chunks = chunks or run.clients.trainer.chunks(run.clients.histories.trainable)
    shared = SharedState(run.model.shared.tensors, round_number - 1)
    return {
        update.client_id: update
        for chunk in chunks
        for update in run.clients.trainer.train_chunk(chunk, shared)
    }


def _private(run: Run, client_id: str) -> Mapping[str, torch.Tensor]:
    state = run.clients.store.load(client_id)
    assert state is not None
    return state.tensors


def _same(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[n], expected[n], atol=tolerance, rtol=tolerance) for n in expected
    )


DROPOUT = {
    "head__dropout": 0.2,
    "adapters__shared__dropout": 0.3,
    "adapters__private__dropout": 0.1,
}
# An adaptive step would turn the rounding of a zero into a step of full length.
PLAIN = {"federation__local__private_optimizer": "sgd"}


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("schedule", [JOINT, ALTERNATE])
def test_chunk_size_does_not_matter(
    schedule: Schedule, dropout: dict[str, float], tiny_run: TinyRun
) -> None:
    """Ten clients alone, in a few chunks, and in one."""
    settings = {"federation__local__schedule": schedule.value, **PLAIN, **dropout}
    runs = []
    for tokens in (1, 300, 10**6):
        run = tiny_run(runtime__tokens_per_chunk=tokens, **settings)
        chunks = run.clients.trainer.chunks(run.clients.histories.trainable[:10])
        runs.append((len(chunks), _train(run, chunks), run))
    assert [count for count, *_ in runs][::2] == [10, 1]
    assert 1 < runs[1][0] < 10
    _, expected, reference = runs[0]
    for _, found, run in runs[1:]:
        for client_id, update in expected.items():
            assert _same(found[client_id].delta, update.delta, 1e-5)
            assert found[client_id].loss == pytest.approx(update.loss, abs=1e-5)
            assert found[client_id].num_examples == update.num_examples
            assert _same(_private(run, client_id), _private(reference, client_id), 1e-5)


def test_a_clients_update_and_private_state_do_not_depend_on_the_company(
    tiny_run: TinyRun,
) -> None:
    first, second = tiny_run(**PLAIN), tiny_run(**PLAIN)
    one, *others = first.clients.histories.trainable
    mine = _train(first, [(one, *others[:3])])[one]
    theirs = _train(second, [(one, *others[5:7])])[one]
    assert _same(mine.delta, theirs.delta, 1e-5)
    assert _same(_private(first, one), _private(second, one), 1e-5)


def test_an_update_says_what_it_was_trained_on(tiny_run: TinyRun) -> None:
    """Every transition of the training history is an example."""
    run = tiny_run()
    offsets = run.data.split.train.interactions.offsets
    client_id = run.clients.histories.trainable[3]
    (update,) = run.clients.trainer.train_chunk(
        [client_id], SharedState(run.model.shared.tensors, 6)
    )
    user = run.clients.histories.clients[client_id].users[0]
    assert update.num_examples == offsets[user + 1] - offsets[user] - 1
    assert (update.client_id, update.round_number) == (client_id, 7)
    assert math.isfinite(update.loss)
    assert update.delta.keys() == run.model.shared.tensors.keys()
    assert any(delta.any() for delta in update.delta.values())
    run.model.contract.check(update, 7)


def test_sgd_with_one_joint_step_sends_minus_lr_times_the_gradient(
    tiny_run: TinyRun,
) -> None:
    """The reference is autograd over one client's loss, without stacks or optimizers."""
    run = tiny_run(federation__local__schedule="joint", federation__local__shared_lr=0.5, **PLAIN)
    client_id = run.clients.histories.trainable[0]
    (update,) = run.clients.trainer.train_chunk([client_id], run.model.shared)
    private = run.model.private.initial(client_id)
    leaves = {
        name: value[None].clone().requires_grad_()
        for name, value in {**run.model.shared.tensors, **private}.items()
    }
    windows = run.clients.histories.windows(client_id)
    horizon = run.config.federation.local.horizon
    states = run.clients.cache.states(windows, client_id)
    batch = collate([windows], [states], horizon=horizon)
    (loss,) = run.model.model.losses(batch, leaves, Parts())
    loss.backward()
    assert update.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, delta in update.delta.items():
        torch.testing.assert_close(delta, -0.5 * leaves[name].grad[0], atol=1e-6, rtol=1e-4)
    after = _private(run, client_id)
    for name, value in private.items():
        expected = value - run.config.federation.local.private_lr * leaves[name].grad[0]
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-4)


def test_private_after_and_a_disabled_adapter_leave_the_store_empty(
    tiny_run: TinyRun,
) -> None:
    for settings in (
        {"federation__local__schedule": "private_after"},
        {"adapters__private__enabled": False},
        {"federation__local__private_local_steps": 0},
    ):
        run = tiny_run(**settings)
        updates = _train(run)
        assert len(updates) == 24
        assert not any(run.clients.store.versions(client_id) for client_id in updates)


def test_alternate_fits_the_private_part_before_the_shared_step(
    tiny_run: TinyRun,
) -> None:
    """The reported loss is the one before the shared step: lower with more private steps."""
    local = "federation__local__private_"
    few, many = (
        tiny_run(**{f"{local}local_steps": steps, f"{local}lr": 0.02}, window__reading="tokens")
        for steps in (1, 20)
    )
    client_id = few.clients.histories.trainable[0]
    losses = [_train(run, [[client_id]])[client_id].loss for run in (few, many)]
    assert losses[1] < losses[0] - 0.1


def test_training_goes_on_from_the_newest_private_state_that_counts(
    tiny_run: TinyRun,
) -> None:
    """Round 3 starts from the state after round 1; one from a discarded future is passed over."""
    run = tiny_run(**PLAIN)
    client_id = run.clients.histories.trainable[0]
    _train(run, [[client_id]], round_number=1)
    first = run.clients.store.load(client_id)
    assert first is not None
    assert first.version == 1
    poison = {name: value * torch.nan for name, value in first.tensors.items()}
    run.clients.store.save(PrivateState(client_id, 5, poison))
    update = _train(run, [[client_id]], round_number=3)[client_id]
    third = run.clients.store.load(client_id, version=3)
    assert third is not None
    assert math.isfinite(update.loss)
    change = max(float((third.tensors[n] - v).abs().max()) for n, v in first.tensors.items())
    assert 0 < change < 0.1


def test_a_client_that_diverges_spoils_neither_the_others_nor_its_own_store(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run, clean = tiny_run(**PLAIN), tiny_run(**PLAIN)
    chunk = run.clients.histories.trainable[:3]
    initial = run.model.private.initial(chunk[0])
    poison = {name: torch.full_like(value, torch.nan) for name, value in initial.items()}
    run.clients.store.save(PrivateState(chunk[0], 1, poison))
    found = _train(run, [chunk], round_number=2)
    expected = _train(clean, [chunk], round_number=2)
    for client_id in chunk[1:]:
        assert _same(found[client_id].delta, expected[client_id].delta, 1e-6)
        assert found[client_id].loss == pytest.approx(expected[client_id].loss)
        assert _same(_private(run, client_id), _private(clean, client_id), 1e-6)
    assert math.isnan(found[chunk[0]].loss)
    assert run.clients.store.versions(chunk[0]) == (1,)
    assert f"client {chunk[0]}: private step was not finite" in caplog.text


def test_losses_of_the_first_shared_step_are_reported_when_the_first_client_diverges(
    tiny_run: TinyRun,
) -> None:
    """With several shared steps the others' losses stay those of the first."""
    settings = {**PLAIN, "federation__local__shared_local_steps": 3}
    run, clean = tiny_run(**settings), tiny_run(**settings)
    chunk = run.clients.histories.trainable[:2]
    initial = run.model.private.initial(chunk[0])
    poison = {name: torch.full_like(value, torch.nan) for name, value in initial.items()}
    run.clients.store.save(PrivateState(chunk[0], 0, poison))
    found, expected = _train(run, [chunk]), _train(clean, [chunk])
    assert found[chunk[1]].loss == pytest.approx(expected[chunk[1]].loss, abs=1e-6)


def test_clipping_and_adaptive_shared_steps_run_in_every_schedule(
    tiny_run: TinyRun,
) -> None:
    """AdamW's first step moves an entry by lr at most, however many private steps came before."""
    run = tiny_run(
        federation__local__shared_optimizer="adamw",
        federation__local__shared_lr=0.01,
        federation__local__private_local_steps=3,
        federation__local__max_grad_norm=1.0,
    )
    client_id = run.clients.histories.trainable[0]
    update = _train(run, [[client_id]])[client_id]
    largest = max(float(delta.abs().max()) for delta in update.delta.values())
    assert largest == pytest.approx(0.01, rel=1e-3)


def test_clients_without_a_transition_are_not_trainable(tiny_run: TinyRun) -> None:
    """min_interactions 3 leaves a training history of one item to the shortest users."""
    run = tiny_run(data__split="leave_last_out", data__min_interactions=3)
    offsets = run.data.split.train.interactions.offsets
    for client_id, client in run.clients.histories.clients.items():
        lengths = [offsets[user + 1] - offsets[user] for user in client.users]
        trainable = any(length >= 2 for length in lengths)
        assert (client_id in run.clients.histories.trainable) is trainable
        assert bool(run.clients.histories.windows(client_id)) is trainable


def test_a_silo_holds_the_windows_of_all_its_users(tiny_run: TinyRun) -> None:
    run = tiny_run(data__users_per_client=5)
    assert len(run.clients.histories.clients) == 5  # 24 users: four of 5 and one of 4
    train = run.data.split.train.interactions
    for client_id, client in run.clients.histories.clients.items():
        windows = run.clients.histories.windows(client_id)
        expected = sum(max(0, len(train.history(user)) - 1) for user in client.users)
        assert sum(window.num_targets for window in windows) == expected
        assert all(run.clients.histories.client_of(user) == client_id for user in client.users)
        longest = max(len(window.tokens) for window in windows)
        assert run.clients.histories.num_tokens(client_id) == len(windows) * longest
    assert len(_train(run)) == 5


def test_windows_per_step_go_round_all_windows(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 windows, 2 a step, 5 steps: every window is read exactly twice, none twice in a step."""
    run = tiny_run(
        window__items=2,
        federation__local__windows_per_step=2,
        federation__local__shared_local_steps=5,
        federation__local__private_local_steps=0,
    )
    client_id = next(
        c for c in run.clients.histories.clients if len(run.clients.histories.windows(c)) == 5
    )
    seen: list[list[tuple[int, ...]]] = []

    def spy(windows: Sequence[Sequence[Window]], states: Any, horizon: int) -> ChunkBatch:
        seen.append([tuple(window.items.tolist()) for window in windows[0]])
        return collate(windows, states, horizon=horizon)

    monkeypatch.setattr(histories_module, "collate", spy)
    _train(run, [[client_id]])
    assert [len(set(step)) for step in seen] == [2] * 5
    assert list(Counter(key for step in seen for key in step).values()) == [2] * 5
    first_order = list(seen)
    seen.clear()
    _train(run, [[client_id]], round_number=2)
    assert seen != first_order  # another round, another order


def test_a_step_reads_a_bounded_number_of_windows_of_a_long_history(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A history of any length takes bounded memory; a shorter one is read whole, as ever."""
    monkeypatch.setattr(histories_module, "MOST_WINDOWS", 3)
    run = tiny_run(window__items=2)
    number = {c: len(run.clients.histories.windows(c)) for c in run.clients.histories.trainable}
    chunk = [next(c for c, n in number.items() if n == wanted) for wanted in (2, 3, 5)]
    seen: list[list[int]] = []

    def spy(windows: Sequence[Sequence[Window]], states: Any, horizon: int) -> ChunkBatch:
        seen.append([len(own) for own in windows])
        return collate(windows, states, horizon=horizon)

    monkeypatch.setattr(histories_module, "collate", spy)
    _train(run, [chunk])
    assert seen
    assert all(counts == [2, 3, 3] for counts in seen)
    longest = max(len(window.tokens) for window in run.clients.histories.windows(chunk[2]))
    assert run.clients.trainer.personalise_tokens(chunk[2]) <= 3 * longest


def test_personalise_fits_a_copy_and_leaves_store_and_shared_state(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(federation__local__personalise_steps=3, federation__local__private_lr=0.05)
    chunk = run.clients.histories.trainable[:3]
    before = {n: v.clone() for n, v in run.model.shared.tensors.items()}
    private = run.clients.trainer.personalise(chunk, SharedState(run.model.shared.tensors, 4))
    assert run.clients.trainer.personalise_steps(chunk) == 9
    assert not any(
        run.clients.store.load(c) or run.clients.store.load_personalised(c) for c in chunk
    )
    assert _same(run.model.shared.tensors, before, 0.0)
    assert all(name.startswith("private.") for name in private)
    for client in range(3):
        fitted = [v[client] for n, v in private.items() if n.endswith(".B")]
        assert all(value.any() for value in fitted)
    assert not torch.equal(*private["private.head.B"][:2])


def test_personalise_without_steps_keeps_what_there_is(tiny_run: TinyRun) -> None:
    run = tiny_run(federation__local__personalise_steps=0)
    chunk = run.clients.histories.trainable[:2]
    private = run.clients.trainer.personalise(chunk, SharedState(run.model.shared.tensors, 4))
    initial = run.model.private.initial(chunk[1])
    assert _same({n: v[1] for n, v in private.items()}, initial, 0.0)
    assert run.clients.trainer.personalise_steps(chunk) == 0


def test_a_fit_in_closed_form_takes_no_steps(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm", federation__local__personalise_steps=3)
    chunk = run.clients.histories.trainable[:2]
    private = run.clients.trainer.personalise(chunk, run.model.shared)
    assert private["private.taste.next_item"].any()
    assert run.clients.trainer.personalise_steps(chunk) == 0


@pytest.mark.parametrize("max_windows", [{}, {"window__max_windows": 1}])
def test_what_is_read_needs_no_pass_over_any_text(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, max_windows: dict[str, int]
) -> None:
    """It equals what the same batch gives after a pass, and the oldest windows are not needed."""
    run = tiny_run(method="pfm", **max_windows)
    chunk, shared = run.clients.histories.trainable[:3], run.model.shared
    whole = tiny_run(method="pfm").clients.histories
    windows = [whole.windows(client_id) for client_id in chunk]
    batch = collate(windows, [whole.trunk_states(c) for c in chunk])
    stacked = run.scorer.stack(shared, {}, len(chunk))
    expected = run.model.model.fit(batch, stacked)

    def fail(*_: object) -> None:
        raise AssertionError("the trunk was read")

    monkeypatch.setattr(run.clients.histories, "trunk_states", fail)
    private = run.clients.trainer.personalise(chunk, shared)
    assert _same(private, expected, 0.0)
    assert all(private["private.taste.next_item"].any(1))


def test_personalise_keeps_the_whole_old_adapter_of_a_client_whose_fit_diverges(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factor that is not a number must not be mixed with fitted ones."""
    run = tiny_run(federation__local__personalise_steps=1, window__reading="tokens")
    step = StackedOptimizer.step

    def diverging(*args: Any) -> dict[str, torch.Tensor]:
        new = {name: value.detach() for name, value in step(*args).items()}
        if new:
            new["private.head.B"][0] = torch.nan
        return new

    monkeypatch.setattr(StackedOptimizer, "step", diverging)
    chunk = run.clients.histories.trainable[:2]
    private = run.clients.trainer.personalise(chunk, SharedState(run.model.shared.tensors, 1))
    initial = run.model.private.initial(chunk[0])
    assert _same({name: value[0] for name, value in private.items()}, initial, 0.0)
    assert all(value[1].any() for value in private.values())


def test_every_client_and_step_draws_dropout_of_its_own(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 clients, a private and a shared step."""
    drawn: list[torch.Generator] = []

    def kept(*rates: float, generators: list[torch.Generator], items: float) -> Dropout:
        drawn.extend(generators)
        return Dropout(*rates, generators=generators, items=items)

    monkeypatch.setattr(histories_module, "Dropout", kept)
    run = tiny_run(**DROPOUT)
    _train(run, [run.clients.histories.trainable[:3]])
    assert len({generator.initial_seed() for generator in drawn}) == 6


def test_a_taste_that_is_read_has_dropout_of_its_own(tiny_run: TinyRun) -> None:
    """It moves the basis alone, with or without dropout on the head."""
    for head in (0.0, 0.2):
        deltas = []
        for rate in (0.0, 0.7):
            run = tiny_run(method="pfm", head__dropout=head, adapters__private__taste__dropout=rate)
            deltas.append(_train(run, [run.clients.histories.trainable[:1]]))
        plain, dropped = (next(iter(updates.values())).delta for updates in deltas)
        moved = {name for name in plain if not torch.equal(plain[name], dropped[name])}
        assert taste.READ_OUT in moved
        assert all(name.startswith("basis.taste.next_item.") for name in moved)


def test_a_shared_basis_travels_and_a_private_factor_does_not(tiny_run: TinyRun) -> None:
    run = tiny_run(adapters__private__kind="shared_basis", window__reading="tokens")
    client_id = run.clients.histories.trainable[0]
    update = _train(run, [[client_id]])[client_id]
    bases = [delta for name, delta in update.delta.items() if name.startswith("basis.")]
    assert bases
    assert all(delta.any() for delta in bases)  # B was fitted before
    assert all(name.endswith(".B") for name in _private(run, client_id))


def test_same_seed_same_bits_and_another_seed_other_bits(tiny_run: TinyRun) -> None:
    runs = [_train(tiny_run(seed=seed, **DROPOUT)) for seed in (0, 0, 1)]
    for client_id, update in runs[0].items():
        assert _same(runs[1][client_id].delta, update.delta, 0.0)
        assert not _same(runs[2][client_id].delta, update.delta, 1e-6)


def test_a_step_of_a_silo_reads_a_bounded_number_of_windows() -> None:
    assert [most_windows(users) for users in (1, 3, 16, 10_000)] == [64, 192, 1024, 1024]
