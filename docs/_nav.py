"""A hook of the site: `- folder/*` in the navigation becomes the pages of that folder, by name.

So a new method or family needs its page and no line in mkdocs.yml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Lists the pages of every folder that the navigation asks for."""
    config["nav"] = expand_folders(config["nav"], Path(config["docs_dir"]))
    return config


def expand_folders(item: Any, docs: Path) -> Any:
    """The part of the navigation, with each `folder/*` replaced by that folder's pages."""
    if isinstance(item, dict):
        return {title: expand_folders(inside, docs) for title, inside in item.items()}
    if isinstance(item, str) and item.endswith("/*"):
        pages = sorted((docs / item.removesuffix("/*")).glob("*.md"))
        return [{page.stem: page.relative_to(docs).as_posix()} for page in pages]
    if isinstance(item, list):
        return [expand_folders(inside, docs) for inside in item]
    return item
