"""``federation.privacy``: what is refused and why, and what stays as it was without it."""

import copy
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.schema import dump_config, parse_config, training_hash
from pfm_llm.config.settings import settings_hash
from pfm_llm.config.text import set_setting

PRIVATE: dict[str, Any] = {
    "name": "private",
    "head": {"item_met": False, "item_dropout": 0.0},
    "federation": {
        "stages": [{"clip": {"norm": 1.0}}],
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
    },
}


def tree_of(**settings: Any) -> dict[str, Any]:
    """`PRIVATE` with dotted keys, ``__`` for each dot, set to other values."""
    tree = copy.deepcopy(PRIVATE)
    for key, value in settings.items():
        set_setting(tree, key.replace("__", "."), value)
    return tree


def test_what_fits_is_accepted() -> None:
    assert parse_config(tree_of()).federation.privacy is not None
    poisson = parse_config(tree_of(federation__privacy__participation="poisson"))
    assert poisson.federation.privacy is not None
    masked = parse_config(tree_of(federation__masks=True, federation__cohort_size=8))
    assert masked.federation.masks is not None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"data__users_per_client": 2, "method": "pfm_text"}, "set data.users_per_client: 1"),
        ({"method": "local_only"}, "sends no update"),
        ({"federation__server": {"aggregator": "median"}}, "aggregator: mean"),
        ({"federation__server": {"weighting": "num_examples"}}, "weighting: uniform"),
        ({"federation__transport": "bfloat16"}, "transport: float32"),
        ({"federation__stages": []}, "end federation.stages with a clip"),
        (
            {
                "federation__privacy__participation": "poisson",
                "federation__masks": True,
            },
            "leave federation.masks out",
        ),
        ({"head__item_met": True}, "head.item_met: false"),
        ({"evaluation__private_weights": [0.0, 1.0]}, "leave evaluation.private_weights empty"),
        ({"data__split": "global_temporal"}, "leave_last_out or last_fraction"),
        ({"data__met_items_only": True}, "data.met_items_only: false"),
        ({"federation__privacy__noise_multiplier": 1.0}, "set one of epsilon and noise_multiplier"),
        ({"federation__privacy__epsilon": None}, "set one of epsilon and noise_multiplier"),
        ({"federation__privacy__max_epsilon": 8.0}, "epsilon is the budget already"),
        ({"federation__privacy__delta": 1.0}, "delta"),
        ({"federation__privacy__sigma": 1.0}, "unknown key federation.privacy.sigma"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config(tree_of(**settings))


def test_what_needs_privacy_alone_is_allowed_without_it() -> None:
    tree = tree_of(head__item_met=True, federation__transport="bfloat16")
    del tree["federation"]["privacy"]
    assert parse_config(tree).federation.privacy is None


def test_a_config_without_privacy_is_dumped_and_hashed_as_before() -> None:
    plain = parse_config({"name": "plain", "federation": {"num_rounds": 10}})
    assert "privacy" not in dump_config(plain)
    # Of the version before there was privacy.
    assert (
        training_hash(plain) == "105e624f964ab496f9b5e94b36008c611410ac4fe12a0741adf1a1f602c4ce06"
    )
    assert (
        settings_hash(plain) == "ac169c162f033d9121f877f325a2a0bc29af4e71c84b2cb4ac7ce5df0fab8f85"
    )


def test_noise_is_a_setting_of_training_and_the_budget_is_none() -> None:
    hashes = {
        training_hash(parse_config(tree_of(federation__privacy={"delta": 1e-5, **privacy})))
        for privacy in ({"noise_multiplier": 1.0}, {"noise_multiplier": 2.0}, {"epsilon": 8.0})
    }
    assert len(hashes) == 3
    budgets = {
        training_hash(
            parse_config(
                tree_of(
                    federation__privacy={
                        "delta": 1e-5,
                        "noise_multiplier": 1.0,
                        "max_epsilon": budget,
                    }
                )
            )
        )
        for budget in (None, 4.0, 8.0)
    }
    assert len(budgets) == 1
    assert parse_config(tree_of()).federation.privacy.budget == 8.0
