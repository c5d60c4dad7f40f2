"""Rebuild the tables of README.md and docs/, and the suites' reports, from results (make table).

No figure is typed by hand.
A table stands between two comments, the first of which says what it is made of::

    <!-- table: results/quickstart/results.json -->
    ...
    <!-- end of table -->

    <!-- suite: results/ml100k/small -->
    ...
    <!-- end of table -->

    <!-- claims: next.films hits.films: popularity ease pfm -->
    ...
    <!-- end of table -->

    <!-- lists: results/quickstart/lists.json -->
    ...
    <!-- end of lists -->

    <!-- first: results/quickstart/lists.json -->
    ...
    <!-- end of lists -->

The third has a column for each prefix and a row for each name: its figures are the claims
``next.films.popularity``, ``hits.films.popularity`` and so on of ``results/claims.json``, its
headings their units, and its rows' names the notes of the first column. A file with ``ratios`` (of
``benchmarks/engine.py``) becomes a table of the race, any other file a table of results; a suite's
folder becomes a table of its methods. The last two show the lists
of `runs.lists`: those of every user in the file, and those of the user in the middle, who has a
history of median length.
"""

import argparse
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfm_llm.base.errors import DataError
from pfm_llm.cli.start import run_safely

if TYPE_CHECKING:
    from pfm_llm.runs.lists import UserLists
    from scripts.update_claims import Claim

_ROOT = Path(__file__).resolve().parents[1]

_TABLE = re.compile(
    r"(<!-- (?P<kind>table|suite|claims|lists|first): (?P<what>[^>]+) -->\n).*?"
    r"(?P<end><!-- end of (?:table|lists) -->)",
    flags=re.DOTALL,
)


def with_fresh_tables(text: str, root: Path) -> str:
    """The text with every table rebuilt.

    Args:
        text: Markdown with the comments.
        root: What the named files are relative to.

    Raises:
        DataError: A named file or claim does not exist, or a named folder holds no results.
    """
    from pfm_llm.suite.report.tables import markdown_table
    from scripts.update_claims import read_claims

    def rebuilt(match: re.Match[str]) -> str:
        kind, what = match["kind"], match["what"]
        if kind == "claims":
            table = _claims_table(what, read_claims(root))
        else:
            makers = {"suite": markdown_table, "lists": _lists, "first": _first}
            table = makers.get(kind, _table)(root / what)
        return f"{match[1]}{table}\n{match['end']}"

    return _TABLE.sub(rebuilt, text)


def _table(path: Path) -> str:
    from pfm_llm.base.files import read_json
    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import results_table

    if not path.is_file():
        raise DataError(f"a table is to be made of {path}, which is not there")
    content = read_json(path)
    if "ratios" in content:
        return _race_table(content)
    rows, extra = read_results(path)
    table = results_table(rows, confidence=extra["config"]["evaluation"]["confidence"])
    return f"{table.strip()}\n\n{_costs(extra)}"


def _lists(path: Path) -> str:
    return "\n\n".join(one.markdown() for one in _lists_of(path))


def _first(path: Path) -> str:
    found = _lists_of(path)
    return found[len(found) // 2].markdown()


def _lists_of(path: Path) -> "list[UserLists]":
    from pfm_llm.runs.lists import read_lists

    if not path.is_file():
        raise DataError(f"lists are to be shown of {path}, which is not there")
    return read_lists(path)


def _claims_table(what: str, claims: "Mapping[str, Claim]") -> str:
    """A row for each name, a column for each prefix; intervals in the first column alone."""
    prefixes, names = (part.split() for part in what.split(":"))
    missing = [f"{p}.{n}" for p in prefixes for n in names if f"{p}.{n}" not in claims]
    if missing:
        raise DataError(f"no claim {', '.join(missing)}; see results/claims.yaml, run make claims")
    rows = [[claims[f"{prefix}.{name}"] for prefix in prefixes] for name in names]
    first, *others = (claim.unit for claim in rows[0])
    lines = [
        f"| What ranks | {' | '.join([f'{first} [95 %]', *others])} |",
        f"| --- |{' ---: |' * len(prefixes)}",
    ]
    for own in rows:
        values = [f"{claim.value:.4f}" for claim in own]
        if own[0].ci_low is not None:
            values[0] += f" [{own[0].ci_low:.4f}, {own[0].ci_high:.4f}]"
        lines.append(f"| {own[0].note} | {' | '.join(values)} |")
    return "\n".join(lines)


def _costs(extra: Mapping[str, Any]) -> str:
    """What the run cost and where, in a sentence or two."""
    costs, here = extra["costs"], extra["environment"]
    per_update = 4 * costs["shared_numbers"] / 1e6
    steps = costs["personalise_client_steps"]
    fitted = f"{steps:,} more private steps" if steps else "private vectors fitted in closed form"
    return (
        f"Costs: {costs['rounds']:,} rounds, {costs['shared_client_steps']:,} client steps on the "
        f"shared state and {costs['private_client_steps']:,} on private ones, "
        f"{per_update:.1f} MB a client and round each way ({costs['bytes_up'] / 1e9:.2f} GB up, "
        f"{costs['bytes_down'] / 1e9:.2f} GB down in all); before the evaluation {fitted}, "
        "after which "
        f"{costs['share_of_users_with_private_adapter']:.0%} of the users have a private part "
        f"that is not zero. Measured on {here['threads']} threads of {here['cpu']}, "
        f"{here['dtype']}: {costs['round_seconds'] / 60:.0f} min of rounds, "
        f"{costs['evaluation_seconds'] / 60:.0f} min of evaluation."
    )


def _race_table(content: Mapping[str, Any]) -> str:
    lines = [
        "| Case | client steps/s, median | slowest repeat | stacked is faster by (median) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        ratio = content["ratios"].get(f"stacked_cached/{row['case']}")
        faster = f"{ratio['median']:.1f}×" if ratio else ""
        lines.append(f"| `{row['case']}` | {row['median']:.2f} | {row['min']:.2f} | {faster} |")
    layers, blocks = content["config"]["adapters"]["num_layers"], content["config"]["blocks"]
    tokens, here = content["config"]["tokens_per_window"]["median"], content["environment"]
    lines += [
        "",
        f"{layers} of {blocks} layers adapted, {content['config']['clients']} clients, windows of "
        f"{content['config']['items_per_window']} items ({tokens:g} tokens at the median), "
        f"{here['threads']} threads of {here['cpu']}, {here['dtype']}. Filling the trunk cache "
        f"took {content['trunk_cache_fill_s_per_client']:.2f} s a window, once.",
    ]
    return "\n".join(lines)


def update(arguments: argparse.Namespace) -> None:
    from pfm_llm.base.files import write_text
    from pfm_llm.suite.report.page import write_report
    from pfm_llm.suite.report.reading import suite_folders

    for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        fresh = with_fresh_tables(text, _ROOT)
        if fresh == text:
            continue
        if arguments.check:
            raise SystemExit(f"{path.name} is stale; run make table")
        write_text(path, fresh)
        print(f"{path.name} rebuilt")
    if not arguments.check:
        for folder in suite_folders(_ROOT / "results"):
            print(write_report(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the tables and reports (make table).")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when a table is stale"
    )
    run_safely(functools.partial(update, parser.parse_args()))
