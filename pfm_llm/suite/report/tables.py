"""The main table of a suite, as cells and as Markdown: a line per method, means over seeds.

A table claims a difference, in bold, where it is not 0 after Holm's correction for all differences
of the table (`significance.settled`).
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.config.cut_offs import RANK_LABELS, headline_k
from pfm_llm.evaluation.personality.significance import ROUNDING, Figure, over_seeds, settled
from pfm_llm.evaluation.results import AUC, AUC_LABEL, ResultRow
from pfm_llm.protocol.types import Mode
from pfm_llm.suite.report.reading import SuiteResult, by_run, read_suite
from pfm_llm.suite.report.trials import trials_of_baseline, trials_of_run

_NEXT_ITEM, _LIKE = "next_item", "like"
_POPULARITY, _POOLED = "popularity", "central"
_LEAKING = "_leaking"
_BYTES_PER_MB = 1e6
_QUALITIES = (*RANK_LABELS, AUC)


UNADJUSTED = "°"
UNADJUSTED_NOTE = (
    f"{UNADJUSTED}: the interval, which is that of this difference alone, and the verdict after "
    "Holm's correction for all differences of the table disagree; go by the verdict."
)


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        heading: The heading without the label of the interval.
        metric: The metric of the rows to show.
        tasks: Tasks of the rows; the first task with the metric counts.
        k: Cut-off of the rows; None: any.
        form: Format of a number.
        has_interval: Whether to show the interval.
        is_difference: Whether bold means that the difference is settled; otherwise, the best value.
    """

    heading: str
    metric: str
    tasks: tuple[str, ...] = (_NEXT_ITEM, _LIKE)
    k: int | None = None
    form: str = "{:.4f}"
    has_interval: bool = True
    is_difference: bool = False


def columns_of(results: Sequence[SuiteResult]) -> tuple[Column, ...]:
    """The columns of the main table; the first is NDCG at the suite's headline cut-off.

    Args:
        results: Of a suite with one budget.
    """
    k = headline_k(results[0].extra["config"]["evaluation"].get("ks", ()))
    return (
        Column(f"NDCG@{k}", "ndcg", (_NEXT_ITEM,), k),
        Column(f"Hit rate@{k}", "hit_rate", (_NEXT_ITEM,), k, has_interval=False),
        Column(AUC_LABEL, AUC, (_LIKE,)),
        Column("Gain, log rank", "gain_log_rank", form="{:+.3f}", is_difference=True),
        Column(f"Gain, NDCG@{k}", "gain_ndcg", form="{:+.4f}", is_difference=True),
        Column("Gain, like AUC", "gain_auc", form="{:+.4f}", is_difference=True),
        Column("Identification", "identification", form="{:.2f}"),
    )


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text.
        is_bold: Whether the text is bold.
    """

    text: str
    is_bold: bool = False


@dataclass(frozen=True)
class Line:
    """A method in the main table.

    Attributes:
        method: The method's name.
        run: The run's name in the suite; empty for a baseline.
        regime: The training regime; empty for a baseline.
        figures: Column to figure; columns without a figure are absent.
        num_seeds: Number of seeds of the means.
        did_not_learn: Whether it fails to beat popularity on validation with at least one seed.
        trials: How many models validation chose among; None where nobody knows.
        results: The results of the run; empty for a baseline.
    """

    method: str
    run: str
    regime: str
    figures: Mapping[Column, Figure]
    num_seeds: int
    did_not_learn: bool
    trials: int | None
    results: tuple[SuiteResult, ...] = ()

    @property
    def leaks(self) -> bool:
        """Whether training sees what is held out; such a method is shown as a warning only."""
        return self.method.endswith(_LEAKING)

    @property
    def label(self) -> str:
        """The method, followed by the run's name if that is not implied."""
        says_it = self.run in ("", self.method, f"{self.method}-{self.regime}")
        return self.method if says_it else f"{self.method} ({self.run})"

    def mean_cost(self, *names: str) -> float | None:
        """The mean over seeds of a sum of costs; None if one of them is unknown.

        Bytes of pooled training count as unknown: its rounds are only a way to draw minibatches.
        """
        if self.method == _POOLED and any(name.startswith("bytes") for name in names):
            return None
        costs = [result.extra.get("costs", {}) for result in self.results]
        if not costs or any(name not in cost for cost in costs for name in names):
            return None
        return statistics.fmean(sum(cost[name] for name in names) for cost in costs)


