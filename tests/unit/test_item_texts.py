"""The benchmark of item vectors ranks as it says, and chooses by its rule."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import item_texts
from benchmarks import item_texts_bench as bench
from benchmarks.item_texts_bench import Kind, Setting
from pfm_llm.model.items.whitening import fit_normaliser
from pfm_llm.runs.run import load_corpus
from tests.support.tiny import NUM_USERS, TITLES, Tiny, write_encoder


def test_an_item_of_a_half_life_counts_half() -> None:
    texts = torch.zeros(13, 2)
    texts[0, 0] = texts[12, 1] = 1.0  # 12 items old, and the newest
    old, new = bench.faded(texts).tolist()
    assert old == pytest.approx(new / 2)


def test_qualities_are_those_of_a_loop_over_users(tiny: Tiny, tmp_path: Path) -> None:
    held_out = load_corpus(tiny.config(tmp_path)).split.validation
    states = torch.randn(len(TITLES), 12, generator=torch.Generator().manual_seed(0))
    found = bench.measure(states, held_out, "tiny", [4, 12, 64])
    assert found.keys() == {4, 12}  # vectors have no 64 dimensions
    white = fit_normaliser(states)(states)[:, :4].numpy().astype(np.float64)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    for user, (history, (target,)) in enumerate(
        zip(held_out.histories, held_out.targets, strict=True)
    ):
        mean = sum(2 ** (-age / 12) * white[item] for age, item in enumerate(history[::-1]))
        scores = {item: white[item] @ mean for item in {*range(len(TITLES))} - {*history.tolist()}}
        rank = sum(score >= scores[int(target)] for score in scores.values())
        assert found[4]["log_rank"][user] == pytest.approx(-np.log(rank))
        share = (len(scores) - rank) / (len(scores) - 1)
        assert found[4]["percentile"][user] == pytest.approx(share)


def qualities(**means: float) -> dict[Setting, dict[str, np.ndarray]]:
    """Per setting the percentiles of 1,000 users, which differ by .1 in both directions."""
    noise = np.tile([0.1, -0.1], 500)
    names = {"words": Kind("minilm"), "last": Kind("backbone", "last")}
    names["half"] = Kind("backbone", "last", "half")
    return {
        Setting(names[name], int(dim)): {"percentile": mean + noise * (int(dim) > 64)}
        for key, mean in means.items()
        for name, dim in [key.split("_")]
    }


def test_of_the_settings_that_are_level_the_one_with_the_fewest_numbers_is_chosen() -> None:
    level = {"a": qualities(words_64=0.699, words_128=0.700, last_64=0.60)}
    chosen, table = bench.choose(level)
    assert chosen == Setting(Kind("minilm"), 64)
    assert [(row["dim"], row["is_level"]) for row in table] == [
        (128, True),
        (64, True),
        (64, False),
    ]
    # .1 / sqrt(1000) is .0032: twice that is below, and three times is not.
    worse, _ = bench.choose({"a": qualities(words_64=0.690, words_128=0.700)})
    assert worse == Setting(Kind("minilm"), 128)


def test_each_domain_counts_alike_and_the_interval_narrows_with_them() -> None:
    one, other = qualities(words_64=0.7, last_128=0.9), qualities(words_64=0.7, last_128=0.6)
    few = {key: {"percentile": own["percentile"][:10]} for key, own in other.items()}
    chosen, table = bench.choose({"many": one, "few": few})
    assert chosen == Setting(Kind("backbone", "last"), 128)
    assert table[0]["mean"] == pytest.approx(0.75)
    gap = table[1]["below_best"]
    error = np.sqrt(0.1**2 / 999 + 0.1**2 / 9) / 2
    assert gap["ci_high"] == pytest.approx(-0.05 + 1.96 * error, abs=1e-4)


def test_what_is_not_measured_everywhere_or_is_no_setting_of_a_run_is_not_chosen() -> None:
    both = {"a": qualities(words_64=0.5, last_64=0.9, half_64=0.9), "b": qualities(words_64=0.5)}
    assert bench.choose(both)[0] == Setting(Kind("minilm"), 64)
    assert bench.choose({"a": qualities(words_64=0.5, half_64=0.9)})[0].kind == Kind("minilm")


def test_the_command_measures_every_setting_of_every_domain(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_encoder(tmp_path / "encoder")
    words = Kind(str(tmp_path / "encoder"))
    monkeypatch.setattr(bench, "SENTENCES", (words,))
    monkeypatch.setattr(bench, "WHOLE", (words, Kind("backbone", "last"), Kind("backbone", "mean")))
    monkeypatch.setattr(bench, "DIMS", (4, 8))
    config = str(tiny.config_file(tmp_path / "tiny.yaml", tmp_path))
    out = tmp_path / "found.json"
    few = argparse.Namespace(
        domains=[config], settings=[], sentences_only=[], half=[config], out=out
    )
    item_texts.run(few)
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * 5
    assert {row["percentile"]["num_users"] for row in found["rows"]} == {NUM_USERS}
    assert len(found["table"]) == 2 * 3  # no run can have half of the layers
    assert found["split"] == "validation"
    assert found["environment"]["versions"]
    assert "chosen: " in capsys.readouterr().out
    states = {(row["encoder"], row["pooling"], row["layers"], row["dim"]) for row in found["rows"]}
    assert len({json.dumps(row["log_rank"]) for row in found["rows"]}) == len(states) == 10
    item_texts.run(argparse.Namespace(**(vars(few) | {"sentences_only": [config], "half": []})))
    assert {row["encoder"] for row in json.loads(out.read_text())["rows"]} == {words.encoder}
