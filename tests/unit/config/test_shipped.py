"""The shipped configs: found by name, and as short as the defaults allow."""

from pathlib import Path
from typing import Any

import pytest

from pfm_llm.audit.modes import AuditMode, Protection, config_of
from pfm_llm.base.errors import ConfigError
from pfm_llm.config import shipped
from pfm_llm.config.choices import Participation
from pfm_llm.config.methods import Method
from pfm_llm.config.schema import ExperimentConfig, load_config, parse_config, read_yaml
from pfm_llm.config.settings import leaves
from pfm_llm.config.settle import settle
from pfm_llm.config.shipped import find_config, shipped_folder
from pfm_llm.config.stages import PrivacyConfig
from pfm_llm.server.privacy.accounting import epsilon_of
from pfm_llm.suite.plan import BudgetConfig, RunConfig, SuiteConfig, load_suite

CONFIGS = sorted(shipped_folder().glob("*.yaml"))
SUITES = sorted((shipped_folder() / "suites").glob("*.yaml"))
SAYS_WHAT_IT_IS = {"data.source", "method"}
"""A reader wants to see these, default or not."""


def equal_to_a_default(settings: dict[str, object]) -> list[str]:
    method = {key: value for key, value in settings.items() if key == "method"}
    defaults = leaves(parse_config({"name": "x", **method}).model_dump(mode="json"))
    return [
        key
        for key, value in settings.items()
        if key not in SAYS_WHAT_IT_IS and key in defaults and defaults[key] == value
    ]


def test_there_are_configs_and_suites() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {"deployment", "quickstart", "ml100k", "games", "groceries"}
    assert {path.stem for path in SUITES} == {
        "ml100k",
        "ml100k_next",
        "games",
        "groceries",
        "groceries_time",
        "ml100k_new_items",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_line_of_a_config_says_what_is_the_default(path: Path) -> None:
    load_config(path)
    assert equal_to_a_default(leaves(read_yaml(path))) == []


def test_a_deployment_is_protected_in_every_way_that_an_audit_measures() -> None:
    config = load_config(find_config("deployment"))
    safest = config_of(config, AuditMode.ALL, Protection()).federation
    own = config.federation
    assert own.masks == safest.masks is not None
    assert own.stages == safest.stages
    assert own.privacy is not None
    assert safest.privacy is not None
    assert own.privacy.noise_multiplier == safest.privacy.noise_multiplier
    assert own.privacy.participation is Participation.PASSES
    # Each user is in so many rounds; more would exceed the budget.
    assert own.passes == 3


def test_a_deployment_stays_within_its_budget() -> None:
    pytest.importorskip("dp_accounting", reason="the extra [dp] is not installed")
    config = settle(load_config(find_config("deployment")), 100_000)
    privacy = config.federation.privacy
    assert privacy is not None
    epsilon = epsilon_of(privacy.noise_multiplier or 0.0, 3, None, privacy.delta)
    assert 0.8 < epsilon < (privacy.max_epsilon or 0.0)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_no_line_of_a_suite_says_what_is_the_default(path: Path) -> None:
    suite, tree = load_suite(path), read_yaml(path)
    # What a run or a budget sets may bring a default back that `set` or the base has moved.
    moved = {*suite.set, *leaves(read_yaml(path.parent / suite.base))}
    below = [*suite.budgets.values(), *suite.runs]
    settings = [suite.set, *({k: v for k, v in s.set.items() if k not in moved} for s in below)]
    assert [equal_to_a_default(each) for each in settings] == [[] for _ in settings]
    for given, model in (
        (tree, SuiteConfig),
        *((budget, BudgetConfig) for budget in tree["budgets"].values()),
        *((run, RunConfig) for run in tree["runs"]),
    ):
        fields = {name: model.model_fields[name].default for name in given}
        assert [name for name, default in fields.items() if given[name] == default] == []
    assert "select" not in tree


def test_the_tuned_settings_are_those_of_a_name_and_data_alone() -> None:
    """What configs/ml100k.yaml said before the defaults said it, for its 943 clients."""
    config = settle(parse_config({"name": "mine", "data": {"source": "mine.csv"}}), 943)
    assert config.method is Method.PFM
    assert (config.window.items, config.adapters.num_layers) == (64, 2)
    assert (config.head.item_ids, config.head.dropout) == ("both", 0.7)
    federation, local, server = (
        config.federation, config.federation.local, config.federation.server,
    )  # fmt: skip
    assert (federation.num_rounds, federation.cohort_size) == (400, 8)
    assert (local.schedule, local.private_lr, local.personalise_windows) == ("joint", 2e-4, 1)
    assert (local.shared_local_steps, local.private_local_steps, local.personalise_steps) == (
        1, 1, 4,
    )  # fmt: skip
    assert (server.optimizer, server.weighting) == ("fedadam", "uniform")
    assert (server.lr_lora, server.lr_head, server.lr_item_ids) == (1e-3, 3e-3, 3e-2)
    assert (server.lr_item_bias, server.lr_scale, server.warmup_rounds) == (3e-2, 1.5, 10)
    assert (config.evaluation.every, config.evaluation.max_users) == (100, 300)
    assert config.output.checkpoint_every == 50


@pytest.mark.parametrize("name", ["quickstart", "suites/games"])
def test_a_shipped_config_has_a_name(name: str) -> None:
    assert find_config(name) == shipped_folder() / f"{name}.yaml"


def test_a_path_is_itself_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_config("none/my.yaml") == Path("none/my.yaml")
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine\n")
    assert find_config("quickstart") == Path("quickstart")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no config 'quikstart'; shipped are .*quickstart.*"):
        find_config("quikstart")


def test_an_installed_package_has_them_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pfm_llm" / "config").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "pfm_llm" / "config" / "shipped.py"))
    assert shipped_folder() == tmp_path / "configs"
    packaged = tmp_path / "pfm_llm" / "_configs"
    packaged.mkdir()
    (packaged / "mine.yaml").write_text("name: mine\n")
    assert find_config("mine") == packaged / "mine.yaml"


def test_every_setting_of_a_shipped_config_exists() -> None:
    known: Any = leaves(ExperimentConfig(name="x").model_dump(mode="json")).keys()
    # These are not dumped while they are off.
    of_privacy = {f"federation.privacy.{key}" for key in PrivacyConfig.model_fields}
    off = {"ablation", "federation.masks", *of_privacy}
    for path in CONFIGS:
        assert leaves(read_yaml(path)).keys() <= known | off
