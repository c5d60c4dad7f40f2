"""``pfm host`` as an operator uses it: users come and go, and SIGTERM loses nobody's answer."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [agent] is not installed")

from pfm_llm.agent.host.accounts import Accounts
from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
NUM_ASKING, NUM_EVENTS = 6, 9


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config(tmp_path_factory.mktemp("runs"), method="pfm", federation__num_rounds=2)
    run_experiment(config)
    return Path(config.output.dir) / config.name


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "pfm_llm.cli", "host", *map(str, words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _host(*words: str | Path) -> str:
    done = subprocess.run(
        _command(*words), env=_environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _started(process: "subprocess.Popen[str]") -> str:
    """The address of a host that answers."""
    assert process.stderr is not None
    found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
    assert found[0].startswith("http://127.0.0.1:")
    return found[0]


def _await_running(at: str, operator: str, count: int) -> None:
    """Wait until so many requests are worked on; in vain after a minute."""
    for _ in range(600):
        text = httpx2.get(f"{at}/metrics", headers=_with(operator)).text
        if f"\npfm_running {float(count)}\n" in text:
            return
        time.sleep(0.1)
    raise AssertionError(text)


def _with(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_users_come_and_go_while_it_serves_and_sigterm_loses_no_answer(
    run: Path, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    names = [f"user {number}" for number in range(NUM_ASKING)]
    first, *_ = tokens = [_host("add", name, "--users", users) for name in names[:2]]
    serving = _command("serve", "--users", users, "--run", run, "--port", "0")
    with subprocess.Popen(
        serving, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        at = _started(process)
        tokens += [_host("add", name, "--users", users) for name in names[2:]]
        assert _host("list", "--users", users).splitlines() == names
        for token in tokens:
            body = {"item_ids": [f"i{number}" for number in range(NUM_EVENTS)]}
            answer = httpx2.post(f"{at}/api/history", json=body, headers=_with(token))
            assert answer.status_code == 204
        gone = _host("add", "gone", "--users", users)
        assert httpx2.get(f"{at}/api/history", headers=_with(gone)).json() == []
        _host("remove", "gone", "--users", users)
        assert httpx2.get(f"{at}/api/history", headers=_with(gone)).status_code == 401
        operator, accounts = (users / "token").read_text(), Accounts(users)
        with ThreadPoolExecutor(NUM_ASKING) as pool, contextlib.ExitStack() as held:
            for account in accounts.by_key().values():
                held.enter_context(accounts.held(account))  # so that nobody is answered yet
            asked = [
                pool.submit(httpx2.get, f"{at}/api/beliefs", headers=_with(token), timeout=300)
                for token in tokens
            ]
            _await_running(at, operator, NUM_ASKING)
            process.send_signal(signal.SIGTERM)
            held.close()
            answers = [one.result() for one in asked]
        assert process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200] * NUM_ASKING
    assert [answer.json()["num_counted"] for answer in answers] == [NUM_EVENTS] * NUM_ASKING
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{at}/health")
    with subprocess.Popen(
        serving, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        at = _started(process)
        events = httpx2.get(f"{at}/api/history", headers=_with(first)).json()
        assert len(events) == NUM_EVENTS
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
