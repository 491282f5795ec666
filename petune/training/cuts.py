"""Rows that are longer than a model is told to read: how much of them is left out, so that it is said."""

from __future__ import annotations


class Cuts:
    """What rows have lost since it was last told.

    Args:
        most: the tokens of a row, at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lost: list[int] = []
        self.by_use: dict[str, dict[str, int]] = {}
        """What was told last of each use of rows in which some were cut: how many, of how many, and by how many
        tokens at least and at most.
        """

    def add(self, tokens: int) -> None:
        """A row has lost so many tokens, perhaps none."""
        if tokens > 0:
            self.lost.append(tokens)

    def told(self, what: str, rows: int) -> str:
        """One line that says how many of the rows were cut and by how much; "" if none was."""
        lost, self.lost = self.lost, []
        self.by_use.pop(what, None)
        if not lost:
            return ""
        least, most = min(lost), max(lost)
        tokens = {"least_tokens": least, "most_tokens": most}
        self.by_use[what] = {"rows": len(lost), "of": rows, **tokens}
        by = f"{most}" if least == most else f"{least} to {most}"
        return (
            f"{what}: {len(lost)} of {rows} rows are longer than training.max_length={self.most} and were cut, "
            f"by {by} tokens."
        )
