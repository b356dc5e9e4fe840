"""The guides to adding a method or a family of models, which are installed with the package.

They are pages of the documentation. In a checkout this folder links to them, and the wheel holds
copies, so that an error can name a file that every reader has.
"""

from __future__ import annotations


def locate_guide(name: str) -> str:
    """Finds the path of a guide on this machine: `locate_guide("adding-a-family")`."""
    from importlib.resources import files

    return str(files(__name__) / f"{name}.md")
