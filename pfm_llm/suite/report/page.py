"""One HTML page with all results of a suite; it needs no other file and no network."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base import files, templates
from pfm_llm.config.cut_offs import RANK_LABELS
from pfm_llm.config.settings import leaves
from pfm_llm.evaluation.openings import OPENINGS, describe_openings
from pfm_llm.evaluation.personality.significance import settled
from pfm_llm.evaluation.results import AUC
from pfm_llm.protocol.types import Mode
from pfm_llm.suite.plan import SelectConfig
from pfm_llm.suite.report import measures, pictures
from pfm_llm.suite.report.pictures import Picture
from pfm_llm.suite.report.reading import SuiteResult, by_run, read_suite
from pfm_llm.suite.report.tables import (
    UNADJUSTED_NOTE,
    Cell,
    Column,
    caption,
    columns_of,
    confidence_of,
    figure_cell,
    mean_figures,
    summary_cells,
)

REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"

_TEMPLATE = "report.html.j2"
_RANKING = {*RANK_LABELS, AUC}
_MODES = {
    Mode.ZERO_SHOT: "nothing trained",
    Mode.SHARED_ONLY: "shared part alone",
    Mode.PRIVATE_ONLY: "private part, no shared LoRA",
    Mode.SHARED_PRIVATE: "shared and private part",
}
_COSTS = {
    "rounds": ("Rounds", 1.0),
    "shared_client_steps": ("Client steps, shared", 1.0),
    "private_client_steps": ("Client steps, private", 1.0),
    "personalise_client_steps": ("Steps before evaluation", 1.0),
    "bytes_up": ("MB up", 1e6),
    "bytes_down": ("MB down", 1e6),
    "round_seconds": ("Minutes of rounds", 60.0),
    "evaluation_seconds": ("Minutes of evaluation", 60.0),
}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Its heading.
        note: A description of the figures.
        header: The headings of the columns.
        rows: The cells.
        num_names: Number of columns, from the left, that hold text.
        meanings: Plain name of each measure, and a sentence on it.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    num_names: int = 1
    meanings: Sequence[tuple[str, str]] = ()


def write_report(folder: Path) -> Path:
    """Draw the plots of a suite's results and write the page beside them.

    Args:
        folder: ``results/<suite>/<budget>``.

    Returns:
        The page.

    Raises:
        DataError: The folder holds no result.
        CorruptFileError: A file does not have the format of the suite's results.
        StorageError: A plot or the page cannot be written.
    """
    results = read_suite(folder)
    drawn = pictures.draw(results, folder / PLOTS_FOLDER)
    files.write_text(folder / REPORT_FILE, render(results, drawn))
    return folder / REPORT_FILE


def render(results: Sequence[SuiteResult], drawn: Sequence[Picture]) -> str:
    """The page's HTML.

    Args:
        results: All results of a suite with one budget.
        drawn: The plots to show.
    """
    header, body = summary_cells(results)
    tables = [
        _modes_table(results),
        *_measure_tables(results),
        _grid_table(results),
        _openings_table(results),
        _costs_table(results),
        _environment_table(results),
    ]
    return templates.render(
        __package__,
        _TEMPLATE,
        is_html=True,
        title=f"{results[0].extra['suite']}, budget {results[0].extra['budget']}",
        summary=Table("Methods", caption(results), header, body, num_names=2),
        failures=[(f"{r.run}, seed {r.seed}", r.failed) for r in results if r.failed is not None],
        pictures=[
            (picture, base64.b64encode(picture.path.read_bytes()).decode()) for picture in drawn
        ],
        tables=[table for table in tables if table.rows],
    )


def _modes_table(results: Sequence[SuiteResult]) -> Table:
    """The quality of every mode of every run."""
    columns = [column for column in columns_of(results) if column.metric in _RANKING]
    rows = []
    for run, own in by_run(results).items():
        for mode, named in _MODES.items():
            figures = [mean_figures(own, mode, column) for column in columns]
            if any(figures):
                cells = [figure_cell(f, c) for f, c in zip(figures, columns, strict=True)]
                rows.append([Cell(run), Cell(named), *cells])
    return Table(
        "Modes",
        "What the shared part reaches alone, the private part alone, and both together; test.",
        ["Run", "Mode", *(column.heading for column in columns)],
        rows,
        num_names=2,
    )


def _measure_tables(results: Sequence[SuiteResult]) -> list[Table]:
    """A table for each group of measures, with a column for each run that has one of them."""
    tasks: dict[str, dict[str, None]] = {}
    for result in results:
        for row in result.own_rows:
            if row.metric not in _RANKING:
                tasks.setdefault(row.metric, {})[row.task] = None
    note = (
        "Means over users and seeds, with intervals over both. Differences are in bold where they "
        "are settled after Holm's correction for those of the table, and a positive one is better "
        f"for the user. {UNADJUSTED_NOTE}"
    )
    tables = []
    for heading, metrics in measures.by_group(tasks).items():
        named = {metric: measures.shown(metric) for metric in metrics}
        runs = {
            run: own
            for run, own in by_run(results).items()
            if any(row.metric in metrics for result in own for row in result.own_rows)
        }
        shown = [(named[metric], metric, task) for metric in metrics for task in tasks[metric]]
        rows = _measure_rows(shown, list(runs.values()))
        meanings = {one.measure.meaning: one.name for one in reversed(named.values())}
        harmed = _harmed(results) if any(m.startswith("harm_") for m in metrics) else []
        tables.append(
            Table(
                heading,
                " ".join([note, *harmed]),
                ["Measure", "Task", *runs],
                rows,
                num_names=2,
                meanings=[(name, text) for text, name in reversed(meanings.items()) if text],
            )
        )
    return tables


def _measure_rows(
    shown: Sequence[tuple[measures.Shown, str, str]], runs: Sequence[Sequence[SuiteResult]]
) -> list[list[Cell]]:
    """A line for each figure: how it is shown, its metric and its task; a cell for each run."""
    columns = [
        Column("", metric, (task,), is_difference=named.measure.is_difference)
        for named, metric, task in shown
    ]
    figures = [[mean_figures(own, None, column) for own in runs] for column in columns]
    claimed = {
        (line, run): figure
        for line, column in enumerate(columns)
        for run, figure in enumerate(figures[line])
        if column.is_difference and figure
    }
    sure = settled(claimed, confidence_of(runs[0]))
    return [
        [
            Cell(named.name),
            Cell(task.replace("_", " ")),
            *(
                figure_cell(figure, columns[line], is_settled=(line, run) in sure)
                for run, figure in enumerate(figures[line])
            ),
        ]
        for line, (named, _, task) in enumerate(shown)
    ]


def _harmed(results: Sequence[SuiteResult]) -> list[str]:
    """A sentence for each result with groups of users: the groups harmed after correction."""
    sentences = []
    for result in results:
        groups = result.extra.get("harm") or {}
        harmed = [name for name, test in groups.items() if test["is_harmed_adjusted"]]
        if groups:
            sentences.append(
                f"{result.run}, seed {result.seed}: of {len(groups)} groups of users, harmed after "
                f"Holm's correction: {', '.join(harmed) or 'none'}."
            )
    return sentences


def _grid_table(results: Sequence[SuiteResult]) -> Table:
    rows = []
    for result in results:
        grid = result.extra["grid"]
        for entry in grid["values"]:
            is_chosen = result.failed is None and entry["value"] == grid["chosen"]
            figure = "-" if entry["figure"] is None else f"{entry['figure']:.4f}"
            popularity = result.extra.get("popularity")
            rows.append(
                [
                    Cell(result.run),
                    Cell(grid["key"] or "-"),
                    Cell(str(result.seed)),
                    Cell("-" if entry["value"] is None else str(entry["value"]), is_chosen),
                    Cell(entry.get("failed") or figure, is_chosen),
                    Cell("-" if popularity is None else f"{popularity:.4f}"),
                ]
            )
    select = SelectConfig.model_validate(results[0].extra["select"])
    header = ["Run", "Setting", "Seed", "Value", f"{select.figure} on validation", "Popularity"]
    return Table(
        "Grids",
        f"Chosen on validation by {select.figure} of {select.task}, in bold; only the chosen one "
        "was evaluated on test.",
        header,
        rows,
        num_names=2,
    )


def _openings_table(results: Sequence[SuiteResult]) -> Table:
    rows = []
    for result in results:
        openings = result.extra.get(OPENINGS, {})
        own = sorted({row.method for row in result.test_rows})
        if counted := describe_openings(openings, own):
            rows.append([Cell(result.run), Cell(str(result.seed)), Cell(counted)])
    return Table(
        "Measurements of test",
        "How often the test split of these data had been measured for each method, this result "
        "included. Results from before there was a count are left out.",
        ["Run", "Seed", "Times"],
        rows,
        num_names=3,
    )


def _costs_table(results: Sequence[SuiteResult]) -> Table:
    rows = []
    for result in results:
        costs = result.extra.get("costs")
        if costs:
            cells = [
                Cell(f"{costs[name] / unit:,.0f}" if name in costs else "-")
                for name, (_, unit) in _COSTS.items()
            ]
            rows.append([Cell(result.run), Cell(str(result.seed)), *cells])
    header = ["Run", "Seed", *(heading for heading, _ in _COSTS.values())]
    return Table("Costs", "Of the chosen value; sums over all clients and rounds.", header, rows)


def _environment_table(results: Sequence[SuiteResult]) -> Table:
    """Each environment once, with its runs."""
    found: dict[str, list[str]] = {}
    for result in results:
        environment = result.extra.get("environment")
        if environment:
            same = {k: v for k, v in environment.items() if k not in ("seed", "data", "split")}
            found.setdefault(json.dumps(same), []).append(f"{result.run}-s{result.seed}")
    rows = []
    for text, runs in found.items():
        rows.append([Cell("runs", True), Cell(", ".join(runs), True)])
        rows += [[Cell(name), Cell(str(value))] for name, value in leaves(json.loads(text)).items()]
    return Table("Environment", "Where it was measured.", ["What", "Is"], rows, num_names=2)
