"""The public face, from data in memory to a list of films, on a tiny world."""

import doctest
import stat
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from peft import LoraConfig

import pfm_llm.data.frames
import pfm_llm.federated
from pfm_llm import FederatedRecommender, Recommender, load_dataset
from pfm_llm.base.assets import cache_dir
from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.schema import load_config
from pfm_llm.data.frames import data_section
from tests.support.tiny import Tiny


@pytest.fixture(scope="module")
def frame(tiny: Tiny) -> pd.DataFrame:
    return pd.read_csv(tiny.interactions)


@pytest.fixture(scope="module")
def fitted(
    tiny: Tiny, frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> FederatedRecommender:
    config = tiny.config(tmp_path_factory.mktemp("runs"), method="pfm")
    return FederatedRecommender(config, name="face", federation={"num_rounds": 2}).fit(frame)


def test_the_examples_in_docstrings_run(tiny: Tiny, frame: pd.DataFrame, tmp_path: Path) -> None:
    names = {
        "config": tiny.config_file(tmp_path / "tiny.yaml", tmp_path / "runs", method="pfm"),
        "frame": frame,
        "items": str(tiny.items),
        "model": str(tiny.model),
    }
    for module in (pfm_llm.federated, pfm_llm.data.frames):
        result = doctest.testmod(module, extraglobs=names)
        assert result.attempted > 3
        assert result.failed == 0


def test_fit_trains_on_the_frame_by_the_settings(fitted: FederatedRecommender, tiny: Tiny) -> None:
    config = load_config(fitted.run / "config.yaml")
    assert (config.name, config.federation.num_rounds) == ("face", 2)
    assert Path(config.data.source).parent == cache_dir() / "frames"
    assert config.data.items == str(tiny.items)
    assert fitted.config.data == config.data


def test_the_results_are_a_frame(fitted: FederatedRecommender) -> None:
    rows = fitted.evaluate()
    assert {"method", "mode", "metric", "k", "value", "ci_low", "ci_high"} <= set(rows.columns)
    assert {"shared_only", "shared_private"} <= set(rows["mode"])
    (fitted.run / "results.json").unlink()
    pd.testing.assert_frame_equal(fitted.evaluate(), rows)


def test_a_user_gets_a_list_of_their_own(fitted: FederatedRecommender) -> None:
    own = fitted.recommend("u3", k=5)
    assert own == Recommender.from_pretrained(fitted.run, user="u3").recommend(k=5)
    shared = fitted.recommender("u3").score(private_weight=0.0)
    assert np.abs(fitted.recommender("u3").score() - shared).max() > 0


def test_fit_goes_on_with_the_run_of_that_name(
    fitted: FederatedRecommender, frame: pd.DataFrame
) -> None:
    again = FederatedRecommender(fitted.config, data=frame).fit(resume=True)
    assert again.run == fitted.run
    assert again.recommend("u3") == fitted.recommend("u3")


def test_before_fit_there_is_no_run() -> None:
    with pytest.raises(ConfigError, match=r"call fit\(\) first"):
        FederatedRecommender().recommend("u3")


def test_a_config_is_a_name_a_file_or_nothing(tiny: Tiny, tmp_path: Path) -> None:
    assert FederatedRecommender().config.name == "recommender"
    assert FederatedRecommender(name="mine", data="a.csv").config.data.source == "a.csv"
    shipped = FederatedRecommender("quickstart", seed=3, window={"items": 5}).config
    assert (shipped.name, shipped.seed, shipped.window.items) == ("quickstart", 3, 5)
    assert shipped.data == FederatedRecommender("quickstart").config.data
    path = tiny.config_file(tmp_path / "c.yaml", tmp_path)
    assert FederatedRecommender(path).config == load_config(path)
    with pytest.raises(ConfigError, match="no config 'nothing'"):
        FederatedRecommender("nothing")
    with pytest.raises(ConfigError, match="did you mean seed"):
        FederatedRecommender(sede=1)


def test_data_in_memory_are_written_once_and_privately(frame: pd.DataFrame) -> None:
    first = Path(data_section(frame)["source"])
    written = first.stat().st_mtime_ns
    assert data_section(frame.copy()) == {"source": str(first)}
    assert first.stat().st_mtime_ns == written
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert data_section(frame.iloc[1:]) != data_section(frame)


def test_a_frame_a_dataset_and_a_file_are_the_same_data(tiny: Tiny, frame: pd.DataFrame) -> None:
    items = pd.read_csv(tiny.items)
    sources = (tiny.interactions, frame, datasets.Dataset.from_pandas(frame))
    hashes = {load_dataset(source, items=items).content_hash() for source in sources}
    assert hashes == {load_dataset(str(tiny.interactions), items=tiny.items).content_hash()}
    renamed = frame.rename(columns={"user_id": "who"})
    assert load_dataset(renamed, items=items, user="who").content_hash() in hashes


def test_other_data_are_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="data of type list: give a path, a pandas DataFrame"):
        FederatedRecommender().fit([1, 2])
    rows = datasets.Dataset.from_pandas(frame)
    with pytest.raises(DataError, match="data have the splits a, b; give one of them"):
        load_dataset(datasets.DatasetDict(a=rows, b=rows))
    with pytest.raises(ConfigError, match=r"did you mean data\.columns\.user"):
        load_dataset(frame, usr="user_id")


def test_the_shared_adapter_may_be_given_as_a_lora_config() -> None:
    adapters = {"shared": LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]), "num_layers": 3}
    given = FederatedRecommender(adapters=adapters).config.adapters
    assert (given.shared.rank, given.targets, given.num_layers) == (4, ("q_proj",), 3)
    with pytest.raises(ConfigError, match="the LoraConfig sets use_dora"):
        FederatedRecommender(adapters={"shared": LoraConfig(use_dora=True)})
