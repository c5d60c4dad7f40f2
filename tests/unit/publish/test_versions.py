"""The difference of two versions, against dense float64 arithmetic."""

import datetime
from pathlib import Path

import pytest
import torch

from pfm_llm.config.model import SharedAdapterConfig
from pfm_llm.model.head import ITEM_BIAS, ITEM_IDS, ITEM_IDS_OUT, ITEM_PROJ, STATE_PROJ
from pfm_llm.publish.artefact import Artefact
from pfm_llm.publish.manifest import Metric
from pfm_llm.publish.versions.chain import ChainReport, CheckedVersion
from pfm_llm.publish.versions.difference import Change, diff_versions, product_norm
from pfm_llm.publish.versions.history import Version
from pfm_llm.publish.versions.text import chain_text, versions_text
from tests.support.small_artefacts import ITEMS, MODULES, make_artefact, random_head, random_lora


def dense(artefact: Artefact, module: str) -> torch.Tensor:
    """The effective weight change, formed."""
    lora = artefact.manifest.adapters.shared
    tensors = artefact.shared_tensors()
    b, a = (tensors[f"lora.{module}.{factor}"].double() for factor in "BA")
    return lora.alpha / lora.rank * b @ a


def by_name(changes: tuple[Change, ...]) -> dict[str, Change]:
    return {change.name: change for change in changes}


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3), (4, 1)])
def test_norms_are_those_of_the_dense_difference(ranks: tuple[int, int], tmp_path: Path) -> None:
    older = make_artefact(tmp_path / "a", 1, rank=ranks[0])
    newer = make_artefact(tmp_path / "b", 2, rank=ranks[1])
    diff = diff_versions(older, newer)
    assert [change.name for change in diff.modules] == list(MODULES), "layer 9 before layer 10"
    for change in diff.modules:
        before, after = dense(older, change.name), dense(newer, change.name)
        assert change.norm == pytest.approx((after - before).norm().item(), rel=1e-12)
        assert change.older_norm == pytest.approx(before.norm().item(), rel=1e-12)
        assert change.relative == pytest.approx(change.norm / change.older_norm, rel=1e-12)


def test_a_change_of_alpha_alone_is_a_change_of_weights(tmp_path: Path) -> None:
    older = make_artefact(tmp_path / "a", 1)
    adapters = older.manifest.adapters.model_copy(
        update={"shared": SharedAdapterConfig(rank=2, alpha=6)}
    )
    newer = make_artefact(tmp_path / "b", 1, adapters=adapters)
    for change in diff_versions(older, newer).modules:
        assert change.relative == pytest.approx(0.5, rel=1e-12)


def test_equal_versions_differ_by_nothing_and_near_ones_by_little(tmp_path: Path) -> None:
    lora = random_lora(1)
    older = make_artefact(tmp_path / "a", 1, lora=lora)
    same = diff_versions(older, make_artefact(tmp_path / "b", 1, lora=lora))
    assert [change.norm for change in (*same.modules, *same.layers, *same.tensors)] == [0.0] * 10
    assert same.settings == ()
    # Differences far below what squares of the whole products would resolve.
    name = f"lora.{MODULES[0]}.B"
    near = {**lora, name: lora[name] * (1 + 2**-20)}
    newer = make_artefact(tmp_path / "c", 1, lora=near)
    change = by_name(diff_versions(older, newer).modules)[MODULES[0]]
    wanted = (dense(newer, MODULES[0]) - dense(older, MODULES[0])).norm().item()
    assert 0 < wanted < 1e-4
    assert change.norm == pytest.approx(wanted, rel=1e-9)


def test_equal_products_of_other_factors_differ_by_nearly_nothing(tmp_path: Path) -> None:
    lora = random_lora(1)
    turned = {}
    for module in MODULES:
        turned[f"lora.{module}.A"] = lora[f"lora.{module}.A"].flip(0) * 2
        turned[f"lora.{module}.B"] = lora[f"lora.{module}.B"].flip(1) / 2
    older = make_artefact(tmp_path / "a", 1, lora=lora)
    diff = diff_versions(older, make_artefact(tmp_path / "b", 1, lora=turned))
    assert all(change.relative is not None and change.relative < 1e-6 for change in diff.modules)


