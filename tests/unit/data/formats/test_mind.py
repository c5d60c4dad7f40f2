"""MIND: what users read, in order, from histories and clicks."""

from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import DataConfig
from pfm_llm.data.formats.mind import COLUMNS, mind_files, read_mind
from pfm_llm.data.interactions import build_interactions
from pfm_llm.data.rows import validate

NEWS = [f'N{n}\tnews\tworld\tTitle "{n}"\tText\thttps://x\t[]\t[]' for n in range(1, 7)]
BEHAVIORS = [
    "1\tU1\t11/15/2019 9:00:00 AM\tN2 N1\tN3-1 N4-0",
    "2\tU1\t11/14/2019 9:00:00 PM\tN2 N1\tN5-0 N6-1",
    "3\tU2\t11/15/2019 12:00:00 AM\t\tN1-1",
    "4\tU2\tsoon\t\tN2-1",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "news.tsv").write_text("\n".join(NEWS))
    (tmp_path / "behaviors.tsv").write_text("\n".join(BEHAVIORS))
    return tmp_path


def test_histories_precede_clicks_and_what_was_only_shown_is_no_event(folder: Path) -> None:
    raw = validate(read_mind(folder), COLUMNS, max_bad_rows=0.5)
    assert raw.num_bad == {"impression without a date": 1}
    interactions, _ = build_interactions(raw, DataConfig(min_interactions=1), seed=0)
    ids = interactions.catalogue.item_ids
    assert [ids[item] for item in interactions.history(0)] == ["N2", "N1", "N6", "N3"]
    assert [ids[item] for item in interactions.history(1)] == ["N1"]
    assert interactions.catalogue.fields["title"][0] == 'Title "1"'
    assert set(interactions.catalogue.fields) == {"title", "category", "subcategory", "abstract"}
    assert interactions.timestamps is not None
    first = 1_573_765_200  # 2019-11-14 21:00 UTC, of the first impression
    assert interactions.timestamps[:3].tolist() == [first - 1, first - 1, first]


def test_both_files_are_needed(folder: Path) -> None:
    assert len(mind_files(folder)) == 2
    assert mind_files(folder / "news.tsv") == ()
    (folder / "news.tsv").unlink()
    with pytest.raises(DataError, match=r"holds behaviors\.tsv but not news\.tsv"):
        mind_files(folder)
