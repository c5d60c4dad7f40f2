"""What the wheel holds, so that it works outside of a clone."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_build_copies_configs_and_prompts_to_where_the_library_looks() -> None:
    copied = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert copied == {"configs": "pfm_llm/_configs", "prompts": "pfm_llm/_prompts"}
    assert all((ROOT / folder).is_dir() for folder in copied)


def test_the_wheel_holds_the_whole_package_configs_prompts_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "pfm = pfm_llm.cli.main:main" in archive.read(entry_points).decode()
    wanted = {
        *(f"pfm_llm/_configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")),
        *(f"pfm_llm/_prompts/{path.name}" for path in (ROOT / "prompts").glob("*.toml")),
        *(
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "pfm_llm").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ),
    }
    assert {
        "pfm_llm/py.typed",
        "pfm_llm/runs/experiment.py",
        "pfm_llm/suite/report/report.html.j2",
    } < wanted
    assert wanted - names == set()


def test_every_target_of_the_makefile_is_listed_by_make_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = (line for line in makefile.splitlines() if line.startswith(".PHONY:"))
    listed = [
        line.partition(":")[0] for line in makefile.splitlines() if ": " in line and " ## " in line
    ]
    assert sorted(targets.split()[1:]) == sorted(listed)
