"""``pfm agent`` as a user starts it: on a run, with a user's history, until Ctrl-C."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")
pytest.importorskip("mcp", reason="the extra [agent] is not installed")

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config(tmp_path_factory.mktemp("runs"), method="pfm", federation__num_rounds=2)
    run_experiment(config)
    return Path(config.output.dir) / config.name


def _words(run: Path, folder: Path, *more: str) -> list[str]:
    fixed = ["-m", "pfm_llm.cli", "agent", *more, "--run", str(run)]
    return [*fixed, "--user", "u3", "--folder", str(folder), "--no-browser", "--port", "0"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def _served(command: list[str]) -> Iterator[tuple[str, str]]:
    """The address and the token of an agent's server, until Ctrl-C."""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
        at, _, token = found[0].partition("/?token=")
        yield at, token
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def _asked(at: str, token: str, what: str) -> list[dict[str, object]]:
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx2.get(f"{at}/api/{what}", headers=headers, timeout=60)
    found: list[dict[str, object]] = answer.json()
    return found


def test_the_page_answers_with_the_users_history_until_it_is_interrupted(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "me"
    with _served([sys.executable, *_words(run, folder)]) as (at, token):
        assert at.startswith("http://127.0.0.1:")
        assert (folder / "token").read_text() == token
        events = _asked(at, token, "history")
        assert len(events) >= 5
        assert httpx2.get(f"{at}/api/history").status_code == 401
    kept = json.loads((folder / "actions.json").read_text())
    assert [one["item_id"] for one in kept] == [event["item_id"] for event in events]


def test_an_assistant_starts_it_and_talks_over_pipes(run: Path, tmp_path: Path) -> None:
    words = _words(run, tmp_path / "me", "mcp")
    server = StdioServerParameters(command=sys.executable, args=words, env=_environment())

    async def ask() -> int:
        async with Client(stdio_client(server)) as client:
            answer = await client.call_tool("recommend", {"k": 4})
            assert answer.structured_content is not None
            return len(answer.structured_content["result"])

    assert anyio.run(ask) == 4


def test_a_sync_keeps_an_adapter_that_the_agent_then_opens_by_itself(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "me"
    words = [sys.executable, *_words(run, folder, "sync"), "--adapter", str(run / "shared_adapter")]
    # A published adapter knows no users, so the history comes in by the run, on the first start.
    refused = subprocess.run(words, capture_output=True, text=True, env=_environment(), check=False)
    assert "a published adapter knows no users" in refused.stderr
    with _served([sys.executable, *_words(run, folder)]):
        pass
    own = [sys.executable, "-m", "pfm_llm.cli", "agent", "--folder", str(folder)]
    own += ["--catalogue", str(tiny.items), "--backbone", str(tiny.model)]
    sync = [*own[:4], "sync", *own[4:], "--adapter", str(run / "shared_adapter")]
    done = subprocess.run(sync, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"in use now; [+-]0.000 ± 0.000 log-prob\S+ for each of the \d+", done.stdout)
    assert (folder / "ledger.json").exists()
    with _served([*own, "--no-browser", "--port", "0"]) as (at, token):
        assert len(_asked(at, token, "recommendations")) == 10
