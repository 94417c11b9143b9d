"""A row of the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found; it holds if the error is below ``limit``."""

    check: str
    reference: str
    result: str
    error: float
    limit: float
    fails_if: str