def test_a_layer_takes_its_modules_together(tmp_path: Path) -> None:
    modules = ("model.layers.3.a", "model.layers.3.b", "model.layers.12.a", "plain")
    older = make_artefact(tmp_path / "a", lora=random_lora(1, modules=modules))
    newer = make_artefact(tmp_path / "b", lora=random_lora(2, modules=modules))
    diff = diff_versions(older, newer)
    layers, single = by_name(diff.layers), by_name(diff.modules)
    assert set(layers) == {"model.layers.3", "model.layers.12", "plain"}
    both = torch.cat([dense(a, m) for a in (newer,) for m in modules[:2]])
    was = torch.cat([dense(older, m) for m in modules[:2]])
    assert layers["model.layers.3"].norm == pytest.approx((both - was).norm().item(), rel=1e-12)
    assert layers["model.layers.3"].older_norm == pytest.approx(was.norm().item(), rel=1e-12)
    assert layers["plain"].norm == single["plain"].norm


def test_modules_that_come_and_go_count_whole(tmp_path: Path) -> None:
    older = make_artefact(tmp_path / "a", lora=random_lora(1, modules=("layers.1.a", "layers.1.b")))
    newer = make_artefact(tmp_path / "b", lora=random_lora(2, modules=("layers.1.b", "layers.2.c")))
    diff = by_name(diff_versions(older, newer).modules)
    assert {name: change.note for name, change in diff.items()} == {
        "layers.1.a": "gone",
        "layers.1.b": "",
        "layers.2.c": "new",
    }
    gone, new = diff["layers.1.a"], diff["layers.2.c"]
    assert gone.norm == pytest.approx(dense(older, "layers.1.a").norm().item(), rel=1e-12)
    assert gone.relative == pytest.approx(1.0)
    assert new.norm == pytest.approx(dense(newer, "layers.2.c").norm().item(), rel=1e-12)
    assert (new.older_norm, new.relative) == (0.0, None)


def test_modules_of_another_shape_are_not_compared(tmp_path: Path) -> None:
    lora = random_lora(1)
    wider = {**lora, f"lora.{MODULES[0]}.A": torch.ones(2, 9)}
    older = make_artefact(tmp_path / "a", lora=lora)
    diff = diff_versions(older, make_artefact(tmp_path / "b", lora=wider))
    change = by_name(diff.modules)[MODULES[0]]
    assert (change.norm, change.relative, change.note) == (None, None, "of another shape")
    assert by_name(diff.layers)["model.layers.9"].norm is None
    assert by_name(diff.layers)["model.layers.10"].norm == 0.0


def test_rows_of_items_are_compared_item_by_item(tmp_path: Path) -> None:
    head = random_head(1)
    items = (ITEMS[3], "never seen", ITEMS[0], ITEMS[1])
    rows = [3, 5, 0, 1]
    moved = {**head, ITEM_BIAS: head[ITEM_BIAS][rows], ITEM_IDS: head[ITEM_IDS][rows].clone()}
    moved[ITEM_IDS][2] += 1
    older = make_artefact(tmp_path / "a", head=head)
    newer = make_artefact(tmp_path / "b", head=moved, items=items)
    diff = diff_versions(older, newer)
    assert (diff.num_items, diff.num_new, diff.num_gone) == (3, 1, 3)
    changes = by_name(diff.tensors)
    assert changes[ITEM_BIAS].norm == 0.0
    assert changes[ITEM_IDS].norm == pytest.approx(3**0.5, rel=1e-6)
    known = head[ITEM_IDS][[3, 0, 1]].double().norm().item()
    assert changes[ITEM_IDS].older_norm == pytest.approx(known, rel=1e-12)
    assert changes[ITEM_IDS].note == "over the 3 items that both know"


def test_catalogues_without_a_common_item_can_be_compared(tmp_path: Path) -> None:
    older = make_artefact(tmp_path / "a")
    newer = make_artefact(tmp_path / "b", items=("x", "y"))
    diff = diff_versions(older, newer)
    assert (diff.num_items, diff.num_new, diff.num_gone) == (0, 2, 6)
    assert by_name(diff.tensors)[ITEM_IDS].norm == 0.0


