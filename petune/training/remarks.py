"""What there is to say beside a result, such as that rows were cut: a line each, on stderr unless a program that uses
petune tells the logger `petune` otherwise.
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("petune")


def remark(line: str) -> None:
    """Say one line."""
    LOG.warning("%s", line)
