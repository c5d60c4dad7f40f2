"""Result rows as tables, in Markdown and in plain text."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pfm_llm.base.errors import DataError
from pfm_llm.config.cut_offs import HEADLINE_K, RANK_LABELS
from pfm_llm.evaluation.results import AUC, AUC_LABEL, FULL, SAMPLED, ResultRow
from pfm_llm.protocol.types import Mode

_TEXT_COLUMNS = ("Method", "Mode", "Budget")
_VALIDATION, _TEST = "validation", "test"


def results_table(
    rows: Sequence[ResultRow],
    split: str | None = None,
    confidence: float = 0.95,
    ks: Sequence[int] | None = None,
) -> str:
    """The results as Markdown: baselines first, then the modes; the best of a column in bold.

    Each group of rows with equal task, protocol and seed has its own table, and where rankings are
    cut off at several lengths, one for each. Where budgets differ, a column shows them.

    Args:
        rows: Results of any split.
        split: The split to show; None: test, or validation where nothing was measured on test.
        confidence: Coverage of the intervals in the rows, for their label.
        ks: The cut-offs to show; None: 10, or all where nothing was measured at 10.

    Raises:
        DataError: Two rows fill the same cell.
    """
    blocks = []
    for group, columns in _tables(rows, split, confidence, ks):
        header, body = _grid(group, columns, "**{}**")
        rule = ["---" if column in _TEXT_COLUMNS else "---:" for column in header]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))
        how = _how(group, "whole catalogue ranked unless negatives are named")
        blocks.append(f"{_caption(group)}; {how}. Best in bold.\n\n{table}\n")
    return "\n".join(blocks) or _nothing(split)


def terminal_table(
    rows: Sequence[ResultRow],
    split: str | None = None,
    confidence: float = 0.95,
    ks: Sequence[int] | None = None,
) -> str:
    """`results_table` as aligned plain text; the best of a column is marked with ``*``."""
    blocks = []
    for group, columns in _tables(rows, split, confidence, ks):
        header, body = _grid(group, columns, "*{}")
        short = [
            h.replace("Hit rate", "Hit").replace(", ", " /").replace(" neg.", "") for h in header
        ]
        how = _how(group, "whole catalogue ranked; /n: among n sampled negatives")
        blocks.append(f"{_caption(group)}\n{how}; *: best\n\n{_align(short, body)}\n")
    return "\n".join(blocks) or _nothing(split)


@dataclass(frozen=True)
class _Column:
    """A column of numbers: the rows that it shows, and its heading."""

    candidates: str
    metric: str
    k: int
    heading: str
    with_interval: bool

    def shows(self, row: ResultRow) -> bool:
        return (row.candidates, row.metric, row.k) == (self.candidates, self.metric, self.k)


def _tables(
    rows: Sequence[ResultRow], split: str | None, confidence: float, ks: Sequence[int] | None
) -> Iterator[tuple[list[ResultRow], list[_Column]]]:
    """The rows and the columns of each table."""
    for group in _groups(rows, split or _shown_split(rows)):
        measured = list(dict.fromkeys(row.k for row in group if row.metric in RANK_LABELS))
        if ks is None:
            shown = [HEADLINE_K] if HEADLINE_K in measured else measured
        else:
            shown = [k for k in dict.fromkeys(ks) if k in measured]
        for k in shown or [0]:
            columns = _columns(group, confidence, k)
            if columns:
                yield group, columns


def _shown_split(rows: Sequence[ResultRow]) -> str:
    splits = {row.split for row in rows}
    return _VALIDATION if _VALIDATION in splits and _TEST not in splits else _TEST


def _nothing(split: str | None) -> str:
    return f"No results on the {split or _TEST} split.\n"


def _groups(rows: Sequence[ResultRow], split: str) -> list[list[ResultRow]]:
    """Rows of one split, in groups of equal task, protocol and seed, in order of appearance."""
    groups: dict[tuple[str, str, int], list[ResultRow]] = {}
    for row in rows:
        if row.split == split:
            groups.setdefault((row.task, row.protocol, row.seed), []).append(row)
    return list(groups.values())


def _columns(rows: Sequence[ResultRow], confidence: float, k: int) -> list[_Column]:
    """The columns that at least one row fills: the full catalogue first, then samples."""
    candidates = sorted({row.candidates for row in rows}, key=lambda name: (name != FULL, name))
    interval = f" [{confidence * 100:g} %]"
    columns = [_Column(FULL, AUC, 0, AUC_LABEL + interval, True)]
    for name in candidates:
        for metric, label in RANK_LABELS.items():
            heading = f"{label}@{k}"
            with_interval = name == FULL and metric == "ndcg"
            if with_interval:
                heading += interval
            elif name != FULL:
                heading += f", {name.removeprefix(SAMPLED)} neg."
            columns.append(_Column(name, metric, k, heading, with_interval))
    return [column for column in columns if any(map(column.shows, rows))]


def _grid(
    rows: Sequence[ResultRow], columns: Sequence[_Column], best: str
) -> tuple[list[str], list[list[str]]]:
    """Header and body of one table; ``best`` is the format of a column's largest value."""
    lines: dict[tuple[str, str, str], dict[_Column, ResultRow]] = {}
    for row, column in itertools.product(rows, columns):
        if column.shows(row):
            cells = lines.setdefault((row.method, row.mode, row.budget), {})
            if column in cells:
                raise DataError(
                    f"two results for {row.method}/{row.mode}, {column.heading} on {row.split}; "
                    "make the table from the rows of one evaluation"
                )
            cells[column] = row
    places = {mode.value: place for place, mode in enumerate(Mode)}
    pieces = places[Mode.SHARED_PRIVATE] - 0.5  # one piece of the private part, before the whole
    order = sorted(lines, key=lambda key: (key[1] != Mode.NONE, places.get(key[1], pieces)))
    tops = {
        column: max(_figure(cells[column]) for cells in lines.values() if column in cells)
        for column in columns
    }
    num_names = 3 if len({budget for _, _, budget in lines}) > 1 else 2
    header = [*_TEXT_COLUMNS[:num_names], *(column.heading for column in columns)]
    body = []
    for key in order:
        names = [key[0], "-" if key[1] == Mode.NONE else key[1], key[2]][:num_names]
        body.append([*names, *(_cell(lines[key].get(c), c, tops[c], best) for c in columns)])
    return header, body