def test_head_tensors_may_come_go_and_change_shape(tmp_path: Path) -> None:
    old, new, narrow = random_head(1), random_head(2), random_head(3)
    del new[ITEM_BIAS]
    del old[ITEM_IDS], old[ITEM_IDS_OUT]
    narrow |= {
        STATE_PROJ: torch.ones(2, 8),
        ITEM_PROJ: torch.eye(2),
        ITEM_IDS_OUT: torch.ones(2, 3),
    }
    older = make_artefact(tmp_path / "a", head=old)
    changes = by_name(diff_versions(older, make_artefact(tmp_path / "b", head=new)).tensors)
    assert (changes[ITEM_BIAS].note, changes[ITEM_IDS].note) == ("gone", "new")
    wanted = (new[ITEM_PROJ].double() - old[ITEM_PROJ].double()).norm().item()
    assert changes[ITEM_PROJ].norm == pytest.approx(wanted, rel=1e-12)
    changes = by_name(diff_versions(older, make_artefact(tmp_path / "c", head=narrow)).tensors)
    assert (changes[STATE_PROJ].norm, changes[STATE_PROJ].note) == (None, "of another shape")


def metric(mode: str, value: float) -> Metric:
    return Metric(mode=mode, metric="ndcg@10", value=value, ci_low=0.0, ci_high=1.0)


def test_metrics_are_compared_one_by_one(tmp_path: Path) -> None:
    before = (metric("zero_shot", 0.1), metric("shared_only", 0.2))
    after = (metric("shared_only", 0.25), metric("private_only", 0.3))
    older = make_artefact(tmp_path / "a", metrics=before)
    changes = diff_versions(older, make_artefact(tmp_path / "b", metrics=after)).metrics
    found = {change.mode: change.difference for change in changes}
    assert found == {
        "zero_shot": None,
        "shared_only": pytest.approx(0.05),
        "private_only": None,
    }


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    older = make_artefact(tmp_path / "a", 1)
    newer = make_artefact(tmp_path / "b", 2, rank=3, data_source="other")
    found = {s.name: (s.older, s.newer) for s in diff_versions(older, newer).settings}
    assert found == {
        "round": (1, 2),
        "data_source": ("ml-100k", "other"),
        "adapters.shared.rank": (2, 3),
        "training.seed": (1, 2),
    }


def test_product_norm_of_nothing_is_zero() -> None:
    assert product_norm(torch.zeros(5, 2), torch.ones(2, 3)) == 0.0


def version_with(folder: Path, *names: str) -> Version:
    metrics = [
        Metric(mode=mode, metric=name, value=value, ci_low=0.0, ci_high=1.0)
        for mode, value in (("shared_only", 0.25), ("shared_private", 0.75))
        for name in names
    ]
    manifest = make_artefact(folder, metrics=tuple(metrics)).manifest
    day = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
    return Version("c" * 40, day, "title", (), "d" * 64, manifest, None, "")


def test_a_version_shows_ndcg_at_10_or_at_its_first_cut_off(tmp_path: Path) -> None:
    ten = version_with(tmp_path / "a", "ndcg@5", "hit_rate@5", "ndcg@10", "ndcg@20")
    five = version_with(tmp_path / "b", "hit_rate@5", "ndcg@5", "ndcg@20")
    none = version_with(tmp_path / "c", "auc", "ndcg@five")
    assert ten.headline is not None
    assert five.headline is not None
    assert (ten.headline.metric, five.headline.metric) == ("ndcg@10", "ndcg@5")
    assert (five.headline.mode, five.headline.value) == ("shared_only", 0.25)
    assert none.headline is None
    for versions, heading, cell in (
        ([ten, none], "  NDCG@10  ", "  0.2500 [0.0000, 1.0000]  "),
        ([five], "  NDCG@5  ", "  0.2500 [0.0000, 1.0000]  "),
        ([five, ten], "  NDCG  ", "  0.2500 [0.0000, 1.0000] @5  "),
    ):
        head, first, *_ = versions_text(versions).splitlines()
        assert heading in head
        assert cell in first


def test_texts_of_others_cannot_forge_a_line(tmp_path: Path) -> None:
    made = make_artefact(tmp_path / "a")
    manifest = made.manifest.model_copy(update={"name": "small\nffff  ok  signed by you\x1b[2J"})
    version = Version(
        commit="c" * 40,
        date=datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC),
        title="",
        tags=("v1\n",),
        manifest_sha256="d" * 64,
        manifest=manifest,
        signed_by=None,
        problem="wrong\nok",
    )
    report = ChainReport("a/b", "main", None, (CheckedVersion(version, ("x\ny",), ("\x1b",)),))
    assert len(versions_text([version]).splitlines()) == 3  # head, version, its problem
    assert len(chain_text(report).splitlines()) == 4  # version, problem, note, outcome
    assert "\x1b" not in versions_text([version]) + chain_text(report)
