"""Importing is safe and quick: nothing happens at import, and help costs no torch."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = (("flwr",), ("mcp", "fastapi", "starlette", "uvicorn", "prometheus_client"))
"""What each extra brings; Flower brings an older fastapi, which is not that of the agent."""
MISSING = (
    "|".join(name for extra in EXTRAS if not all(map(find_spec, extra)) for name in extra)
    or "nothing"
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "pfm_llm").rglob("*.py")
    if not re.search(rf"^(from|import) ({MISSING})\b", path.read_text(), re.MULTILINE)
)
"""All but those that import a library of an extra that is not installed."""
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "datasets", "pandas")
COMMANDS = (
    *("", "train", "evaluate", "recommend", "push", "suite", "agent", "versions", "config"),
    *(f"versions {name}" for name in ("list", "diff", "verify", "rollback", "keygen", "pull")),
    *("data", "node", "config show", "config list", "data check"),
    *("node serve", "node about", "node forget"),
    *("host", *(f"host {name}" for name in ("serve", "add", "remove", "list", "interactions"))),
)


@pytest.fixture
def light(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command where stubs that end the process stand for the heavy libraries."""
    (tmp_path / "stub").mkdir()
    for name in HEAVY:
        stub = tmp_path / "stub" / f"{name}.py"
        stub.write_text(f"raise SystemExit('{name} was imported')")

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def quick_help(
    light: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs --help in the same way."""
    return lambda *words: light(*words, "--help")


def test_the_modules_were_found() -> None:
    assert "pfm_llm" in MODULES
    assert "pfm_llm.data.splits" in MODULES
    assert len(MODULES) > 25


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_importing_everything_does_nothing_else(tmp_path: Path) -> None:
    """No output, no files, no threads left behind, and neither torch's seed nor threads moved."""
    program = (
        "import importlib, threading, torch\n"
        "before = torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype()\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        "after = torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "assert before == after, (before, after)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PFM_LLM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command_answers_help_without_importing_what_is_heavy(
    command: str, quick_help: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = quick_help("-m", "pfm_llm.cli", *command.split())
    assert result.returncode == 0, result.stderr
    assert f"Usage: pfm {command}".rstrip() in result.stdout


@pytest.mark.parametrize("words", [("-m", "pfm_llm.cli", "train"), ("scripts/fed_train.py",)])
def test_a_mistyped_setting_is_said_before_anything_heavy_is_imported(
    words: tuple[str, ...], light: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    *before, script = words
    script = str(ROOT / script) if script.endswith(".py") else script
    result = light(*before, script, "--set", "federation.num_round=3")
    assert result.returncode == 2
    assert "did you mean federation.num_rounds?" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_answers_help_without_importing_what_is_heavy(
    script: Path, quick_help: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = quick_help(script)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout.lower()


@pytest.mark.parametrize("library", HEAVY)
def test_the_stubs_see_an_import(
    library: str, tmp_path: Path, quick_help: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "eager.py"
    script.write_text(f"import {library}\nprint('usage: eager')\n")
    result = quick_help(script)
    assert result.returncode == 1
    assert f"{library} was imported" in result.stderr
