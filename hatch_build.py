"""The README for a package index, where links to files of the repository lead nowhere."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


def for_an_index(text: str, address: str) -> str:
    """Make relative links absolute below ``address``; without an address, keep their words and leave out pictures."""

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if address:
            return f"{picture}[{words}]({address.rstrip('/')}/{path})"
        return "" if picture else words

    return RELATIVE.sub(link, text)


class Readme(MetadataHookInterface):
    """Fill in the readme; ``links`` in pyproject.toml is where the repository shows its files."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the text with its links."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, self.config.get("links", ""))}
