"""The architecture, held: imports go downwards only, and some modules cannot reach others."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pfm_llm"

# Lowest first; a module imports from the lines above its own. A package (data, agent, flower)
# is one entry: its modules may import each other, without loops. A module missing here is an
# error; an entry without a module is not.
LAYERS = [line.split() for line in """
    errors types seeding choices
    config_text model_settings
    methods
    config files processes
    settings
    assets
    data participation private_store contract metrics metrics_log plots progress model_card
    signing leak_search
    prompts scoring aggregation aggregation_error run_report personality
    baselines token_table result_tables
    ranking suite_report
    readme comparison
    backbone encoding
    trunk_cache
    head
    dual_adapter local_steps readout taste batches
    objective
    cohort_model histories
    artefact alignment
    model_parts client server checkpoint hub staging
    evaluation versions
    rounds
    assembly
    export publishing
    reporting
    private_weight
    experiment
    recommender_model study
    suite
    serving
    agent flower
""".strip().splitlines()]  # fmt: skip
HEIGHT = {name: height for height, line in enumerate(LAYERS) for name in line}
SERVER_SIDE = ["server", "aggregation", "participation"]
CLIENT_SIDE = {"private_store", "client", "data"}


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


def entry(name: str) -> str:
    """The entry of LAYERS that a module belongs to: ``data.splits`` -> ``data``."""
    return name.removeprefix("pfm_llm.").split(".")[0]


def wrong_imports(package: Path) -> list[str]:
    """One line for each unlisted module and each import that does not go downwards."""
    wrong = []
    for module, names in module_imports(package).items():
        own = entry(module)
        if own not in HEIGHT:
            wrong.append(f"{module} is not in LAYERS")
            continue
        targets = {entry(name) for name in names if name.startswith("pfm_llm.")} - {own}
        wrong += [
            f"{module} imports {target}"
            for target in sorted(targets)
            if HEIGHT.get(target, len(LAYERS)) >= HEIGHT[own]
        ]
    return wrong


def reachable(package: Path, start: str) -> set[str]:
    """Entries that a module reaches by imports, directly or through others."""
    graph: dict[str, set[str]] = {}
    for module, names in module_imports(package).items():
        targets = {entry(name) for name in names if name.startswith("pfm_llm.")}
        graph.setdefault(entry(module), set()).update(targets)
    found, to_do = set(), [start]
    while to_do:
        new = graph.get(to_do.pop(), set()) - found
        found |= new
        to_do += new
    return found


def callers_of_from_pretrained(package: Path) -> set[str]:
    """``module:function`` (outermost) of each use of an attribute ``from_pretrained``."""
    return {
        f"{path.relative_to(package)}:{getattr(statement, 'name', '')}"
        for path in package.rglob("*.py")
        for statement in ast.parse(path.read_text()).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }


def test_imports_go_downwards_only() -> None:
    assert len(module_imports(PACKAGE)) > 20
    assert wrong_imports(PACKAGE) == []


def test_modules_have_no_import_loops() -> None:
    graph = {
        f"pfm_llm.{module}": {name for name in names if name.startswith("pfm_llm.")}
        for module, names in module_imports(PACKAGE).items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the loop


@pytest.mark.parametrize("module", SERVER_SIDE)
def test_server_side_cannot_reach_what_belongs_to_clients(module: str) -> None:
    assert (PACKAGE / f"{module}.py").exists()
    assert reachable(PACKAGE, module) & CLIENT_SIDE == set()


def test_only_dual_adapter_imports_peft() -> None:
    users = {
        module
        for module, names in module_imports(PACKAGE).items()
        if any(name.split(".")[0] == "peft" for name in names)
    }
    assert users == {"dual_adapter"}


def test_models_are_loaded_in_backbone_and_converted_in_assets_only() -> None:
    callers = callers_of_from_pretrained(PACKAGE)
    others = {caller for caller in callers if not caller.startswith("backbone.py:")}
    assert others == {"assets.py:_dequantise"}
    assert callers != others


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = {
        "__init__.py": "",
        "errors.py": "def late():\n    import pfm_llm.rounds",
        "participation.py": "from pfm_llm import metrics",
        "metrics.py": "from . import errors",
        "server.py": "from pfm_llm.aggregation import x",
        "aggregation.py": "from pfm_llm.data.splits import y",
        "data/splits.py": "from pfm_llm.data.partition import z",
        "data/partition.py": "def load():\n    return Model.from_pretrained('here')",
        "surprise.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sorted(wrong_imports(tmp_path)) == [
        "errors imports rounds",
        "metrics imports (relative)",
        "participation imports metrics",
        "surprise is not in LAYERS",
    ]
    assert reachable(tmp_path, "server") == {"aggregation", "data"}
    assert callers_of_from_pretrained(tmp_path) == {"data/partition.py:load"}
