"""Control characters in names from a file: a terminal that shows them could be renamed or recoloured."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and the ends of lines


def spelled_out(text: str) -> str:
    r"""The text with control characters as an escape such as ``\x1b``; tabs and ends of lines stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
