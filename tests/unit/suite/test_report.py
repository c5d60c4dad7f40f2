"""Tables and the page say what the results hold, and the page needs nothing else."""

import html.parser
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.evaluation.personality.significance import over_seeds
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.runs import plots
from pfm_llm.suite.report import measures
from pfm_llm.suite.report.page import write_report
from pfm_llm.suite.report.reading import read_suite, suite_folders
from pfm_llm.suite.report.tables import UNADJUSTED, UNADJUSTED_NOTE, markdown_table
from scripts.update_readme import with_fresh_tables
from tests.support.golden import assert_golden
from tests.support.suite_double import COSTS, World, popularity, row


def on_test(**changes: Any) -> ResultRow:
    return row(**{"split": "test"} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results" / "films" / "small"


def write(folder: Path, run: str, rows: Sequence[ResultRow], seed: int = 0, **changes: Any) -> None:
    extra = {
        "suite": "films",
        "budget": "small",
        "run": run,
        "seed": seed,
        "position": 0,
        "script": None,
        "select": {"metric": "ndcg", "k": 10, "task": "next_item"},
        "training_hash": "h",
        "config": {
            "adapters": {"private": {"enabled": True}},
            "evaluation": {"confidence": 0.95},
        },
        "grid": {
            "key": "lr",
            "chosen": 0.2,
            "values": [
                {"value": 0.1, "figure": 0.07, "failed": None},
                {"value": 0.2, "figure": 0.09, "failed": None},
                {"value": 0.4, "figure": None, "failed": "not finite"},
            ],
        },
        "popularity": 0.03,
        "did_not_learn": False,
        "costs": COSTS,
        "environment": {"versions": {"torch": "2.13"}, "cpu": "a <CPU> & more", "seed": seed},
    } | changes
    write_results(folder / f"{run}-s{seed}.json", rows, extra)


OWN = [
    row(value=0.95),
    on_test(value=0.9, candidates="sampled99"),
    on_test(value=0.12, ci_low=0.11, ci_high=0.13),
    on_test(metric="hit_rate", value=0.2),
    on_test(mode="shared_only", value=0.5),
    on_test(metric="gain_log_rank", k=0, value=0.05, ci_low=0.02, ci_high=0.08),
    on_test(metric="gain_ndcg", value=0.001, ci_low=-0.002, ci_high=0.004),
    on_test(metric="identification", k=0, value=0.4, ci_low=0.35, ci_high=0.45),
    popularity(split="test", value=0.06),
]


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_whole_table(folder: Path) -> None:
    """A line for each method in the mode that it is judged by.

    20 MB up and 40 MB down of 10 client rounds are 2 and 4 MB a client and round.
    """
    like = {"task": "like", "metric": "auc", "k": 0}
    write(folder, "pfm", [*OWN, on_test(**like, value=0.7), popularity(split="test", **like)])
    assert_golden("suite_table.txt", f"{markdown_table(folder)}\n")


def test_without_a_private_adapter_the_shared_mode_is_shown(folder: Path) -> None:
    config = {"adapters": {"private": {"enabled": False}}, "evaluation": {"confidence": 0.9}}
    write(folder, "shared", OWN, config=config)
    header, _, _, own = table_rows(markdown_table(folder))
    assert header[2] == "NDCG@10 [90 %]"
    assert own[2].startswith("**0.5000")


def test_a_suite_without_10_among_its_cut_offs_is_shown_at_the_first_one(folder: Path) -> None:
    config = {
        "adapters": {"private": {"enabled": True}},
        "evaluation": {"confidence": 0.5, "ks": [5, 20]},
    }
    rows = [on_test(k=k, value=k / 100) for k in (5, 20)]
    rows.append(on_test(metric="gain_ndcg", k=5, value=0.01))
    write(folder, "pfm", rows, config=config)
    header, _, own = table_rows(markdown_table(folder))
    assert header[2:4] == ["NDCG@5 [50 %]", "Gain, NDCG@5 [50 %]"]
    assert own[2].startswith("**0.0500")
    assert "NDCG@5" in write_report(folder).read_text()


def test_several_seeds_are_one_line_of_means(folder: Path) -> None:
    """The mean of 0.10 and 0.14 is 0.12, that of 1000 and 3000 steps is 2000."""
    write(folder, "pfm", [on_test(value=0.10)], 0)
    write(folder, "pfm", [on_test(value=0.14)], 1, costs=COSTS | {"shared_client_steps": 3000})
    text = markdown_table(folder)
    (own,) = table_rows(text)[2:]
    assert own[0] == "pfm, 2 seeds"
    whole = over_seeds([on_test(value=0.10), on_test(value=0.14)], 0.95)
    assert own[2] == f"**0.1200 [{whole.low:.4f}, {whole.high:.4f}]**"
    assert whole.low < 0.11
    assert own[-1] == "2,000 + 2,000"
    assert "seeds 0, 1" in text
    assert "over users and seeds" in text


def test_the_number_of_validation_trials_stands_beside_each_method(folder: Path) -> None:
    """Three grid values times two weights of the private part; the epochs of a script."""
    config = {
        "adapters": {"private": {"enabled": True}},
        "evaluation": {"confidence": 0.95, "private_weights": [0.5, 1.0]},
    }
    baselines = ("popularity", "ease", "ease_markov")
    rows = [on_test(), *(on_test(method=name, mode="none") for name in baselines)]
    write(folder, "pfm", rows, config=config)
    shared = {"adapters": {"private": {"enabled": False}}, "evaluation": config["evaluation"]}
    write(folder, "s", [on_test(method="s", mode="shared_only")], config=shared, position=1)
    history = [{"epoch": epoch} for epoch in range(4)]
    script = [on_test(method=name, mode="none") for name in ("sasrec", "elsewhere")]
    write(folder, "sasrec", script[:1], script=["x.py"], validation_history=history, position=2)
    write(folder, "other", script[1:], script=["y.py"], position=3)
    header, _, *body = table_rows(markdown_table(folder))
    place = header.index("Validation trials")
    assert {cells[0]: cells[place] for cells in body} == {
        "popularity": "1", "ease": "5", "ease_markov": "26", "sasrec": "4", "elsewhere": "-",
        "pfm": "6", "s": "3",
    }  # fmt: skip


def test_differences_are_bold_where_they_are_settled_among_those_of_the_table(
    folder: Path,
) -> None:
    """Each gain is two standard errors from 0: alone it is settled, among three none is."""
    gain = {"metric": "gain_ndcg", "value": 0.02, "ci_low": 0.0004, "ci_high": 0.0396}
    write(folder, "a", [on_test(), on_test(**gain)])
    shown = "+0.0200 [+0.0004, +0.0396]"
    assert f"**{shown}**" in markdown_table(folder)
    assert UNADJUSTED not in markdown_table(folder)
    assert shown in Page(write_report(folder).read_text()).bold
    for position, name in enumerate("bc", 1):
        write(folder, name, [on_test(), on_test(**gain)], position=position)
    text = markdown_table(folder)
    assert text.count(f"{shown} {UNADJUSTED}") == 3
    assert text.endswith(UNADJUSTED_NOTE)
    assert f"**{shown}**" not in text
    assert shown not in Page(write_report(folder).read_text()).bold
    sure = gain | {"ci_low": 0.01, "ci_high": 0.03}
    write(folder, "c", [on_test(), on_test(**sure)], position=2)
    assert "**+0.0200 [+0.0100, +0.0300]**" in markdown_table(folder)


def test_a_figure_that_one_seed_lacks_is_not_a_mean_of_the_others(folder: Path) -> None:
    write(folder, "pfm", [on_test(), on_test(metric="gain_ndcg")], 0)
    write(folder, "pfm", [on_test()], 1)
    header, *_ = table_rows(markdown_table(folder))
    assert "Gain, NDCG@10 [95 %]" not in header


def test_lines_are_in_the_order_of_the_suite_baselines_first_and_once(folder: Path) -> None:
    write(folder, "b", [on_test(method="b"), popularity(split="test")], position=1)
    write(folder, "c", [on_test(method="c"), popularity(split="test")], position=0)
    names = [cells[0] for cells in table_rows(markdown_table(folder))[2:]]
    assert names == ["popularity", "c", "b"]


def test_runs_of_one_method_are_told_apart_and_weak_ones_marked(folder: Path) -> None:
    write(folder, "pfm-no-ids", [on_test()], did_not_learn=True)
    (own,) = table_rows(markdown_table(folder))[2:]
    assert own[0] == "pfm (pfm-no-ids) (did not learn)"


def test_a_script_s_methods_stand_with_the_baselines(folder: Path) -> None:
    rows = [on_test(method="sasrec", mode="none"), popularity(split="test")]
    write(folder, "sasrec", rows, script=["x.py"], did_not_learn=True, costs={})
    names = [cells[0] for cells in table_rows(markdown_table(folder))[2:]]
    assert names == ["sasrec (did not learn)", "popularity"]


def test_what_failed_is_said_below(folder: Path) -> None:
    write(folder, "pfm", OWN)
    grid = {"key": None, "chosen": None, "values": [{"value": None, "figure": None}]}
    write(folder, "bad", [], failed="no data\nat all", grid=grid)
    text = markdown_table(folder)
    assert text.endswith("Failed: bad, seed 0: no data at all")
    page = write_report(folder).read_text()
    assert "no data\nat all" in page
    (folder / "pfm-s0.json").unlink()
    assert "no users" in markdown_table(folder)
    assert write_report(folder).is_file()


def test_no_results_and_foreign_files_are_errors(folder: Path) -> None:
    with pytest.raises(DataError, match=r"run `pfm suite` first"):
        read_suite(folder)
    write_results(folder / "x.json", [], {"run": "x"})
    with pytest.raises(CorruptFileError, match=r"x\.json is not a result of a suite"):
        read_suite(folder)


def test_folders_of_suites_are_found(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert suite_folders(results) == []
    write(folder, "pfm", OWN)
    write(folder.with_name("full"), "pfm", OWN)
    write_results(results / "films" / "results.json", [], {})
    write_results(results / "other" / "x" / "results.json", [], {})
    assert suite_folders(results) == [folder.with_name("full"), folder]


def test_readme_has_the_table_of_a_suite(folder: Path, tmp_path: Path) -> None:
    write(folder, "pfm", OWN)
    text = (
        "before\n<!-- suite: results/films/small -->\nanother table\n<!-- end of table -->\nafter\n"
    )
    fresh = with_fresh_tables(text, tmp_path)
    assert markdown_table(folder) in fresh
    assert "another table" not in fresh
    assert fresh.startswith("before\n<!-- suite: results/films/small -->\n")
    assert fresh.endswith("\n<!-- end of table -->\nafter\n")
    assert with_fresh_tables(fresh, tmp_path) == fresh
    with pytest.raises(DataError, match="no results in"):
        with_fresh_tables(text.replace("small", "full"), tmp_path)


class Page(html.parser.HTMLParser):
    """Cells of each table by its heading, and all that is named in attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.bold: set[str] = set()
        self.links: list[str] = []
        self.jumps: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []
        self.regions: list[tuple[str | None, ...]] = []
        self.captions: list[str] = []
        self._strong = ""
        self.open: list[str] = []
        self._heading = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.links += [link for link in links if not link.startswith("#")]
        self.jumps += [link[1:] for link in links if link.startswith("#")]
        own = dict(attrs)
        self.ids += [own["id"] or ""] if "id" in own else []
        self.alts += [own["alt"] or ""] if tag == "img" else []
        if tag == "th":
            assert own["scope"] in ("col", "row")
        if own.get("class") == "wide":
            self.regions.append((own["role"], own["tabindex"], own["aria-labelledby"]))
        if tag == "strong":
            self._strong = ""
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "strong":
            self.bold.add(self._strong)

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self._heading = data
        if {"td", "th"} & set(self.open):
            self.tables[self._heading][-1][-1] += data
        if "strong" in self.open:
            self._strong += data
        if "figcaption" in self.open:
            self.captions.append(data)


CURVES = [
    on_test(metric=f"{name}_{n}{part}", k=0, value=n / 100)
    for name in ("memory", "cold_start_ndcg")
    for n in (4, 32)
    for part in ("", "_shared", "_own")
]


def test_the_page_stands_alone(folder: Path) -> None:
    write(folder, "pfm", [*OWN, *CURVES], per_user={"gain_log_rank": [0.1, -0.2, None]})
    write(folder, "bad", [], failed="<script>alert(1)</script>")
    path = write_report(folder)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.links) == 4
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert sorted(p.name for p in (folder / "plots").iterdir()) == [
        "cold_start_ndcg_next_item.png", "gain_pfm.png", "memory_next_item.png",
        "quality_by_bytes.png",
    ]  # fmt: skip
    first = path.read_bytes()
    assert write_report(folder).read_bytes() == first


def test_the_page_s_tables(folder: Path) -> None:
    write(folder, "pfm", [*OWN, *CURVES, on_test(metric="swap_ndcg", value=0.3)])
    write(folder, "other", [on_test(value=0.1)], position=1)
    page = Page(write_report(folder).read_text())
    assert list(page.tables) == [
        "Methods", "Modes", "Gain from the private part", "Is a private part personal?",
        "Fewer items in the prompt", "Few interactions known", "Grids", "Costs", "Environment",
    ]  # fmt: skip
    modes = [cells[:3] for cells in page.tables["Modes"]]
    assert modes[1:] == [
        ["pfm", "shared part alone", "0.5000 [0.4900, 0.5100]"],
        ["pfm", "shared and private part", "0.1200 [0.1100, 0.1300]"],
        ["other", "shared and private part", "0.1000 [0.0900, 0.1100]"],
    ]
    gain = {cells[0]: cells[1:] for cells in page.tables["Gain from the private part"]}
    assert gain["Measure"] == ["Task", "pfm"]
    assert gain["Gain in log-rank"] == ["next item", "0.0500 [0.0200, 0.0800]"]
    own = {cells[0]: cells[1:] for cells in page.tables["Is a private part personal?"]}
    assert own["Users told by their own part"] == ["next item", "0.4000 [0.3500, 0.4500]"]
    memory = [cells[0] for cells in page.tables["Fewer items in the prompt"]]
    assert memory[1:4] == [
        "4 items: gain in log-rank",
        "4 items: log-rank, shared part alone",
        "4 items: log-rank, with the private part",
    ]
    assert {"0.3000 [0.2900, 0.3100]", "0.0500 [0.0200, 0.0800]"} <= page.bold
    assert "0.4000 [0.3500, 0.4500]" not in page.bold
    grids = [cells[3:5] for cells in page.tables["Grids"][1:4]]
    assert grids == [["0.1", "0.0700"], ["0.2", "0.0900"], ["0.4", "not finite"]]
    assert {"0.2", "0.0900"} <= page.bold
    assert page.tables["Costs"][1][:4] == ["pfm", "0", "3", "1,000"]
    environment = page.tables["Environment"]
    assert environment[1] == ["runs", "pfm-s0, other-s0"]
    assert ["cpu", "a <CPU> & more"] in environment
    assert ["versions.torch", "2.13"] in environment


def test_the_page_is_read_by_keyboard_and_by_ear(folder: Path) -> None:
    """Every table scrolls by keys and has a name, every header a scope, every plot its words."""
    write(folder, "pfm", [*OWN, *CURVES], per_user={"gain_log_rank": [0.1, -0.2, None]})
    text = write_report(folder).read_text()
    page = Page(text)
    assert text.count("<table>") == text.count("<caption") == len(page.regions) == len(page.tables)
    assert {region[:2] for region in page.regions} == {("region", "0")}
    assert [region[2] for region in page.regions] == [i for i in page.ids if i != "plots"]
    assert set(page.jumps) == set(page.ids)
    assert len(page.captions) == len(page.alts) == 4
    assert all(caption.endswith(".") and "_" not in caption for caption in page.captions)
    assert (
        page.alts[0] == "NDCG@10 of each method: pfm 0.1200 at 0.06 GB. Lines: popularity 0.0600."
    )
    assert "50% gain, 50% lose, the mean is -0.0500" in page.alts[1]
    assert "position: sticky" in text
    assert "overflow-x: auto" in text


def test_a_method_that_leaks_is_no_reference_and_never_the_best(folder: Path, monkeypatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        plots,
        "plot_quality_by_bytes",
        lambda data, path, references, **texts: drawn.update(references=references),
    )
    leaking = on_test(method="pfedrec_published_leaking", mode="none", value=0.9)
    write(folder, "pfm", [on_test(value=0.1), leaking, popularity(split="test")])
    write_report(folder)
    assert list(drawn["references"]) == ["popularity"]
    cells = {line[0]: line[2] for line in table_rows(markdown_table(folder))[2:]}
    assert cells["pfedrec_published_leaking"].startswith("0.9000")
    assert cells["pfm"].startswith("**0.1000")


def test_every_measure_of_the_committed_results_has_a_plain_name_and_a_meaning() -> None:
    root = Path(__file__).parents[3] / "results"
    metrics = {
        row.metric
        for found in suite_folders(root)
        for result in read_suite(found)
        for row in result.own_rows
        if row.metric not in ("ndcg", "hit_rate", "mrr", "auc")
    }
    assert len(metrics) > 100
    for metric in metrics:
        one = measures.shown(metric)
        assert "_" not in one.name
        assert one.measure.meaning.endswith(".")
    assert measures.shown("lora_alone_ndcg_4").name == "4 items: lora alone, gain in NDCG"
    longer = measures.shown("memory_4_over_16").name
    assert longer == "4 items with the private part less 16 without: log-rank"
    assert measures.shown("memory_ndcg_8_own").name == "8 items: NDCG, with the private part"
    assert measures.shown("a_new_one").name == "a_new_one"
    assert list(measures.by_group(["a_new_one", "not_harmed", "gain_ndcg"])) == [
        "Gain from the private part",
        "Other measures",
    ]


def test_pooled_training_sends_nothing_that_could_be_compared(folder: Path, monkeypatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        plots,
        "plot_quality_by_bytes",
        lambda data, path, references, **texts: drawn.update(methods=data, references=references),
    )
    write(folder, "central", [on_test(method="central")])
    write(folder, "local_only", [on_test(method="local_only")], costs=COSTS | {"bytes_up": 0})
    write_report(folder)
    assert list(drawn["methods"]) == ["local_only"]
    assert drawn["references"] == {"central": 0.1}
    central, local = table_rows(markdown_table(folder))[2:]
    assert central[-2:] == ["-", "1,000 + 2,000"]
    assert local[-2] == "0.00 / 4.00"


def test_runs_are_told_apart_by_regime(folder: Path) -> None:
    for regime in ("fedsgd", "fedavg"):
        write(folder, f"pfm-{regime}", [on_test(regime=regime)])
    cells = [line[:2] for line in table_rows(markdown_table(folder))[2:]]
    assert cells == [["pfm", "fedavg"], ["pfm", "fedsgd"]]


def test_a_plot_without_figures_any_more_is_deleted(folder: Path) -> None:
    write(folder, "pfm", [*OWN, *CURVES])
    write_report(folder)
    write(folder, "pfm", OWN)
    write_report(folder)
    assert [path.name for path in (folder / "plots").iterdir()] == ["quality_by_bytes.png"]


def test_plots_get_the_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    for name in ("plot_quality_by_bytes", "plot_curves", "plot_gain_histogram"):
        monkeypatch.setattr(
            plots,
            name,
            lambda data, path, name=name, **texts: drawn.update({path.stem: (data, texts)}),
        )
    gains = {"gain_log_rank": {"7": 0.1, "9": None}}
    write(folder, "pfm", [*OWN, *CURVES], per_user=gains)
    write_report(folder)
    methods, texts = drawn["quality_by_bytes"]
    # 20 MB up and 40 MB down
    assert methods == {"pfm": plots.Point(60e6, 0.12, 0.11, 0.13)}
    assert texts["references"] == {"popularity": 0.06}
    (curve,), texts = drawn["cold_start_ndcg_next_item"]
    assert [point.x for point in curve.gain] == [4, 32]
    assert [point.value for point in curve.own] == [0.04, 0.32]
    assert len(curve.shared) == 2
    assert texts["quality"] == "NDCG@10 (next item)"
    values, _ = drawn["gain_pfm"]
    assert values.tolist()[0] == 0.1
    assert len(values) == 2


def test_what_a_suite_writes_can_be_reported(tmp_path: Path) -> None:
    world = World(tmp_path).write()
    world.run()
    folder = world.results / "films" / "small"
    assert [result.run for result in read_suite(folder)] == ["a", "b"]
    page = Page(write_report(folder).read_text())
    assert [cells[0] for cells in page.tables["Methods"][1:]] == [
        "popularity",
        "pfm (a)",
        "pfm (b)",
    ]
    assert json.loads((folder / "a-s0.json").read_text())["per_user"]
    assert "gain_a.png" in {path.name for path in (folder / "plots").iterdir()}
