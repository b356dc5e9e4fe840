"""Which versions of the host libraries are supported, and a clear refusal of older ones."""

from __future__ import annotations

import functools
from importlib import metadata

from patchslim.errors import MissingExtra, OldVersion

OLDEST_VERSIONS = {"torch": (2, 6), "timm": (1, 0, 26), "transformers": (5, 18)}
EXTRAS = {"transformers": "patchslim[hf]"}  # others come with patchslim itself


@functools.cache
def installed_version(library: str) -> str | None:
    """The version of `library`, or None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def check_version(library: str) -> None:
    """Refuses a library that is missing, or older than the oldest version that is tested."""
    if library not in OLDEST_VERSIONS:
        return
    wanted = ".".join(map(str, OLDEST_VERSIONS[library]))
    found = installed_version(library)
    if found is None:
        cure = EXTRAS.get(library, f"{library}>={wanted}")
        raise MissingExtra(f"{library} is not installed: pip install '{cure}'")
    if _version_numbers(found) < OLDEST_VERSIONS[library]:
        raise OldVersion(
            f"{library} {found} is older than {wanted}, the oldest version that patchslim is "
            f"tested with: pip install -U '{library}>={wanted}'"
        )


def _version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.15.0+cpu' gives (2, 15, 0)."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(ch for ch in part if ch.isdigit())
        if not digits or not part[0].isdigit():
            break
        parts.append(int(digits))
    return tuple(parts)