def _cell(row: ResultRow | None, column: _Column, top: str, best: str) -> str:
    if row is None:
        return "-"
    figure = _figure(row)
    text = best.format(figure) if figure == top else figure
    return f"{text} [{row.ci_low:.4f}, {row.ci_high:.4f}]" if column.with_interval else text


def _figure(row: ResultRow) -> str:
    """The value as text. Values with equal text are marked as equally good."""
    return f"{row.value:.4f}"


def _caption(rows: Sequence[ResultRow]) -> str:
    users = sorted({row.num_users for row in rows})
    budgets = {row.budget for row in rows}
    parts = [
        f"{rows[0].split.capitalize()} split",
        rows[0].task,
        rows[0].protocol,
        *(filter(None, budgets) if len(budgets) == 1 else ()),
        f"{'-'.join(str(n) for n in sorted({users[0], users[-1]}))} users",
        f"seed {rows[0].seed}",
    ]
    return " · ".join(parts)


def _how(rows: Sequence[ResultRow], ranked: str) -> str:
    """A caption for the figures of one table; ``ranked`` is the one for ranked lists."""
    is_auc = all(row.metric == AUC for row in rows)
    return "what each user liked among the user's own held-out items" if is_auc else ranked


def _align(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned columns, text to the left and numbers to the right, with a rule below the header."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if name in _TEXT_COLUMNS else cell.rjust(width)
            for cell, width, name in zip(cells, widths, header, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, body)])
