"""The report of loading a source: rows that were read and dropped, and notes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """Counts of the rows: ``num_rows == num_interactions + sum(dropped.values())``.

    Attributes:
        num_rows: Rows of the interactions file, without header and blank lines.
        num_interactions: Rows that became interactions.
        num_users: Users with a history.
        num_items: Items of the catalogue, those without interactions included.
        dropped: Reason to number of rows.
        examples: The first bad rows: file, line (from 1, the header is line 1) and reason.
        notes: Further facts for readers of the results.
        origins: The data sets of the Hub that were read, each with its commit, in words.
    """

    num_rows: int
    num_interactions: int
    num_users: int
    num_items: int
    dropped: Mapping[str, int]
    examples: tuple[str, ...]
    notes: tuple[str, ...]
    origins: tuple[str, ...] = ()

    def describe(self) -> str:
        """The report as lines of text."""
        lines = [
            f"{self.num_rows:,} rows read, {self.num_interactions:,} interactions kept: "
            f"{self.num_users:,} users, {self.num_items:,} items"
        ]
        lines += [f"  {count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        lines += [f"  bad row, for example: {example}" for example in self.examples]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
