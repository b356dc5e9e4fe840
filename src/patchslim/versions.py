"""Which versions are installed, and a clear refusal of libraries that are missing or too old.

The oldest version of each library of hosts is in its own file in `patchslim/hosts/_libraries`.
"""

from __future__ import annotations

import functools
import importlib.util
import re

from patchslim.errors import MissingExtra, OldVersion

OLDEST_VERSIONS = {"torch": (2, 6)}  # what no host can do without


@functools.cache
def installed_version(distribution: str) -> str | None:
    """Reads the version of a distribution, as pip calls it; None if it is not installed."""
    from importlib import metadata  # 20 ms, which `patchslim --help` need not wait for

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package_version() -> str:
    """Reads the version of patchslim; `0+source` if it runs from source without being installed."""
    return installed_version("patchslim") or "0+source"


def check_version(
    distribution: str,
    oldest: tuple[int, ...] | None = None,
    extra: str | None = None,
    module: str | None = None,
) -> None:
    """Refuses a library that is missing, or older than the oldest version that is tested.

    Args:
        distribution: what pip calls it.
        oldest: the oldest version that will do; by default that of `OLDEST_VERSIONS`, and any
            version of what is not listed there.
        extra: the extra of patchslim that installs it, if one does.
        module: what is imported, if it may be there without being installed.
    """
    oldest = oldest or OLDEST_VERSIONS.get(distribution)
    if oldest is None:
        return
    wanted = ".".join(map(str, oldest))
    present = installed_version(distribution)
    if present is None:
        if module is not None and importlib.util.find_spec(module) is not None:
            raise MissingExtra(
                f"{module} can be imported, but pip knows no {distribution} that is installed, so "
                "that its version is not known. Install it (`pip install -e FOLDER`), or correct "
                "its Library: `distribution` is what pip calls it; `oldest = ()` asks for none."
            )
        cure = f"patchslim[{extra}]" if extra else f"{distribution}>={wanted}"
        raise MissingExtra(f"{distribution} is not installed: pip install '{cure}'")
    if _version_numbers(present) < oldest:
        raise OldVersion(
            f"{distribution} {present} is older than {wanted}, the oldest version that patchslim "
            f"is tested with: pip install -U '{distribution}>={wanted}'"
        )


def say_upgrade(version: object) -> str:
    """The command that installs patchslim in this version or a newer one.

    A file says the version, and the command may be pasted into a shell, so that nothing but a
    version is repeated.
    """
    known = isinstance(version, str) and re.fullmatch(r"[0-9][0-9A-Za-z.]{0,30}", version)
    return f"pip install -U 'patchslim>={version}'" if known else "pip install -U patchslim"


def is_older(version: object, than: tuple[int, ...]) -> bool:
    """Tells whether a version of patchslim, as a file says it, is older than another.

    Source that is not installed has no version, and is not older.
    """
    if not isinstance(version, str) or version == package_version():
        return False
    numbers = _version_numbers(version)
    return bool(numbers) and numbers < than


def _version_numbers(version: str) -> tuple[int, ...]:
    """Reads the leading numbers of a version: '2.15.0+cpu' gives (2, 15, 0)."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(ch for ch in part if ch.isdigit())
        if not digits or not part[0].isdigit():
            break
        parts.append(int(digits))
    return tuple(parts)
