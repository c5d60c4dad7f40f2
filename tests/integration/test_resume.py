"""Nothing is lost: a run that stopped and went on ends with the bits of one that never stopped."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import CheckpointError, ConfigError, CorruptFileError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.runs import experiment
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment
from tests.support.tiny import (
    Tiny,
    leftovers,
    metrics_of,
    random_histories,
    results_of,
    tensor_files,
    write_interactions,
)

ROUNDS = 6
SETTINGS: dict[str, Any] = {
    "federation__num_rounds": ROUNDS,
    "output__checkpoint_every": 2,
    "evaluation__every": 3,
    "federation__local__private_local_steps": 2,
}


class Stopped(Exception):
    """The injected end of a run."""


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny.config(tmp_path_factory.mktemp("whole"), **SETTINGS))


@pytest.fixture
def stop_after() -> Iterator[Callable[[int], pytest.MonkeyPatch]]:
    """Makes the next run stop once the given round is in its log."""
    append = MetricsLog.append
    with pytest.MonkeyPatch.context() as patch:

        def arm(round_number: int) -> pytest.MonkeyPatch:
            def append_then_stop(self: MetricsLog, record: Any) -> None:
                append(self, record)
                if record["round"] == round_number:
                    raise Stopped

            patch.setattr(MetricsLog, "append", append_then_stop)
            return patch

        yield arm


def stopped_run(config: Any, after: int, stop_after: Callable[[int], pytest.MonkeyPatch]) -> Path:
    patch = stop_after(after)
    with pytest.raises(Stopped):
        run_experiment(config)
    patch.undo()
    return Path(config.output.dir) / config.name


# Commits are made after rounds 2, 4 and 6: three rounds before, at and between them.
@pytest.mark.parametrize(("stopped_after", "committed"), [(1, 0), (3, 2), (4, 2), (5, 4)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    stopped_after: int,
    committed: int,
    tiny: Tiny,
    tmp_path: Path,
    uninterrupted: Path,
    stop_after: Callable[[int], pytest.MonkeyPatch],
) -> None:
    config = tiny.config(tmp_path, **SETTINGS)
    run = stopped_run(config, stopped_after, stop_after)
    assert (CheckpointStore(RunFolders.of(run).server).rounds() or (0,))[-1] == committed
    assert run_experiment(config, resume=True) == run

    whole = tensor_files(uninterrupted)
    # Server tensors with both moments, private and personalised states, the exported adapter.
    kinds = ("server/round_", "/private.r", "/personalised.r", "shared_adapter/adapter_model")
    assert all(any(kind in name for name in whole) for kind in kinds)
    assert tensor_files(run) == whole
    metrics = metrics_of(run)
    assert [record["round"] for record in metrics] == list(range(1, ROUNDS + 1))
    assert metrics == metrics_of(uninterrupted)
    assert "validation" in metrics[2]
    assert results_of(run)["rows"] == results_of(uninterrupted)["rows"]
    assert leftovers(run, run.with_name("tiny.private")) == []


def test_resume_from_an_older_kept_round_ends_bit_identical(
    tiny: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    config = tiny.config(tmp_path, **SETTINGS)
    run = run_experiment(config)
    (RunFolders.of(run).server / f"round_{ROUNDS:06d}.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptFileError, match=r"round 6, .*damaged.*--resume --from-round 4"):
        run_experiment(config, resume=True)
    with pytest.raises(CheckpointError, match="round 3 is not kept; kept rounds: 4, 6"):
        run_experiment(config, resume=True, from_round=3)
    run_experiment(config, resume=True, from_round=4)
    assert tensor_files(run) == tensor_files(uninterrupted)
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert results_of(run)["rows"] == results_of(uninterrupted)["rows"]


def test_a_run_that_ended_resumes_to_the_same(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, federation__num_rounds=2)
    run = run_experiment(config)
    before = tensor_files(run), metrics_of(run), results_of(run)["rows"]
    run_experiment(config, resume=True)
    assert (tensor_files(run), metrics_of(run), results_of(run)["rows"]) == before


def test_private_states_newer_than_the_commit_never_count(
    tiny: Tiny, tmp_path: Path, stop_after: Callable[[int], pytest.MonkeyPatch]
) -> None:
    config = tiny.config(tmp_path, **SETTINGS)
    run = stopped_run(config, 5, stop_after)
    store = PrivateStore(run.with_name("tiny.private"))

    def newer() -> set[str]:
        return {
            client for client in store.client_ids() if max(store.versions(client), default=0) > 4
        }

    # Round 5's cohort of 4 wrote states that the commit point, round 4, does not know.
    assert len(newer()) == 4
    patch = stop_after(5)
    seen: list[set[str]] = []
    load = PrivateStore.load
    patch.setattr(
        PrivateStore, "load", lambda self, *a, **k: (seen.append(newer()), load(self, *a, **k))[1]
    )
    with pytest.raises(Stopped):
        run_experiment(config, resume=True)
    assert seen[0] == set()
    assert [record["round"] for record in metrics_of(run)] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def committed_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a copy of the data, with its last commit after round 2."""
    root = tmp_path_factory.mktemp("committed")
    write_interactions(root / "interactions.csv", random_histories())
    config = tiny.config(
        root, federation__num_rounds=2, data__source=str(root / "interactions.csv")
    )
    return run_experiment(config)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"runtime__threads": 2}, "threads was 1, is 2"),
        ({"runtime__tokens_per_chunk": 300}, "tokens_per_chunk was 2048, is 300"),
        ({"federation__server__lr_lora": 0.5}, "federation.server.lr_lora was 0.001, is 0.5"),
        ({"federation__num_rounds": 3}, "federation.num_rounds was 2, is 3"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"prompt": "next_item_genres.v1"}, "prompt was next_item.v2"),
        ({"adapters__shared": {"rank": 3, "alpha": 4}}, "adapters.shared.rank was 2, is 3"),
    ],
)
def test_resume_under_other_conditions_is_refused_by_name(
    changed: dict[str, Any], named: str, tiny: Tiny, committed_run: Path
) -> None:
    before = tensor_files(committed_run)
    settings = {
        "federation__num_rounds": 2,
        "data__source": str(committed_run.parent / "interactions.csv"),
    }
    config = tiny.config(committed_run.parent, **{**settings, **changed})
    with pytest.raises(CheckpointError, match=re.escape(named)):
        run_experiment(config, resume=True)
    assert tensor_files(committed_run) == before