def summary_lines(results: Sequence[SuiteResult]) -> list[Line]:
    """A line for each baseline, then one for each run.

    Args:
        results: Of a suite with one budget.
    """
    columns = columns_of(results)
    lines = _baseline_lines(results, columns)
    for run, own in by_run(results).items():
        rows = [row for result in own for row in result.own_rows]
        described = next((row for row in rows if row.mode == own[0].mode), None)
        if described is None:
            continue  # a script's run; its methods are among the baselines
        figures = {column: mean_figures(own, own[0].mode, column) for column in columns}
        lines.append(
            Line(
                method=described.method,
                run=run,
                regime=described.regime,
                figures={column: figure for column, figure in figures.items() if figure},
                num_seeds=len(own),
                did_not_learn=any(result.extra.get("did_not_learn") for result in own),
                trials=trials_of_run(own),
                results=tuple(own),
            )
        )
    return lines


def summary_cells(results: Sequence[SuiteResult]) -> tuple[list[str], list[list[Cell]]]:
    """Header and body of the main table; the first two columns are text.

    Args:
        results: Of a suite with one budget.
    """
    lines = summary_lines(results)
    columns = [c for c in columns_of(results) if any(c in line.figures for line in lines)]
    confidence = confidence_of(results)
    interval = f" [{confidence * 100:g} %]"
    header = ["Method", "Regime"]
    header += [column.heading + (interval if column.has_interval else "") for column in columns]
    header += [
        "Validation trials",
        "MB a client and round, up / down",
        "Client steps, shared + private",
    ]
    tops = {
        column: max(
            (
                column.form.format(line.figures[column].value)
                for line in lines
                if column in line.figures and not line.leaks
            ),
            default=None,
        )
        for column in columns
    }
    sure = _settled(lines, columns, confidence)
    body = []
    for index, line in enumerate(lines):
        name = line.label + (f", {line.num_seeds} seeds" if line.num_seeds > 1 and line.run else "")
        name += " (did not learn)" if line.did_not_learn else ""
        cells = [Cell(name), Cell(line.regime or "-")]
        cells += [
            figure_cell(line.figures.get(column), column, tops[column], (index, column) in sure)
            for column in columns
        ]
        body.append([*cells, *_cost_cells(line)])
    return header, body


def _settled(
    lines: Sequence[Line], columns: Sequence[Column], confidence: float
) -> set[tuple[int, Column]]:
    """Position of a line and column of each difference that is settled among those of the table."""
    claimed = {
        (index, column): line.figures[column]
        for index, line in enumerate(lines)
        for column in columns
        if column.is_difference and column in line.figures
    }
    return settled(claimed, confidence)


def markdown_table(folder: Path) -> str:
    """The main table of a suite's results with a caption, as Markdown.

    Args:
        folder: ``results/<suite>/<budget>``.

    Raises:
        DataError: It holds no result.
        CorruptFileError: A file is not what the suite writes.
    """
    results = read_suite(folder)
    header, body = summary_cells(results)
    lines = [_line(header), _line(["---", "---", *["---:"] * (len(header) - 2)])]
    lines += [_line([f"**{c.text}**" if c.is_bold else c.text for c in cells]) for cells in body]
    parts = [caption(results), "\n".join(lines)]
    if any(cell.text.endswith(UNADJUSTED) for cells in body for cell in cells):
        parts.append(UNADJUSTED_NOTE)
    failed = [f"{r.run}, seed {r.seed}: {r.failed}" for r in results if r.failed is not None]
    if failed:
        parts.append("Failed: " + "; ".join(text.replace("\n", " ") for text in failed))
    return "\n\n".join(parts)


def caption(results: Sequence[SuiteResult]) -> str:
    """The caption of the main table."""
    rows = [row for result in results for row in result.test_rows]
    users = sorted({row.num_users for row in rows if row.metric == "ndcg"})
    seeds = sorted({result.seed for result in results})
    extra = results[0].extra
    parts = [
        f"{extra['suite']}, budget {extra['budget']}",
        "test split",
        *sorted({row.protocol for row in rows}),
        f"{'-'.join(str(n) for n in sorted({users[0], users[-1]}))} users" if users else "no users",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
    ]
    chosen = any(result.extra["grid"]["key"] is not None for result in results)
    text = "whole catalogue ranked"
    if chosen:
        text += ", learning rates chosen on validation"
    text += ". Best in bold, gains in bold where they are settled after Holm's correction"
    if len(seeds) > 1:
        text += "; over several seeds, values are means and intervals are over users and seeds"
    return f"{' · '.join(parts)}; {text}."


