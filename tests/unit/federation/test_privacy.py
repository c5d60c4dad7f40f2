"""The loop under privacy: each round is paid for, for good, and the budget ends the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import CheckpointError, ConfigError, StorageError
from pfm_llm.config.schema import training_hash
from pfm_llm.federation.privacy import spent_of
from pfm_llm.federation.rounds import Federation, resume_from, run_rounds
from pfm_llm.server.privacy.ledger import Ledger
from pfm_llm.server.server import Server
from tests.support.privacy import count_in_place_of_epsilon, private_settings
from tests.unit.federation.test_rounds import federation_of, losing


@pytest.fixture(autouse=True)
def _without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    count_in_place_of_epsilon(monkeypatch)


def private_run(folder: Path, **privacy: Any) -> Federation:
    """Eight clients in fours, four rounds, a commit every second one."""
    return federation_of(folder, **private_settings(**privacy))[0]


def go(federation: Federation, first_round: int = 1) -> None:
    run_rounds(federation, first_round, lambda: {})


def releases_of(federation: Federation) -> list[int]:
    ledger = Ledger.read(federation.checkpoints.ledger_path)
    assert ledger is not None
    return ledger.releases


class Killed(Exception):
    """The process is gone."""


def killed_in_round(federation: Federation, round_number: int, after: str) -> None:
    """Run until the process is killed in a round, after the server's method of that name."""
    server: Any = federation.server
    original: Callable[..., Any] = getattr(server, after)

    def dying(*arguments: Any) -> Any:
        is_now = server.round_under_way == round_number
        found = original(*arguments)
        if is_now:
            raise Killed
        return found

    setattr(server, after, dying)
    with pytest.raises(Killed):
        go(federation)


def test_a_run_tells_what_it_has_spent(tmp_path: Path) -> None:
    federation = private_run(tmp_path)
    go(federation)
    assert releases_of(federation) == [1, 1, 1, 1]
    records = federation.metrics_log.read()
    # Of eight clients in fours each is in every second round; figures come with each commit.
    assert [record.get("privacy", {}).get("epsilon") for record in records] == [None, 1, None, 2]
    assert records[-1]["privacy"] == {"epsilon": 2, "delta": 1e-5, "releases": 4}
    spent = spent_of(federation.server, federation.checkpoints)
    assert spent is not None
    assert (spent.epsilon, spent.releases) == (2, 4)


def test_without_privacy_there_is_no_ledger(tmp_path: Path) -> None:
    federation, _ = federation_of(tmp_path)
    go(federation)
    assert not federation.checkpoints.ledger_path.exists()
    assert spent_of(federation.server, federation.checkpoints) is None
    assert not any("privacy" in record for record in federation.metrics_log.read())


def test_a_resumed_run_goes_on_with_its_account_and_pays_again_for_what_it_repeats(
    tmp_path: Path,
) -> None:
    killed_in_round(private_run(tmp_path), 4, after="aggregate")  # round 2 is committed
    again = private_run(tmp_path)
    assert releases_of(again) == [1, 1, 1, 1]
    assert resume_from(again) == 3
    go(again, 3)
    assert releases_of(again) == [1, 1, 2, 2]
    spent = spent_of(again.server, again.checkpoints)
    assert spent is not None
    assert (spent.epsilon, spent.releases) == (3, 6)


def test_a_process_that_dies_between_payment_and_noise_has_paid(tmp_path: Path) -> None:
    federation = private_run(tmp_path)
    server: Any = federation.server
    original = server.privacy.charge

    def dying(round_number: int) -> None:
        original(round_number)
        raise Killed

    server.privacy.charge = dying
    with pytest.raises(Killed):
        go(federation)
    assert releases_of(federation) == [1]
    again = private_run(tmp_path)  # nothing was committed
    assert resume_from(again) == 1
    go(again)
    assert releases_of(again) == [2, 1, 1, 1]


