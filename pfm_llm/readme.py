"""Tables of README.md, rebuilt from result files so that no figure is typed by hand.

A table stands between two comments, the first of which names its file::

    <!-- table: results/ml100k/results.json -->
    ...
    <!-- end of table -->

A file with ``ratios`` (of ``benchmarks/engine.py``) becomes a table of the race, any other a
table of results.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfm_llm.errors import DataError
from pfm_llm.files import read_json
from pfm_llm.run_report import read_results, results_table

_TABLE = re.compile(r"(<!-- table: (?P<path>\S+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def with_fresh_tables(text: str, root: Path) -> str:
    """The text with every table rebuilt.

    Args:
        text: Markdown with the comments.
        root: What the named files are relative to.

    Raises:
        DataError: A named file does not exist.
    """

    def rebuilt(match: re.Match[str]) -> str:
        return f"{match[1]}{_table(root / match['path'])}\n{match[3]}"

    return _TABLE.sub(rebuilt, text)


def _table(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"README.md names {path.name} at {path.parent}, which is not there")
    content = read_json(path)
    if "ratios" in content:
        return _race_table(content)
    rows, _ = read_results(path)
    return results_table(rows).strip()


def _race_table(content: Mapping[str, Any]) -> str:
    lines = [
        "| Case | client steps/s, median | slowest repeat | stacked is faster by (median) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        ratio = content["ratios"].get(f"stacked_cached/{row['case']}")
        faster = f"{ratio['median']:.1f}×" if ratio else ""
        lines.append(f"| `{row['case']}` | {row['median']:.2f} | {row['min']:.2f} | {faster} |")
    return "\n".join(lines)
