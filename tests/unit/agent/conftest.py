"""A recommender on a tiny random model, for the tests of agents."""

import pytest

from pfm_llm.base.processes import Processes
from pfm_llm.protocol.types import SharedState
from pfm_llm.recommender import Recommender
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import assemble, load_corpus
from tests.support.tiny import Tiny
from tests.support.tiny_models import stirred


@pytest.fixture(scope="module")
def model(
    tiny: Tiny, one_process: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Recommender:
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(folder, method="pfm")
    run = assemble(config, load_corpus(config), RunFolders.of(folder / config.name), one_process)
    shared = SharedState(stirred(run.model.shared.tensors, seed=5), 3)
    return Recommender.of_run(run, run.as_set(shared))
