"""The architecture, held: packages, the direction of imports, and the limits of size."""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pfm_llm"

# Lowest first. A room is a package of pfm_llm or a module beside them; it imports from the lines
# above its own and from itself. Modules of one room may import each other, without loops. A room
# that is not listed is an error, and so is a line without a room.
LAYERS = [line.split() for line in """
    base
    protocol config
    server data
    text
    model
    client
    federation evaluation
    likelihood
    publish
    runs
    node
    audit suite
    recommender
    agent
    federated
    cli
    flower
""".strip().splitlines()]  # fmt: skip
HEIGHT = {room: height for height, line in enumerate(LAYERS) for room in line}
SERVER_MAY_IMPORT = {"base", "protocol", "config", "server"}
USERS_OF_FLOWER = {"client_app", "link", "server_app", "wire"}
LIBRARIES_OF_PRIVACY = {"cryptography", "dp_accounting", "numpy", "scipy"}
MAX_ROOMS, MAX_FILES = 22, 15
MAX_LINES, MAX_BODY, MAX_PARAMETERS = 400, 40, 6
CODE = ("pfm_llm", "scripts", "benchmarks", "examples")


def imported(path: Path) -> set[str]:
    """Full names of all that a module imports, wherever in it and under whatever condition."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "pfm_llm.(relative)" if node.level else f"{node.module}"
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return names - {"pfm_llm.__version__"}


def module_imports(package: Path) -> dict[str, set[str]]:
    """Module path (``data.splits``) to what it imports."""
    files = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    dotted = [".".join(path.relative_to(package).with_suffix("").parts) for path in files]
    return {
        name.removesuffix(".__init__"): imported(path)
        for name, path in zip(dotted, files, strict=True)
    }


def room(name: str) -> str:
    """The room that a module stands in: ``pfm_llm.data.splits`` -> ``data``."""
    return name.removeprefix("pfm_llm.").split(".")[0]


def wrong_imports(package: Path) -> list[str]:
    """One line for each unlisted module and each import that does not go downwards."""
    wrong = []
    for module, names in module_imports(package).items():
        own = room(module)
        if own not in HEIGHT:
            wrong.append(f"{module} is not in LAYERS")
            continue
        targets = {room(name) for name in names if name.startswith("pfm_llm.")} - {own}
        wrong += [
            f"{module} imports {target}"
            for target in sorted(targets)
            if HEIGHT.get(target, len(LAYERS)) >= HEIGHT[own]
        ]
    return wrong


def users_of(package: Path, library: str) -> set[str]:
    """The modules that import a library."""
    return {
        module
        for module, names in module_imports(package).items()
        if any(name.split(".")[0] == library for name in names)
    }


def too_large(path: Path) -> list[str]:
    """One line for each limit that a file, or a function in it but for its docstring, exceeds."""
    text, name = path.read_text(), path.name
    found = []
    if (lines := text.count("\n")) > MAX_LINES:
        found.append(f"{name} has {lines} lines")
    is_command = path.parent == PACKAGE / "cli"  # its parameters are the options of a command
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        size = (node.end_lineno or 0) - node.lineno + 1
        size -= docstring.count("\n") + 1 if docstring else 0
        if size > MAX_BODY:
            found.append(f"{name}: {node.name} has {size} lines")
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        own = [a for a in arguments if a.arg not in ("self", "cls")]
        if len(own) > MAX_PARAMETERS and not is_command:
            found.append(f"{name}: {node.name} has {len(own)} parameters")
    return found


def callers_of_from_pretrained(package: Path) -> set[str]:
    """``module:function`` (outermost) of each use of an attribute ``from_pretrained``."""
    return {
        f"{path.relative_to(package).as_posix()}:{getattr(statement, 'name', '')}"
        for path in package.rglob("*.py")
        for statement in ast.parse(path.read_text()).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }


def test_imports_go_downwards_only() -> None:
    assert len(module_imports(PACKAGE)) > 20
    assert wrong_imports(PACKAGE) == []


def test_every_line_of_the_layers_has_its_room() -> None:
    rooms = {room(module) for module in module_imports(PACKAGE)}
    assert rooms == HEIGHT.keys()
    assert len(rooms) <= MAX_ROOMS


def test_no_room_is_crowded() -> None:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir()]  # of rooms, see above
    assert len(folders) > 10
    crowded = {
        folder.name: len(files)
        for folder in folders
        if len(files := [*folder.glob("[!_]*.py"), *folder.glob("[!_]*/__init__.py")]) > MAX_FILES
    }
    assert crowded == {}


def test_the_server_imports_nothing_of_the_clients() -> None:
    """Nor a model: what a server knows is the contract, the table and the config."""
    graph = module_imports(PACKAGE)
    server = {module: found for module, found in graph.items() if room(module) == "server"}
    names = {name for found in server.values() for name in found}
    ours = {room(name) for name in names if name.startswith("pfm_llm.")}
    assert ours <= SERVER_MAY_IMPORT
    libraries = {name.split(".")[0] for name in names} - {"pfm_llm"} - sys.stdlib_module_names
    assert libraries == {"torch", *LIBRARIES_OF_PRIVACY}
    for library in LIBRARIES_OF_PRIVACY:
        using = {m for m, found in server.items() if library in {n.split(".")[0] for n in found}}
        assert all(module.startswith("server.privacy.") for module in using)


def test_only_the_accounting_imports_its_library() -> None:
    assert users_of(PACKAGE, "dp_accounting") == {"server.privacy.accounting"}


def test_modules_have_no_import_loops() -> None:
    graph = {
        f"pfm_llm.{module}": {name for name in names if name.startswith("pfm_llm.")}
        for module, names in module_imports(PACKAGE).items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the loop


def test_only_lora_imports_peft() -> None:
    assert users_of(PACKAGE, "peft") == {"model.lora"}


def test_only_the_transport_imports_flower() -> None:
    assert users_of(PACKAGE, "flwr") == {f"flower.{name}" for name in USERS_OF_FLOWER}


def test_only_the_page_of_the_agent_imports_the_libraries_of_the_web() -> None:
    for library in ("fastapi", "prometheus_client", "starlette", "uvicorn"):
        using = users_of(PACKAGE, library)
        assert using
        assert all(module.startswith("agent.web.") for module in using)
    assert users_of(PACKAGE, "mcp") == {"agent.web.mcp_server"}


def test_what_the_agent_is_knows_nothing_of_its_page() -> None:
    graph = module_imports(PACKAGE)
    inner = {m: names for m, names in graph.items() if m.startswith("agent.") and ".web" not in m}
    assert len(inner) > 5
    assert [m for m, names in inner.items() if any(".agent.web" in name for name in names)] == []


def test_what_runs_for_each_message_of_flower_imports_bytes_alone() -> None:
    """`flower.client_app` and `flower.wire` reach neither torch nor what imports it."""
    graph = module_imports(PACKAGE)
    waiting, reached = ["flower.client_app"], set()
    while waiting:
        name = waiting.pop()
        ours = {n.removeprefix("pfm_llm.") for n in graph[name] if n.startswith("pfm_llm.")}
        reached.add(name)
        waiting += sorted((ours & graph.keys()) - reached)
    assert "node.client" in reached
    libraries = {n.split(".")[0] for name in reached for n in graph[name]} - {"pfm_llm"}
    assert libraries - sys.stdlib_module_names == {"flwr"}


def test_files_and_functions_stay_small() -> None:
    paths = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    assert [line for path in paths for line in too_large(path)] == []


def test_models_are_loaded_in_backbone_encoders_beside_it_and_converted_in_assets_only() -> None:
    callers = callers_of_from_pretrained(PACKAGE)
    others = {caller for caller in callers if not caller.startswith("model/backbone.py:")}
    ours = {"cli/recommend.py:load", "agent/agent.py:PersonalAgent"}  # of our own Recommender
    encoders = {"model/items/sentence_encoder.py:load_sentence_encoder"}
    assert others == {"base/assets.py:_dequantise"} | encoders | ours
    assert callers != others


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "server").mkdir()
    files = {
        "__init__.py": "",
        "base.py": "def late():\n    import pfm_llm.runs.experiment",
        "text.py": "from . import base",
        "server/server.py": "from pfm_llm.data.splits import x",
        "data/splits.py": "from pfm_llm.data.partition import z",
        "data/partition.py": "def load():\n    return Model.from_pretrained('here')",
        "surprise.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sorted(wrong_imports(tmp_path)) == [
        "base imports runs",
        "server.server imports data",
        "surprise is not in LAYERS",
        "text imports (relative)",
    ]
    assert callers_of_from_pretrained(tmp_path) == {"data/partition.py:load"}


def test_the_limits_see_what_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    lines = ["def f(a, b, c, d, e, g, h):", '    """Long."""', *["    a += 1"] * 41]
    path.write_text("\n".join([*lines, *["x = 1"] * 360]))
    assert too_large(path) == [
        "large.py has 402 lines",
        "large.py: f has 42 lines",
        "large.py: f has 7 parameters",
    ]
