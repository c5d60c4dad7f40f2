"""The names that `pfm_llm` offers, and that they cost nothing before they are used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pfm_llm
from pfm_llm.base.errors import PfmError
from pfm_llm.data.frames import load_dataset
from pfm_llm.federated import FederatedRecommender
from pfm_llm.recommender import Recommendation, Recommender

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "FederatedRecommender": FederatedRecommender,
    "PfmError": PfmError,
    "Recommendation": Recommendation,
    "Recommender": Recommender,
    "load_dataset": load_dataset,
}


def test_the_public_names_are_these() -> None:
    assert set(pfm_llm.__all__) == PUBLIC.keys()
    assert {name: getattr(pfm_llm, name) for name in PUBLIC} == PUBLIC
    assert PUBLIC.keys() <= set(dir(pfm_llm))


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'pfm_llm' has no attribute 'Recomender'"):
        _ = pfm_llm.Recomender


def test_importing_the_package_imports_no_other_library() -> None:
    program = "import sys; own = set(sys.modules); import pfm_llm; print(*set(sys.modules) - own)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {name.split(".")[0] for name in result.stdout.split()}
    assert imported - sys.stdlib_module_names == {"pfm_llm"}