def test_resume_with_another_number_of_processes_is_refused(
    tiny: Tiny, committed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RunEnvironment.here
    monkeypatch.setattr(
        experiment.RunEnvironment,
        "here",
        lambda **known: dataclasses.replace(here(**known), num_processes=2),
    )
    config = tiny.config(
        committed_run.parent,
        federation__num_rounds=2,
        data__source=str(committed_run.parent / "interactions.csv"),
    )
    with pytest.raises(CheckpointError, match="num_processes was 1, is 2"):
        run_experiment(config, resume=True)


def test_resume_on_other_interactions_is_refused(tiny: Tiny, committed_run: Path) -> None:
    source = committed_run.parent / "interactions.csv"
    config = tiny.config(committed_run.parent, federation__num_rounds=2, data__source=str(source))
    kept = source.read_text()
    try:
        # The same catalogue, so that the contract is equal: another user's first event.
        write_interactions(source, {**random_histories(), "u0": list(range(12))})
        with pytest.raises(CheckpointError, match="the interactions have changed"):
            run_experiment(config, resume=True)
    finally:
        source.write_text(kept)


def test_what_training_does_not_depend_on_may_change(tiny: Tiny, committed_run: Path) -> None:
    config = tiny.config(
        committed_run.parent,
        federation__num_rounds=2,
        data__source=str(committed_run.parent / "interactions.csv"),
        evaluation__ks=[3],
        cache__max_gb=0,
    )
    assert run_experiment(config, resume=True) == committed_run
    assert {row["k"] for row in results_of(committed_run)["rows"]} == {3}


def test_nothing_to_resume_says_so(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run at .*tiny to resume; start it without --resume"):
        run_experiment(tiny.config(tmp_path), resume=True)
    assert list(tmp_path.iterdir()) == []
