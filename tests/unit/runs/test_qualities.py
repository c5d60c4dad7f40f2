"""How well users are served, kept and compared."""

from pathlib import Path

import numpy as np
import pytest

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation.evaluator import Measured
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.study.qualities import QUALITIES_FILE, read_qualities, write_qualities
from pfm_llm.suite.adds import adds_rows

USERS = np.array([3, 3, 7, 9])


def kept(folder: Path, ranks: list[int], users: np.ndarray = USERS) -> Path:
    """A folder whose users' targets stand at some ranks with both modes."""
    own = Ranks(full=np.array(ranks), sampled=np.array(ranks), users=users)
    folder.with_name(f"{folder.name}.private").mkdir()
    modes = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)
    write_qualities(
        folder, Measured(dict.fromkeys(modes, own), np.unique(users), {}, {}, {}, 0, 0), 10
    )
    return folder


def test_the_values_come_back_by_user(tmp_path: Path) -> None:
    found = read_qualities(kept(tmp_path / "a", [1, 2, 100, 4]))
    assert found.users.tolist() == [3, 7, 9]
    expected = [-np.log(2) / 2, -np.log(100), -np.log(4)]
    np.testing.assert_allclose(found.of[Mode.SHARED_ONLY]["log_rank"], expected)
    assert found.of[Mode.SHARED_PRIVATE]["ndcg"][1] == 0


def test_what_a_part_adds_is_the_whole_less_the_run_without_it(tmp_path: Path) -> None:
    whole, without = kept(tmp_path / "a", [1, 1, 1, 1]), kept(tmp_path / "b", [1, 1, 1, 8])
    rows = adds_rows(whole, without, ExperimentConfig(name="x"), "small")
    found = {one.metric: one for one in rows}
    assert found.keys() == {
        "adds_log_rank", "adds_ndcg", "adds_log_rank_shared", "adds_ndcg_shared",
    }  # fmt: skip
    assert found["adds_log_rank"].value == pytest.approx(np.log(8) / 3)
    assert found["adds_ndcg"].k == 10
    assert found["adds_ndcg"].num_users == 3


def test_other_users_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = kept(tmp_path / "a", [1, 1, 1, 1])
    others = kept(tmp_path / "b", [1, 1, 1, 1], USERS + 1)
    with pytest.raises(DataError, match="measured on other users"):
        adds_rows(whole, others, ExperimentConfig(name="x"), "small")
    with pytest.raises(DataError, match="measure it again"):
        read_qualities(tmp_path / "none")
    for content in ("[]", '{"users": ["a"]}', '{"users": [1], "shared_only": {}}', '{"x": 1}'):
        (tmp_path / "b.private" / QUALITIES_FILE).write_text(content)
        with pytest.raises(CorruptFileError):
            read_qualities(others)
