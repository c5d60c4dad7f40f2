"""A federation as one object: train it, measure it, recommend, publish.

Example, on a config and a DataFrame of a tiny world:
    >>> from pfm_llm import FederatedRecommender, Recommender
    >>> federation = FederatedRecommender(config, seed=1).fit(frame)
    >>> rows = federation.evaluate()
    >>> bool((rows[rows.metric == "ndcg"].value <= 1).all())
    True
    >>> films = federation.recommend("u3", k=3)
    >>> len(films)
    3
    >>> Recommender.from_pretrained(federation.run, user="u3").recommend(k=3) == films
    True
    >>> adapter = federation.run / "shared_adapter"
    >>> stranger = Recommender.from_pretrained(adapter, catalogue=items, backbone=model)
    >>> len(stranger.recommend(["i1", "i2"], k=3))
    3
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.schema import ExperimentConfig, parse_config, read_yaml
from pfm_llm.config.shipped import find_config
from pfm_llm.data.frames import data_section
from pfm_llm.evaluation.results import read_results
from pfm_llm.model.lora import settings_from_peft
from pfm_llm.publish.alignment import Alignment
from pfm_llm.publish.publishing import publish
from pfm_llm.recommender import Recommendation, Recommender
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RESULTS_FILE
from pfm_llm.runs.opening import open_to_serve
from pfm_llm.runs.publication import request_of
from pfm_llm.runs.run import Run, Trained


class FederatedRecommender:
    """A recommender that simulated clients train together, each with a private part of its own.

    Args:
        config: The name of a shipped config such as ``quickstart``, the path of a YAML file, or
            a config; None: the defaults.
        name: Names the run; None: as the config says.
        data: What `fit` takes.
        settings: Further settings on top of the config, sections as mappings:
            ``federation={"passes": 2}, seed=1``. ``adapters={"shared": ...}`` may be a
            `peft.LoraConfig`; `settings_from_peft` says what of it is taken.

    Raises:
        ConfigError: A key or value is wrong, or no such config is shipped.
        DataError: The data are of a type that cannot be read.
    """

    def __init__(
        self,
        config: str | Path | ExperimentConfig | None = None,
        *,
        name: str | None = None,
        data: Any = None,
        **settings: Any,
    ) -> None:
        tree = _merged({"name": "recommender"}, _tree(config))
        tree = _merged(tree, _without_peft(settings))
        tree = tree if name is None else {**tree, "name": name}
        self._config = parse_config(tree if data is None else _with_data(tree, data))
        self._tree = tree
        self._run: Path | None = None
        self._opened: tuple[Run, Trained, Alignment] | None = None

    @property
    def config(self) -> ExperimentConfig:
        """The experiment, as it is or will be trained."""
        return self._config

    @property
    def run(self) -> Path:
        """The run's folder.

        Raises:
            ConfigError: Nothing was trained yet.
        """
        if self._run is None:
            raise ConfigError("nothing was trained yet; call fit() first")
        return self._run

    def fit(self, data: Any = None, resume: bool = False) -> "FederatedRecommender":
        """Train, evaluate and report, in a run folder; see `run`.

        Args:
            data: A pandas DataFrame, a `datasets.Dataset`, what ``data.source`` takes (a CSV, TSV
                or Parquet file, a folder, the id of a data set), or a mapping: the section
                ``data`` of a config, whose ``source`` and ``items`` may be in memory. None: as
                the config says.
            resume: Go on with the run of that name.

        Returns:
            This object.

        Raises:
            PfmError: The run cannot be started, or cannot go on; the message says why.
        """
        if data is not None:
            self._config = parse_config(_with_data(self._tree, data))
        self._run, self._opened = run_experiment(self._config, resume=resume), None
        return self

    def evaluate(self) -> pd.DataFrame:
        """The results on held-out items, a row per mode and metric; see `ResultRow`."""
        path = self.run / RESULTS_FILE
        if not path.exists():
            evaluate_run(self.run)
        return pd.DataFrame(read_results(path)[0])

    def recommend(
        self, user: str, k: int = 10, *, new_share: float | None = None
    ) -> list[Recommendation]:
        """The best items that a user has not met, with the user's private part.

        Args:
            user: The external id of a user of the data. ``recommender().recommend([])`` serves
                somebody of whom nothing is known.
            k: How many.
            new_share: As in `Recommender.recommend`.

        Raises:
            DataError: There is no such user.
            ConfigError: ``new_share`` is not in [0, 1].
        """
        return self.recommender(user).recommend(k=k, new_share=new_share)

    def recommender(self, user: str | None = None) -> Recommender:
        """The trained model, for a user of the data, or for anybody who gives a history.

        Raises:
            DataError: There is no such user.
        """
        if self._opened is None:
            self._opened = open_to_serve(self.run)
        run, trained, alignment = self._opened
        return Recommender.of_run(run, trained, user, alignment)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish the shared adapter; nothing private is in it.

        Args:
            repo: ``user/name``.
            options: The other fields of `PublishRequest`, such as ``private=False, tag="v1"``.

        Returns:
            The address of the version.

        Raises:
            HubError: It could not be pushed.
            PrivateLeakError: Something private was found in what is to be published.
        """
        return publish(request_of(self.run, repo, **options)).url


def _tree(config: str | Path | ExperimentConfig | None) -> dict[str, Any]:
    """The settings of a config, without defaults where it is a file."""
    if config is None:
        return {}
    if isinstance(config, ExperimentConfig):
        return config.model_dump(mode="json")
    return read_yaml(find_config(config))


def _without_peft(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings in which a `peft.LoraConfig` is replaced by what it stands for."""
    adapters: Any = settings.get("adapters")
    shared: Any = adapters.get("shared") if isinstance(adapters, Mapping) else None
    if not hasattr(shared, "peft_type"):
        return settings
    return {**settings, "adapters": _merged(adapters, settings_from_peft(shared))}


def _with_data(tree: Mapping[str, Any], data: Any) -> dict[str, Any]:
    return _merged(tree, {"data": data_section(data)})


def _merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others on top, section by section."""
    merged = dict(tree)
    for key, value in more.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
