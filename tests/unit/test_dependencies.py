"""What is imported is declared, what is declared is used, and both ends of a range are tested."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {
    canonicalize_name(found.name): found for found in map(Requirement, PROJECT["dependencies"])
}
FOR_TESTS = {
    canonicalize_name(found.name): found
    for found in map(Requirement, PROJECT["optional-dependencies"]["test"])
}
OPTIONAL = {
    *("flwr", "dp-accounting", "fastapi", "starlette", "uvicorn", "mcp", "anyio"),
    "prometheus-client",
}
"""In extras (anyio and starlette come with fastapi): `tests/unit/test_layers.py` says who may
import them."""
PACKAGE_OF = {"yaml": "pyyaml"}
USED_BY_NAME = {
    "tensorboard": "accelerate opens it for `runtime.trackers`",
}


def imported() -> dict[str, str]:
    """Each distribution that the library imports, and one file that imports it."""
    found = {}
    for path in sorted((ROOT / "pfm_llm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name != "pfm_llm":
                    found[canonicalize_name(PACKAGE_OF.get(name, name))] = str(path)
    return found


def pinned(name: str) -> dict[str, Version]:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in lines}


def test_what_the_library_imports_is_declared() -> None:
    found = imported()
    assert len(found) > 15
    assert {name: path for name, path in found.items() if name not in DECLARED}.keys() == OPTIONAL


def test_what_is_declared_is_used() -> None:
    assert DECLARED.keys() - imported().keys() == USED_BY_NAME.keys()


def test_flower_changes_five_pins_and_adds_its_own() -> None:
    (flower,) = map(Requirement, PROJECT["optional-dependencies"]["flower"])
    usual, own = pinned("constraints.txt"), pinned("constraints-flower.txt")
    assert flower.name == "flwr"
    assert own["flwr"] in flower.specifier
    moved = {name for name in usual if own[name] != usual[name]}
    assert moved == {"packaging", "protobuf", "rich", "typer", "virtualenv"}
    app = tomllib.loads((ROOT / "flower_app" / "pyproject.toml").read_text())["project"]
    assert [str(flower)] == [str(Requirement(one)) for one in app["dependencies"]]
    assert all(own[name] in found.specifier for name, found in DECLARED.items())


def test_privacy_changes_one_pin_and_adds_its_own() -> None:
    (library,) = map(Requirement, PROJECT["optional-dependencies"]["dp"])
    usual, own = pinned("constraints.txt"), pinned("constraints-dp.txt")
    assert own.keys() - usual.keys() == {"dp-accounting", "dm-tree", "wrapt"}
    assert own["dp-accounting"] in library.specifier
    assert {name for name in usual if own[name] != usual[name]} == {"attrs"}


def test_the_agent_changes_no_pin_and_adds_its_own() -> None:
    extra = list(map(Requirement, PROJECT["optional-dependencies"]["agent"]))
    usual, own = pinned("constraints.txt"), pinned("constraints-agent.txt")
    libraries = {"fastapi", "mcp", "prometheus-client", "python-multipart", "uvicorn"}
    assert {one.name for one in extra} == libraries
    assert all(own[canonicalize_name(one.name)] in one.specifier for one in extra)
    assert {name: own[name] for name in usual} == usual


def test_the_device_changes_no_pin_and_adds_one() -> None:
    (library,) = map(Requirement, PROJECT["optional-dependencies"]["device"])
    usual, own = pinned("constraints.txt"), pinned("constraints-device.txt")
    assert own.keys() - usual.keys() == {"xllamacpp"}
    assert own["xllamacpp"] in library.specifier
    assert {name: own[name] for name in usual} == usual


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_every_dependency_has_a_lower_and_an_upper_bound(name: str) -> None:
    operators = {part.operator for part in DECLARED[name].specifier}
    # pyarrow makes a major version every few months, and `datasets` sets no upper bound either.
    assert operators == ({">="} if name == "pyarrow" else {">=", "<"})


@pytest.mark.parametrize("name", sorted({**DECLARED, **FOR_TESTS}))
def test_both_ends_that_are_tested_are_in_the_declared_range(name: str) -> None:
    wanted = {**DECLARED, **FOR_TESTS}[name].specifier
    (lowest,) = (Version(part.version) for part in wanted if part.operator == ">=")
    assert pinned("constraints-lowest.txt")[name] == lowest
    assert pinned("constraints.txt")[name] in wanted