def mean_figures(
    results: Iterable[SuiteResult], mode: Mode | None, column: Column
) -> Figure | None:
    """The mean over results of a figure in one mode (None: any); None if a result lacks it."""
    own = list(results)
    return _mean((_found(result.own_rows, column, mode) for result in own), confidence_of(own))


def confidence_of(results: Sequence[SuiteResult]) -> float:
    """The coverage of the intervals of a suite's results."""
    return float(results[0].extra["config"]["evaluation"]["confidence"])


def figure_cell(
    figure: Figure | None, column: Column, top: str | None = None, is_settled: bool = False
) -> Cell:
    """The cell of a figure, with its interval if the column has one; ``-`` without a figure.

    Args:
        figure: The figure.
        column: Its column.
        top: The best value of the column, formatted; it is shown in bold.
        is_settled: Whether the figure, of a column of differences, is shown in bold. The mark
            `UNADJUSTED` follows where its interval alone says otherwise.
    """
    if figure is None:
        return Cell("-")
    value, low, high = map(column.form.format, (figure.value, figure.low, figure.high))
    text = f"{value} [{low}, {high}]" if column.has_interval else value
    if not column.is_difference:
        return Cell(text, value == top)
    leaves_out_zero = figure.low > ROUNDING or figure.high < -ROUNDING
    return Cell(text if leaves_out_zero == is_settled else f"{text} {UNADJUSTED}", is_settled)


def _baseline_lines(results: Sequence[SuiteResult], columns: Sequence[Column]) -> list[Line]:
    """A line for each baseline; each seed counts once, from the first run that measured it."""
    found: dict[str, dict[int, list[ResultRow]]] = {}
    weak: set[str] = set()
    for result in results:
        methods: dict[str, list[ResultRow]] = {}
        for row in result.test_rows:
            if row.mode == Mode.NONE:
                methods.setdefault(row.method, []).append(row)
        if result.extra.get("script") and result.extra.get("did_not_learn"):
            weak |= methods.keys() - {_POPULARITY}  # the best of them does not beat it
        for method, rows in methods.items():
            found.setdefault(method, {}).setdefault(result.seed, rows)
    lines = []
    for method, seeds in found.items():
        figures = {
            c: _mean((_found(rows, c, None) for rows in seeds.values()), confidence_of(results))
            for c in columns
        }
        kept = {column: figure for column, figure in figures.items() if figure}
        trials = trials_of_baseline(method, results)
        lines.append(Line(method, "", "", kept, len(seeds), method in weak, trials))
    return lines


def _found(rows: Sequence[ResultRow], column: Column, mode: Mode | None) -> ResultRow | None:
    for task in column.tasks:
        for row in rows:
            fits = (row.metric, row.task) == (column.metric, task) and column.k in (None, row.k)
            # A quality belongs to one mode; a difference between modes belongs to the whole run.
            if fits and (mode in (None, row.mode) or column.metric not in _QUALITIES):
                return row
    return None


def _mean(rows: Iterable[ResultRow | None], confidence: float) -> Figure | None:
    found = list(rows)
    whole = [row for row in found if row is not None]
    if not whole or len(whole) < len(found):
        return None
    return over_seeds(whole, confidence)


def _cost_cells(line: Line) -> list[Cell]:
    trials = "-" if line.trials is None else str(line.trials)
    clients, up, down = map(line.mean_cost, ("client_rounds", "bytes_up", "bytes_down"))
    shared, private = map(line.mean_cost, ("shared_client_steps", "private_client_steps"))
    traffic, steps = "-", "-"
    if clients and up is not None and down is not None:
        traffic = f"{up / clients / _BYTES_PER_MB:.2f} / {down / clients / _BYTES_PER_MB:.2f}"
    if shared is not None and private is not None:
        steps = f"{shared:,.0f} + {private:,.0f}"
    return [Cell(trials), Cell(traffic), Cell(steps)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
