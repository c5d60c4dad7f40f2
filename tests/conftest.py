"""What all tests share: a cache folder of the session's own, no Hub, and a tiny experiment."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest

# Before torch is imported: tiny models gain nothing from a second thread, and spinning ones lose.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before any Hugging Face library is imported: tests see that the Hub is away, and never ask it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pfm_llm.base.processes import Processes
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import Run, assemble, load_corpus
from tests.support.tiny import Tiny, make_tiny

_CACHE = "PFM_LLM_CACHE"
_OUTER_CACHE = os.environ.get(_CACHE)

# Machines are shared: a slow moment is no failure. `--hypothesis-profile=thorough` tries more.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=40)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=400)
hypothesis.settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that pfm_llm keeps public caches in during the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_CACHE, str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def _users_cache(request: pytest.FixtureRequest, session_cache: Path) -> Iterator[None]:
    """Tests of the real assets use the user's own cache, which may hold them already."""
    with pytest.MonkeyPatch.context() as patch:
        if any(mark.name == "network" for mark in request.node.iter_markers()):
            if _OUTER_CACHE is None:
                patch.delenv(_CACHE)
            else:
                patch.setenv(_CACHE, _OUTER_CACHE)
        yield


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """A command sets the level of the library's messages; no test sees that of another."""
    logger = logging.getLogger("pfm_llm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Llama with a small tokenizer, and a small data set, as files."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


class TinyConfig(Protocol):
    """Makes a valid config of the tiny experiment."""

    def __call__(self, **settings: Any) -> ExperimentConfig:
        """``settings`` are dotted keys with ``__`` for each dot."""


@pytest.fixture
def tiny_config(tiny: Tiny, tmp_path: Path) -> TinyConfig:
    """Configs of the tiny experiment, with ``tmp_path/runs`` as output folder."""

    def make(**settings: Any) -> ExperimentConfig:
        return tiny.config(tmp_path / "runs", **settings)

    return make


class TinyRun(Protocol):
    """Wires the tiny experiment."""

    def __call__(self, **settings: Any) -> Run:
        """``settings`` as for `TinyConfig`."""


@pytest.fixture(scope="session")
def one_process() -> Processes:
    """This process, alone."""
    from accelerate import Accelerator

    return Processes(Accelerator(cpu=True), threads=1)


@pytest.fixture
def tiny_run(
    tiny_config: TinyConfig, one_process: Processes, tmp_path_factory: pytest.TempPathFactory
) -> TinyRun:
    """The objects of the tiny experiment; each call has folders of its own."""

    def make(**settings: Any) -> Run:
        config = tiny_config(**settings)
        folders = RunFolders.of(tmp_path_factory.mktemp("run") / config.name)
        return assemble(config, load_corpus(config), folders, one_process)

    return make
