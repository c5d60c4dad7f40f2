"""Every example, run as a reader would run it, against the Hub double."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pfm_llm.publish.artefact import read_artefact
from pfm_llm.publish.publishing import publish
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.publication import request_of
from tests.support.hub_double import WRITE_TOKEN, HubDouble
from tests.support.tiny import TITLES, Tiny

ROOT = Path(__file__).parents[2]
REPO = "alice/films"
TIMEOUT_S = 180


@pytest.fixture
def published(hub: HubDouble, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run, pushed to the double."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    run = run_experiment(tiny.config(tmp_path / "runs", federation__server__lr_lora=0.02))
    publish(request_of(run, REPO))
    return REPO


def run_example(name: str, hub: HubDouble, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=clean_environment(hub),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def clean_environment(hub: HubDouble) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**environment, **hub.environ(WRITE_TOKEN), "PYTHONPATH": str(ROOT)}


def test_pull_and_recommend_from_the_hub(
    published: str, hub: HubDouble, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    printed = run_example(
        "pull_and_recommend.py",
        hub,
        *(published, "--history", "i1,i2,i4", "--catalogue", tiny.items),
        *("--backbone", tiny.model, "--private-folder", folder),
    )
    assert "30 of the adapter's 30 items are in this catalogue" in printed
    assert "with a private adapter" in printed
    assert sum(title in printed for title in TITLES) >= 5
    assert list(folder.glob("clients/*/personalised.*.safetensors"))


def test_continue_federating_from_the_hub(
    published: str, hub: HubDouble, tiny: Tiny, tmp_path: Path
) -> None:
    output = tmp_path / "more"
    config = tiny.config_file(
        tmp_path / "config.yaml", output, adapters__shared__rank=3, head__id_dim=2
    )
    run_example("continue_federating.py", hub, published, "--config", config, "--rounds", 2)
    [parent] = read_artefact(output / "tiny-continued" / "shared_adapter").manifest.parents
    assert (parent.relation, parent.repo) == ("trained_from", REPO)


def test_plain_peft_from_the_hub(
    published: str, hub: HubDouble, tiny: Tiny, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    printed = run_example(
        "plain_peft.py",
        hub,
        *(published, "--base", tiny.model, "--items", TITLES[3], TITLES[5]),
        *("--merged", merged),
    )
    assert "user state:" in printed
    before = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.1." in name or ".layers.2." in name for name in changed)


def test_plain_peft_needs_nothing_of_ours() -> None:
    source = (ROOT / "examples" / "plain_peft.py").read_text()
    assert "import pfm_llm" not in source
    assert "from pfm_llm" not in source
