"""Importing is safe and quick: nothing happens at import, and help costs no torch."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "pfm_llm").rglob("*.py")
)
SCRIPTS = sorted((ROOT / "scripts").glob("[!_]*.py"))


@pytest.fixture
def help_without_torch(tmp_path: Path) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    """Runs a script's --help where a stub that ends the process stands for torch."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise SystemExit('torch was imported')")

    def run(script: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "--help"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_the_modules_were_found() -> None:
    assert "pfm_llm" in MODULES
    assert "pfm_llm.data.splits" in MODULES
    assert len(MODULES) > 25


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    if module.startswith("pfm_llm.flower"):
        pytest.importorskip("flwr")
    assert importlib.import_module(module).__doc__


def test_importing_everything_does_nothing_else(tmp_path: Path) -> None:
    """No output, no files, no threads left behind, and neither torch's seed nor threads moved."""
    program = (
        "import importlib, threading, torch\n"
        "before = torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype()\n"
        f"for name in {[name for name in MODULES if 'flower' not in name]!r}:\n"
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_answers_help_without_importing_torch(
    script: Path, help_without_torch: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    result = help_without_torch(script)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_the_torch_stub_sees_an_import(
    tmp_path: Path, help_without_torch: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "eager.py"
    script.write_text("import torch\nprint('usage: eager')\n")
    result = help_without_torch(script)
    assert result.returncode == 1
    assert "torch was imported" in result.stderr
