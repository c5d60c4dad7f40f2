"""What can be known before training is said before training."""

import logging
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError, DataError, DiskSpaceError, HubError, PfmError
from pfm_llm.runs.checks import plan as checks
from pfm_llm.runs.checks.plan import check_plan, warn_of_easy_figures
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.run import load_corpus, settled
from tests.support.tiny import Tiny, random_histories, write_interactions

LIKES = {"tasks": ["next_item", "like"], "data__split": "last_fraction"}
RATED: dict[str, Any] = {"data__columns": {"rating": "rating"}}


@pytest.fixture
def rated(tmp_path: Path) -> dict[str, Any]:
    """Settings for data with ratings from 1 to 5."""
    source = write_interactions(tmp_path / "rated.csv", random_histories(), ratings=True)
    return {**RATED, "data__source": str(source)}


def check(tiny: Tiny, runs: Path, **settings: Any) -> None:
    config = tiny.config(runs, **settings)
    data = load_corpus(config)
    config = settled(config, data)
    check_plan(config, data)
    warn_of_easy_figures(config, data)


def test_a_sound_plan_passes_in_silence(
    tiny: Tiny, tmp_path: Path, rated: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check(tiny, tmp_path, evaluation__ks=[5])
    check(tiny, tmp_path, evaluation__ks=[5], data__like_threshold=3, **LIKES, **rated)
    assert [r for r in caplog.records if r.levelno > logging.INFO] == []


def test_likes_without_ratings(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"likes need ratings.*set data\.columns\.rating"):
        check(tiny, tmp_path, **LIKES)


@pytest.mark.parametrize("threshold", [0, 1, 5.5, 10])
def test_likes_on_a_scale_that_the_threshold_does_not_divide(
    threshold: float, tiny: Tiny, tmp_path: Path, rated: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"no user has both .*data\.like_threshold"):
        check(tiny, tmp_path, data__like_threshold=threshold, **LIKES, **rated)


def test_each_measured_split_must_have_both_classes(tiny: Tiny, tmp_path: Path) -> None:
    # The last two of four events: one for validation, one for test. One event has one class.
    histories = {f"u{user}": [user, user + 1, user + 2, user + 3] for user in range(6)}
    source = write_interactions(tmp_path / "short.csv", histories, ratings=True)
    settings = {**LIKES, **RATED, "data__source": str(source), "data__held_out": 0.5}
    for split in ("validation", "test"):
        with pytest.raises(DataError, match="no user has both"):
            check(tiny, tmp_path, evaluation__splits=[split], **settings)


@pytest.mark.parametrize("name", ["ease", "ease_markov"])
def test_a_baseline_that_cannot_be_fitted(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfm_llm.evaluation.baselines.ease.MAX_DENSE", 20)
    with pytest.raises(DataError, match=r"leave ease out of evaluation\.baselines"):
        check(tiny, tmp_path, evaluation__baselines=["popularity", name])
    check(tiny, tmp_path, evaluation__baselines=["popularity"])


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({"evaluation__ks": [5, 10]}, ["the hit rate@10 of 24 of 24 users is 1"]),
        (
            {"evaluation__ks": [6, 10]},
            ["the hit rate@6 of 24 of 24", "the hit rate@10 of 24 of 24 users is 1"],
        ),
        ({"evaluation__ks": [10], "evaluation__num_negatives": 10}, []),
        ({"evaluation__ks": [500], "evaluation__num_negatives": 1000}, ["@500"] * 2),
    ],
)
def test_a_k_that_every_method_reaches_is_named(
    settings: dict[str, Any],
    warnings: list[str],
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check(tiny, tmp_path, **settings)
    assert len(caplog.messages) == len(warnings)
    for message, part in zip(caplog.messages, warnings, strict=True):
        assert part in message
        assert message.startswith("evaluation.ks: among ")


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("somebody/films", "", "nobody is logged in; run `hf auth login`, or set HF_TOKEN"),
        ("films", "hf_x", "'films' is no repository of the Hub: write user/name"),
        ("a/b/c", "hf_x", "'a/b/c' is no repository of the Hub"),
    ],
)
def test_a_push_that_cannot_succeed(
    repo: str, token: str, said: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError) as raised:
        check(tiny, tmp_path, push_to_hub={"repo": repo})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"push_to_hub": {"repo": "films"}}, HubError),
        (LIKES, DataError),
        ({"prompt": "next_item_genres.v1"}, DataError),
        ({"federation__cohort_size": 25}, ConfigError),
        ({"evaluation__baselines": ["poplarity"]}, ConfigError),
        ({"evaluation__splits": ["validation"], "data__min_interactions": 100}, DataError),
    ],
)
def test_a_run_that_would_fail_does_not_load_the_model(
    settings: dict[str, Any],
    error: type[PfmError],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("pfm_llm.runs.experiment.assemble", never)
    with pytest.raises(error):
        run_experiment(tiny.config(tmp_path / "runs", **settings))
    assert not (tmp_path / "runs").exists()


def test_a_disk_without_space_for_the_checkpoints(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(DiskSpaceError, match=r"at least \d+ MB, and 0 MB are free.*output\.dir"):
        run_experiment(tiny.config(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_disk_without_space_for_the_caches_is_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = checks.shutil.disk_usage(tmp_path)

    def warnings(**settings: Any) -> list[str]:
        caplog.clear()
        settings |= {"federation__num_rounds": 1, "window__reading": "tokens"}
        run_experiment(tiny.config(tmp_path / "runs", **settings))
        return [r.getMessage() for r in caplog.records if "cache of trunk states" in r.getMessage()]

    assert warnings() == []
    # The checkpoints take some 107 KB, and the trunk states of 24 histories 119 KB.
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=150_000))
    (said,) = warnings()
    assert "cache.max_gb" in said
    assert warnings(cache__max_gb=0) == []
