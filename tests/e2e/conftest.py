"""One finished run that all these tests look at."""

from pathlib import Path

import pytest

from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny


@pytest.fixture(scope="session")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that was validated and committed every second round."""
    output = tmp_path_factory.mktemp("finished")
    return run_experiment(
        tiny.config(
            output,
            federation__num_rounds=4,
            federation__server__lr_lora=0.02,
            evaluation__every=2,
            evaluation__splits=["validation", "test"],
        )
    )
