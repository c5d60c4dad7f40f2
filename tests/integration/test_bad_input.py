"""Bad input: a typed error that names the thing and the remedy, and nothing half-written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pfm_llm.base.errors import (
    BackboneError,
    ConfigError,
    DataError,
    PfmError,
    TrainingError,
)
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.checkpoint import CheckpointStore
from tests.support.scripts import run_script
from tests.support.tiny import (
    TITLES,
    Tiny,
    leftovers,
    metrics_of,
    random_histories,
    results_of,
    write_interactions,
    write_items,
)

COLUMNS = "data__columns"


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        pytest.param(
            {COLUMNS: {"user": "uid"}}, DataError, ["'uid'", "data.columns.user"], id="column"
        ),
        pytest.param({"data__source": "/none/x.csv"}, DataError, ["/none/x.csv"], id="no file"),
        pytest.param(
            {"data__source": "nobody/nothing", "data__items": None},
            DataError,
            ["'nobody/nothing'", "no network", "save_to_disk"],
            id="data set without network",
        ),
        pytest.param(
            {"data__min_interactions": 100}, DataError, ["data.min_interactions"], id="all dropped"
        ),
        pytest.param(
            {"window__items": 600}, DataError, ["600 items", "512", "window.items"], id="context"
        ),
        pytest.param(
            {"data__split": "global_temporal", COLUMNS: {"timestamp": None}},
            DataError,
            ["global_temporal needs timestamps", "data.columns.timestamp"],
            id="split by time without times",
        ),
        pytest.param(
            {"prompt": "next_item_ratings.v1"},
            DataError,
            ["next_item_ratings.v1", "data.columns.rating"],
            id="prompt with ratings",
        ),
        pytest.param(
            {"prompt": "next_item_genres.v1"},
            DataError,
            ["next_item_genres.v1", "'year'", "choose another prompt"],
            id="prompt with genres",
        ),
        pytest.param({"prompt": "next_itm.v1"}, ConfigError, ["'next_itm.v1'"], id="no prompt"),
        pytest.param(
            {"backbone__name": "nobody/nothing"},
            BackboneError,
            ["'nobody/nothing'", "local folder"],
            id="backbone without network",
        ),
        pytest.param(
            {"adapters__targets": ["q_proj", "nonsense"], "adapters__num_layers": 1},
            BackboneError,
            ["no modules 'nonsense' to adapt in its top 1 layers", "q_proj", "adapters.targets"],
            id="one module of two missing",
        ),
        pytest.param(
            {"adapters__targets": "nonsense"},
            BackboneError,
            ["nonsense", "q_proj", "adapters.targets"],
            id="modules missing",
        ),
        pytest.param(
            {"adapters__targets": ["input_layernorm"]},
            BackboneError,
            ["input_layernorm", "adapters.targets"],
            id="modules that are not linear",
        ),
        pytest.param(
            {"adapters__num_layers": 4},
            BackboneError,
            ["3 layers", "adapters.num_layers"],
            id="layers",
        ),
        pytest.param({"head__dim": 33}, ConfigError, ["head.dim", "32"], id="head"),
        pytest.param(
            {"federation__cohort_size": 25},
            ConfigError,
            ["federation.cohort_size", "between 1 and 24"],
            id="cohort",
        ),
        pytest.param(
            {"evaluation__baselines": ["poplarity"]},
            ConfigError,
            ["'poplarity'", "did you mean popularity?"],
            id="baseline",
        ),
        pytest.param(
            {"runtime__trackers": ["carrier_pigeon"]},
            ConfigError,
            ["runtime.trackers", "'carrier_pigeon'", "tensorboard"],
            id="tracker",
        ),
    ],
)
def test_bad_setting_is_named_before_anything_is_written(
    settings: dict[str, Any],
    error: type[PfmError],
    names: list[str],
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as raised:
        run_experiment(tiny.config(tmp_path, **settings))
    assert [name for name in names if name not in str(raised.value)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "names"),
    [
        pytest.param("user_id,item_id,timestamp\n", ["no interactions left"], id="header alone"),
        pytest.param("", ["interactions.csv"], id="empty file"),
        pytest.param(
            "user_id,item_id,timestamp\nu1,i1,1\nu1,i2,soon\n",
            ["interactions.csv line 3", "'soon'", "data.max_bad_rows"],
            id="bad row",
        ),
        pytest.param(
            "user_id,item_id,timestamp\nu1,i1,1\nu1,i999,2\n",
            ["interactions.csv line 3", "item without text", "'i999'"],
            id="unknown item",
        ),
    ],
)
def test_bad_interactions_are_named_by_file_and_line(
    content: str, names: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    source = tmp_path / "interactions.csv"
    source.write_text(content)
    with pytest.raises(DataError) as raised:
        run_experiment(tiny.config(tmp_path / "runs", data__source=str(source)))
    assert [name for name in names if name not in str(raised.value)] == []
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def test_catalogue_of_one_item(tiny: Tiny, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.csv", TITLES[:1])
    source = write_interactions(tmp_path / "interactions.csv", {"u0": [0, 0, 0]})
    config = tiny.config(
        tmp_path / "runs", data__source=str(source), data__items=str(items), data__repeats="allow"
    )
    with pytest.raises(DataError, match="catalogue of 1 item: ranking needs at least 2"):
        run_experiment(config)


def test_prompt_with_ratings_runs_on_data_that_has_them(tiny: Tiny, tmp_path: Path) -> None:
    source = write_interactions(tmp_path / "rated.csv", random_histories(), ratings=True)
    config = tiny.config(
        tmp_path,
        data__source=str(source),
        data__columns={"rating": "rating"},
        prompt="next_item_ratings.v1",
        window__reading="tokens",
        federation__num_rounds=1,
    )
    assert results_of(run_experiment(config))["rows"]


def test_clients_with_one_or_two_interactions(tiny: Tiny, tmp_path: Path) -> None:
    histories = {**random_histories(), "single": [3], "pair": [4, 9]}
    source = write_interactions(tmp_path / "interactions.csv", histories)
    config = tiny.config(
        tmp_path,
        data__source=str(source),
        data__min_interactions=1,
        # Everybody who can be is trained in each of the rounds.
        federation__cohort_size=25,
        federation__num_rounds=2,
    )
    run = run_experiment(config)
    assert {row["num_users"] for row in results_of(run)["rows"]} == {24}
    assert [record["num_clients"] for record in metrics_of(run)] == [25, 25]
    clients = run.with_name("tiny.private") / "clients"
    assert not list(clients.glob("user-single/private.r*"))
    assert list(clients.glob("user-pair/private.r*"))
    # Who cannot train can still be served, by the shared adapter.
    seen = {"i3"}
    listed = Recommender.from_pretrained(run, "single").recommend(k=5)
    assert len(listed) == 5
    assert not seen & {item.item_id for item in listed}


# --- a loss that is not a number --------------------------------------------------------------


def poisoned(
    patch: pytest.MonkeyPatch, from_round: int, poison: Callable[[int, ClientUpdate], ClientUpdate]
) -> None:
    """Change the updates of later rounds; ``poison`` also gets the place in the chunk."""
    train_chunk = LocalTrainer.train_chunk

    def poisonous(trainer: LocalTrainer, chunk: Any, shared: SharedState) -> Any:
        updates = train_chunk(trainer, chunk, shared)
        if shared.round_number + 1 < from_round:
            return updates
        return [poison(place, update) for place, update in enumerate(updates)]

    patch.setattr(LocalTrainer, "train_chunk", poisonous)


def test_nan_loss_of_all_in_a_round_changes_nothing_but_its_number(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 3, lambda _, update: replace(update, loss=float("nan")))
    run = run_experiment(tiny.config(tmp_path, federation__num_rounds=4))
    assert [record["refused"] for record in metrics_of(run)] == [0, 0, 4, 4]
    assert results_of(run)["costs"]["refused_by_reason"] == {"not_finite": 8}
    store = CheckpointStore(RunFolders.of(run).server)
    second, last = store.load(2), store.load(4)
    assert second is not None
    assert last is not None
    assert all(torch.equal(second.tensors[name], last.tensors[name]) for name in second.tensors)


def test_nan_loss_of_all_in_every_round_ends_with_the_remedy(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, federation__num_rounds=4)
    with monkeypatch.context() as patch:
        poisoned(patch, 1, lambda _, update: replace(update, loss=float("nan")))
        with pytest.raises(
            TrainingError, match=r"4 of 4 rounds had no usable update.*lower the learning"
        ):
            run_experiment(config)
    run = tmp_path / "tiny"
    assert CheckpointStore(RunFolders.of(run).server).rounds() == (2,)
    assert leftovers(run, run.with_name("tiny.private")) == []


def test_nan_of_one_client_is_refused_and_the_round_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_is_nan(place: int, update: ClientUpdate) -> ClientUpdate:
        if place:
            return update
        delta = {name: value * float("nan") for name, value in update.delta.items()}
        return replace(update, delta=delta)

    poisoned(monkeypatch, 1, first_is_nan)
    run = run_experiment(tiny.config(tmp_path, federation__num_rounds=2))
    assert [(m["refused"], m["num_clients"]) for m in metrics_of(run)] == [(1, 4), (1, 4)]
    assert results_of(run)["costs"]["refused_updates"] == 2


@pytest.mark.parametrize("stages", [[], [{"clip": {"norm": 1.0}}]], ids=["bare", "clip"])
def test_a_huge_value_of_one_client_ends_no_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[Any]
) -> None:
    def first_is_huge(place: int, update: ClientUpdate) -> ClientUpdate:
        if place:
            return update
        name = "head.item_bias"
        return replace(update, delta={**update.delta, name: update.delta[name] + 1e25})

    poisoned(monkeypatch, 1, first_is_huge)
    run = run_experiment(tiny.config(tmp_path, federation__num_rounds=2, federation__stages=stages))
    for record in metrics_of(run):
        if stages:  # the stage has made it as short as the others
            assert record["refused"] == 0
            assert record["stages"]["clip"]["largest_norm"] > 1e25
            assert record["aggregated_norm"] <= 1.0
        else:
            assert record["refused_by_reason"] == {"too_large": 1}
            assert record["aggregated_norm"] < 100


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"federation__server__lr_lora": 1e38}, id="server, beyond float32"),
        pytest.param({"federation__server__lr_lora": 1e25}, id="server"),
        pytest.param({"federation__local__shared_lr": 1e300}, id="clients"),
    ],
)
def test_absurd_learning_rates_end_in_an_error(
    settings: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="lower"):
        run_experiment(tiny.config(tmp_path, **settings))
    assert leftovers(tmp_path / "tiny", tmp_path / "tiny.private") == []


def test_backbone_with_nan_weights(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "model")
    with pytest.raises(BackboneError, match=str(tmp_path / "model")):
        run_experiment(tiny.config(tmp_path / "runs", backbone__name=str(tmp_path / "model")))
    assert not (tmp_path / "runs").exists()


# --- what the scripts make of it --------------------------------------------------------------


def test_script_says_one_message_and_exits_with_2(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config_file(tmp_path / "c.yaml", tmp_path / "runs", federation__num_round=3)
    done = run_script("fed_train.py", "--config", config, capsys=capsys)
    assert done.code == 2
    assert done.err.startswith(f"error: {config}:\n")
    assert "unknown key federation.num_round; did you mean federation.num_rounds?" in done.err
    assert "Traceback" not in done.err + done.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("fed_train.py", ["--config", "/none.yaml"], "error: cannot read config /none.yaml"),
        ("fed_train.py", ["--config", "CONFIG", "--set", "seed"], "expected dotted.key=value"),
        ("fed_train.py", ["--config", "CONFIG", "--set", "seed=x"], "seed: Input should be"),
        ("fed_train.py", ["--config", "CONFIG", "--resume"], "no run at"),
        ("evaluate.py", ["--run", "/none"], "error: no run at /none; "),
        ("evaluate.py", ["--runs", "RUNS"], "error: "),
        ("recommend.py", ["--runs", "RUNS", "--user", "u1"], "error: "),
        ("recommend.py", [], "--user"),
    ],
)
def test_wrong_arguments_of_scripts(
    script: str,
    arguments: list[str],
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.config_file(tmp_path / "c.yaml", tmp_path / "runs")
    places = {"CONFIG": str(config), "RUNS": str(tmp_path / "runs")}
    done = run_script(script, *(places.get(a, a) for a in arguments), capsys=capsys)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err + done.out
    assert not (tmp_path / "runs").exists()


def test_script_interrupted_from_the_keyboard(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalTrainer, "train_chunk", interrupt)
    config = tiny.config_file(tmp_path / "c.yaml", tmp_path / "runs")
    done = run_script("fed_train.py", "--config", config, capsys=capsys)
    assert done.code == 130
    assert "--resume goes on from the last commit" in done.err