def test_a_rollback_forgets_no_release(tmp_path: Path) -> None:
    go(private_run(tmp_path))
    again = private_run(tmp_path)
    assert resume_from(again, 2) == 3
    go(again, 3)
    assert releases_of(again) == [1, 1, 2, 2]


def test_a_release_that_cannot_be_written_down_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = private_run(tmp_path)

    def full(ledger: Ledger, round_number: int) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Ledger, "charge", full)
    with pytest.raises(StorageError):
        go(federation)
    assert federation.server.shared.round_number == 0


def test_a_run_whose_ledger_is_gone_does_not_go_on(tmp_path: Path) -> None:
    go(private_run(tmp_path))
    again = private_run(tmp_path)
    again.checkpoints.ledger_path.unlink()
    first_round = resume_from(again, 2)
    with pytest.raises(CheckpointError, match=r"0 releases and the checkpoint of 2.*privacy\.json"):
        go(again, first_round)


def test_the_budget_ends_a_run_with_a_commit_and_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation, _ = federation_of(
        tmp_path, **(private_settings(max_epsilon=2.0) | {"num_rounds": 9})
    )
    with caplog.at_level("WARNING", logger="pfm_llm.federation.rounds"):
        go(federation)
    assert federation.checkpoints.rounds() == (2, 4)
    assert "ends this run after round 4 of 9" in caplog.text
    again, _ = federation_of(tmp_path, **(private_settings(max_epsilon=2.0) | {"num_rounds": 9}))
    assert resume_from(again) == 5
    go(again, 5)  # nothing is left to do
    assert releases_of(again) == [1, 1, 1, 1]


def test_a_larger_budget_lets_a_run_go_on(tmp_path: Path) -> None:
    hashes = set()
    for budget, first in ((1.0, 1), (2.0, 3)):
        settings = private_settings(max_epsilon=budget) | {"num_rounds": 9}
        federation, _ = federation_of(tmp_path, **settings)
        hashes.add(training_hash(federation.config))
        assert resume_from(federation) == first
        go(federation, first)
        assert releases_of(federation) == [1] * (2 * int(budget))
    assert len(hashes) == 1


def test_a_last_round_between_commits_is_committed(tmp_path: Path) -> None:
    settings = private_settings(max_epsilon=3.0) | {"num_rounds": 9, "cohort_size": 8}
    federation, _ = federation_of(tmp_path, **settings)
    go(federation)
    assert federation.checkpoints.rounds() == (2, 3)
    assert federation.metrics_log.read()[-1]["privacy"]["epsilon"] == 3


def test_a_budget_that_admits_no_round_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the budget admits no round"):
        go(private_run(tmp_path, max_epsilon=0.5))


def test_poisson_rounds_differ_in_size_and_all_are_counted(tmp_path: Path) -> None:
    settings = private_settings(participation="poisson") | {"num_rounds": 12}
    federation, _ = federation_of(tmp_path, **settings)
    go(federation)
    records = federation.metrics_log.read()
    assert len({record["num_clients"] for record in records}) > 1
    assert records[-1]["privacy"] == {"epsilon": 12, "delta": 1e-5, "releases": 12}


def test_rounds_without_an_answer_go_on_under_noise(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path, **private_settings())
    exchange.answer = losing(8)
    go(federation)
    assert federation.server.shared.round_number == 4
    assert federation.server.num_steps == 4
    assert bool(federation.server.shared.tensors["lora.m.A"].abs().min() > 0)


def test_two_runs_with_the_same_seed_have_different_noise(tmp_path: Path) -> None:
    servers: list[Server] = []
    for name in ("first", "second"):
        federation = private_run(tmp_path / name)
        go(federation)
        servers.append(federation.server)
    first, second = (server.shared.tensors["lora.m.A"] for server in servers)
    assert not torch.equal(first, second)


def test_no_secret_is_in_what_a_run_shows(tmp_path: Path) -> None:
    federation = private_run(tmp_path)
    go(federation)
    secret = json.loads(federation.checkpoints.ledger_path.read_text())["secret"]
    assert secret not in (tmp_path / "metrics.jsonl").read_text()
