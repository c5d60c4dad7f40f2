"""Starting: errors of ours are one message, and only our own logger speaks."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.cli.start import prepare, run_safely

ROOT = Path(__file__).parents[3]


def fail(error: BaseException) -> None:
    raise error


@pytest.fixture(autouse=True)
def _same_logging() -> None:
    logging.getLogger("pfm_llm").setLevel(logging.NOTSET)


def test_an_error_of_ours_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_safely(lambda: fail(DataError("no rows; add some")))
    assert stopped.value.code == DataError.exit_code == 2
    assert capsys.readouterr().err == "error: no rows; add some\n"


def test_an_interruption_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_safely(lambda: fail(KeyboardInterrupt()), "interrupted; start it again")
    assert stopped.value.code == 128 + 2  # SIGINT is signal 2
    assert capsys.readouterr().err == "interrupted; start it again\n"


def test_an_error_that_is_not_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_safely(lambda: fail(ZeroDivisionError()))


def test_only_our_logger_speaks_at_info_and_threads_are_set_before_torch(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys\n"
        "from pfm_llm.cli.start import prepare\n"
        "prepare()\n"
        "assert 'torch' not in sys.modules\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "logging.getLogger('pfm_llm.runs').info('ours')\n"
        "logging.getLogger('httpx').info('GET https://signed')\n"
        "logging.getLogger('httpx').warning('theirs')\n"
        "for name in ('httpx2', 'httpcore', 'huggingface_hub', 'datasets', 'filelock'):\n"
        "    logging.getLogger(name).info('GET https://signed')\n"
        "import datasets\n"
        "http = logging.getLogger('huggingface_hub.utils._http')\n"
        "http.warning(\"'%s' thrown while requesting GET %s\", 'Time', 'https://a/b?X-Amz-Sig=1')\n"
        "logging.getLogger('urllib3').warning('Retrying https://a/b?c=d&e in 1 s')\n"
        "logging.getLogger('datasets.load').warning('old')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_WAIT_POLICY", None)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert result.stderr.splitlines() == [
        *("ours", "theirs"),
        "'Time' thrown while requesting GET https://a/b",
        "Retrying https://a/b in 1 s",
        "old",
    ]


def test_the_folder_of_a_script_cannot_hide_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(tmp_path / "evaluate.py"), raising=False
    )
    before = list(sys.path)
    prepare()
    assert sys.path == before[1:]


def test_what_is_said_about_files_of_others_has_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_safely(lambda: fail(DataError("no item '\x1b[2J\u202e'; give\n  another")))
    assert capsys.readouterr().err == "error: no item '�[2J�'; give\n  another\n"
    program = (
        "import logging\n"
        "from pfm_llm.cli.start import prepare\n"
        "prepare()\n"
        "logging.getLogger('pfm_llm.x').warning('title %s', 'a\\x1b[2J')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == "title a�[2J\n"
