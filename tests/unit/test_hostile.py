"""The benchmark of hostile clients: attacks do what they say, a tiny race is written down."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import hostile
from benchmarks.attacking import attacks
from pfm_llm.base import files
from pfm_llm.protocol.types import ClientUpdate, SharedState, euclidean_norm
from tests.support.tiny import Tiny

HOSTILE = frozenset("ab")
SHARED = SharedState(
    {attacks.BIAS: torch.tensor([0.0, 3.0, 1.0]), attacks.ROWS: torch.tensor([[0.0], [2.0], [1.0]])}
)


def update(client_id: str, round_number: int = 1, scale: float = 1.0) -> ClientUpdate:
    delta = {
        attacks.BIAS: scale * torch.tensor([1.0, -2.0, 0.0]),
        attacks.ROWS: scale * torch.tensor([[2.0], [0.0], [0.0]]),
    }
    return ClientUpdate(client_id, round_number, "hash", 7, 1.5, delta)


@pytest.mark.parametrize(
    "attack",
    [
        attacks.Scale(HOSTILE, -10.0),
        attacks.Promote(HOSTILE, 2),
        attacks.Collude(HOSTILE, 1.0),
        attacks.ScaleOnce(9, 1e6),
    ],
)
def test_honest_clients_send_what_they_trained(attack: attacks.Attack) -> None:
    own = update("z")
    assert attack.sent(own, SHARED) is own


def test_a_flipped_sign_shouts() -> None:
    sent = attacks.Scale(HOSTILE, -10.0).sent(update("a"), SHARED)
    assert sent.delta[attacks.BIAS].tolist() == [-10.0, 20.0, 0.0]
    assert (sent.client_id, sent.num_examples, sent.loss) == ("a", 7, 1.5)


def test_one_client_is_huge_in_one_round() -> None:
    attack = attacks.ScaleOnce(2, 1e6)
    norms = {
        (name, number): euclidean_norm(attack.sent(update(name, number), SHARED).delta)
        for number in (1, 2, 3)
        for name in "zya"
    }
    assert {pair for pair, norm in norms.items() if norm != 3.0} == {("z", 2)}
    assert norms["z", 2] == pytest.approx(3e6)


def test_promotion_lifts_the_bias_and_moves_the_row_to_the_most_popular() -> None:
    own = update("b")
    sent = attacks.Promote(HOSTILE, 2).sent(own, SHARED)
    push = {name: sent.delta[name] - own.delta[name] for name in own.delta}
    length = 30 / 2**0.5  # ten times the norm of the honest update, of bias and row each
    assert push[attacks.BIAS].tolist() == pytest.approx([0.0, 0.0, length])
    assert push[attacks.ROWS].flatten().tolist() == pytest.approx([0.0, 0.0, length])


def test_colluders_go_against_the_mean_of_their_directions() -> None:
    attack = attacks.Collude(HOSTILE, 0.5)
    first = attack.sent(update("a", scale=100.0), SHARED).delta
    expected = {name: -0.5 / 3 * tensor for name, tensor in update("a").delta.items()}
    assert all(torch.allclose(first[name], expected[name]) for name in expected)
    # A direction counts a tenth of what was there before, whatever the length of the update.
    opposite = attack.sent(update("b", scale=-1e6), SHARED).delta
    assert euclidean_norm(opposite) == pytest.approx(0.5)
    assert opposite[attacks.BIAS][0] > 0


def test_a_ratio_has_the_interval_of_paired_users() -> None:
    values = np.array([0.125, 0.5, 1.0, 0.25])
    found = hostile.ratio(values / 2, values)
    assert (found["value"], found["ci_low"], found["ci_high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_a_tiny_race_is_written_down(tiny: Tiny, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, adapters__private__enabled=False)
    del tree["adapters"]["private"]["kind"]
    names = ("data", "backbone", "items", "window", "adapters", "head")
    given = [(name, key, value) for name in names for key, value in tree[name].items()]
    overrides = [
        *(f"{name}.{key}={value!r}" for name, key, value in given),
        "federation.cohort_size=6",
        "federation.num_rounds=4",
    ]
    out = tmp_path / "hostile.json"
    openings = tmp_path / "openings.json"
    hostile.run(
        argparse.Namespace(seed=0, threads=1, settings=overrides, out=out, openings=openings)
    )
    result = files.read_json(out)
    defences = list(result["defences"])
    matches = {(one["defence"], one["attack"]): one for one in result["matches"]}
    assert set(matches) == {(d, a) for d in defences for a in hostile.ATTACKS}
    assert matches["bound", "huge_once"]["refused"] == 1
    assert matches["nothing", "huge_once"]["refused"] == 0
    rows = {(one["metric"], one["defence"], one["attack"]): one for one in result["rows"]}
    for defence in defences:
        assert rows["quality_kept", defence, "nobody"]["value"] == 1.0
        worst = min(rows["quality_kept", defence, attack]["value"] for attack in hostile.FIFTH)
        assert rows["quality_kept", defence, hostile.ANY_FIFTH]["value"] == worst
        assert rows["ranks_gained", defence, "promotion"]["num_users"] > 0
    assert rows["ranks_gained", "nothing", "promotion"]["value"] > 0
    [counted] = files.read_json(openings).values()
    assert len(counted["methods"]) == len(matches)
