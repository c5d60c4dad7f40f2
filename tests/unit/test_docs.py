"""README and docs say what is so: figures, links, and names of modules."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from scripts.update_claims import Claim, read_claims
from tests.support.prose import claimed_ids, figures, wrong_figures

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LOG = DOCS / "log"
PROSE = [ROOT / "README.md", *(p for p in sorted(DOCS.rglob("*.md")) if not p.is_relative_to(LOG))]
RUN_FOLDERS = {"runs"}  # also where runs are written
PAGES = [*PROSE, *sorted(LOG.rglob("*.md")), ROOT / "CONTRIBUTING.md"]

GAIN = Claim("gain.films", 0.0139, 0.005, 0.0223, "NDCG", None, None, "c", "f", "c", (0,), "n")
CLAIMS = {
    "gain.films": GAIN,
    "share.own": dataclasses.replace(GAIN, id="share.own", value=0.2577, ci_low=0.23),
    "speed.up": dataclasses.replace(GAIN, id="speed.up", value=8.2509, ci_low=None, ci_high=None),
    "users.all": dataclasses.replace(GAIN, id="users.all", value=943.0),
    "loss.own": dataclasses.replace(GAIN, id="loss.own", value=-0.0049, ci_low=-0.0108),
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_pages_were_found() -> None:
    assert len(PROSE) > 8
    assert ROOT / "README.md" in PROSE
    assert DOCS / "results.md" in PROSE


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_every_figure_in_prose_is_a_claim_of_the_committed_results(path: Path) -> None:
    assert wrong_figures(path.read_text(), read_claims(ROOT)) == []


def test_the_pages_make_claims() -> None:
    assert sum(len(claimed_ids(path.read_text())) for path in PROSE) > 30


@pytest.mark.parametrize("path", PROSE, ids=name)
def test_a_claim_stands_at_the_end_of_a_line(path: Path) -> None:
    """At its start it would end the paragraph, by the rules of CommonMark."""
    assert not re.search(r"^\s*<!-- claim:", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("It adds 0.0139 [0.0050, 0.0223].", "gain.films", 0),
        ("It adds +.014 [.005, .022] to it.", "gain.films", 0),
        ("It adds 0.0139.", "gain.films", 0),
        ("It adds 0.0139 NDCG@10 [0.0050, 0.0223].", "gain.films", 0),
        ("It adds 0.0139 NDCG@10 [0.0050, 0.0224].", "gain.films", 2),
        ("It adds 0.0138.", "gain.films", 2),  # the claim is not met, the figure not claimed
        ("It adds 0.0139 [0.0051, 0.0223].", "gain.films", 2),
        ("It adds 0.0139.", "gain.film", 2),
        ("Own is best for 26 % and it adds 0.014.", "share.own, gain.films", 0),
        ("It adds 0.014 and own is best for 26 %.", "share.own gain.films", 2),
        ("Own is best for 26 % [23, 2].", "share.own", 0),
        ("Own is best for 27 %.", "share.own", 2),
        ("It is 8.3× faster.", "speed.up", 0),
        ("It is 8x faster.", "speed.up", 0),
        ("It is 9x faster.", "speed.up", 2),
        ("Of 943 users in 17 groups.", "users.all", 0),
        ("Of 944 users in 17 groups.", "users.all", 1),
        ("The difference is −0.005 [-0.011, 0.022].", "loss.own", 0),
        ("The difference is 0.005.", "loss.own", 2),
    ],
)
def test_a_sentence_is_compared_with_its_claims(text: str, names: str, expected: int) -> None:
    assert len(wrong_figures(f"{text} <!-- claim: {names} -->\n", CLAIMS)) == expected


@pytest.mark.parametrize(
    "text", ["It adds .0139.", "It is 8.3x faster.", "For 26 %.", "By 3 [1, 2].", "- item\n- 0.1"]
)
def test_a_figure_without_a_claim_is_seen(text: str) -> None:
    assert len(wrong_figures(text, CLAIMS)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11, version 0.1.0, arXiv 2506.11563, 943 users, 2026-11-24, SmolLM2-135M",
        "with `dropout: 0.4` in [a file](x-0.1.md)",
        "```python\nrate = 0.01\n```",
        "<!-- table: results/x.json -->\n| 0.1 |\n<!-- end of table -->",
        "<!-- first: runs/x -->\n| 0.1 |\n<!-- end of first -->",
        "<!-- TODO: say 0.1 -->",
        "a 95 % interval",
    ],
)
def test_settings_code_tables_and_versions_need_no_claim(text: str) -> None:
    assert wrong_figures(text, CLAIMS) == []


def test_a_claim_covers_its_own_paragraph_alone() -> None:
    text = "It adds 0.0139.\n\nSo it does. <!-- claim: gain.films -->\n"
    assert len(wrong_figures(text, CLAIMS)) == 2


def test_all_parts_of_a_figure_are_read() -> None:
    [one, two] = figures("from 1,234.5 up to −.5 % [−1, 2].")
    assert (one.value, one.unit, one.low) == ("1,234.5", "", None)
    assert (two.value, two.unit, two.low, two.high) == ("−.5", "%", "−1", "2")


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_to_files_that_are_there(path: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("path", [*PROSE, ROOT / "CONTRIBUTING.md"], ids=name)
def test_files_of_code_that_a_page_names_are_there(path: Path) -> None:
    """A path may begin at the root, or in the library: `runs/run.py`, `model/private/`."""
    assert missing_paths(path.read_text()) == []


def missing_paths(markdown: str) -> list[str]:
    """The paths in inline code that lead nowhere: files of Python, and folders of the library."""
    text = re.sub(r"^( *)```.*?^\1```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    rooms = {path.name for path in (ROOT / "pfm_llm").iterdir() if path.is_dir()}
    named = [
        path
        for path in re.findall(r"`([\w./-]+)`", text)
        if path.endswith(".py")
        or (path.endswith("/") and path.split("/")[0] in rooms - RUN_FOLDERS)
    ]
    places = (ROOT, ROOT / "pfm_llm")
    return [p for p in named if not any((at / p).exists() for at in places)]


def test_a_path_that_leads_nowhere_is_seen() -> None:
    text = "`runs/run.py`, `model/nowhere.py`, `nowhere.py`, `model/private/`, `model/nowhere/`"
    assert missing_paths(text) == ["model/nowhere.py", "nowhere.py", "model/nowhere/"]
    assert missing_paths("```python\n`model/nowhere.py`\n```\n`runs/<name>/` `setting.name`") == []


def test_the_api_pages_name_modules_that_are_there() -> None:
    names = [
        line.removeprefix("::: ").strip()
        for path in PROSE
        for line in path.read_text().splitlines()
        if line.startswith("::: ")
    ]
    assert len(names) > 5
    paths = [ROOT / full.replace(".", "/") for full in names]
    assert [p for p in paths if not (p.is_dir() or p.with_suffix(".py").is_file())] == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(tree: object) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        inner = tree.values() if isinstance(tree, dict) else tree
        return [page for each in inner for page in pages(each)]  # type: ignore[union-attr]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
