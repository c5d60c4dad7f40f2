"""Tables of README.md, rebuilt from result files so that no figure is typed by hand.

A table stands between two comments, the first of which names its file or its suite's folder::

    <!-- table: results/ml100k/results.json -->
    ...
    <!-- end of table -->

    <!-- suite: results/ml100k/small -->
    ...
    <!-- end of table -->

A file with ``ratios`` (of ``benchmarks/engine.py``) becomes a table of the race, any other a
table of results; a suite's folder becomes a table of its methods.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import DataError
from pfm_llm.base.files import read_json
from pfm_llm.evaluation.results import read_results
from pfm_llm.evaluation.tables import results_table
from pfm_llm.suite.report.tables import markdown_table

_TABLE = re.compile(
    r"(<!-- (?P<kind>table|suite): (?P<path>\S+) -->\n).*?(?P<end><!-- end of table -->)",
    flags=re.DOTALL,
)


def with_fresh_tables(text: str, root: Path) -> str:
    """The text with every table rebuilt.

    Args:
        text: Markdown with the comments.
        root: What the named files are relative to.

    Raises:
        DataError: A named file does not exist, or a named folder holds no results.
    """

    def rebuilt(match: re.Match[str]) -> str:
        make = markdown_table if match["kind"] == "suite" else _table
        return f"{match[1]}{make(root / match['path'])}\n{match['end']}"

    return _TABLE.sub(rebuilt, text)


def _table(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"README.md names {path.name} at {path.parent}, which is not there")
    content = read_json(path)
    if "ratios" in content:
        return _race_table(content)
    rows, extra = read_results(path)
    return f"{results_table(rows).strip()}\n\n{_costs(extra)}"


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
        f"{costs['share_of_users_with_private_adapter']:.0%} of the users have a private adapter "
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
