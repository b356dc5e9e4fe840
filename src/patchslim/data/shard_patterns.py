"""Finds shards in a folder, or those that a pattern such as `train-{000000..000009}.tar` names.

How many a pattern names is known before any of them is looked for. Nothing is opened here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from patchslim.data.archives import TAR_SUFFIXES
from patchslim.data.files import resolve_path, shorten
from patchslim.data.limits import Limits
from patchslim.errors import BadData

SHARD_SUFFIXES = (*TAR_SUFFIXES, ".tar.zst")
REMOTE_PATTERN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
RANGE_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_DIGITS = 18  # of a number in a range, so that it can be counted with


def find_shards(path: str, limits: Limits) -> list[Path]:
    """Finds the shards in a folder or of a pattern, in order."""
    if REMOTE_PATTERN.match(path):
        raise BadData(
            f"{shorten(path)} is not on this machine, and nothing is fetched. Copy the shards to a "
            "folder and give that, or a pattern such as folder/train-{000000..000009}.tar."
        )
    target = resolve_path(path)
    if target.is_dir():
        files = [file for file in sorted(target.iterdir()) if not file.name.startswith(".")]
        shards = [file for file in files if file.name.lower().endswith(SHARD_SUFFIXES)]
    elif target.exists():
        shards = [target]
    else:
        patterns = map(Path, _expand_ranges(str(target), limits))
        found = (file for pattern in patterns for file in _expand_stars(pattern))
        shards = list(itertools.islice(found, limits.shards + 1))
    if not shards:
        raise BadData(
            f"No shards at {shorten(path)}: give a folder of .tar files or a pattern of them."
        )
    if len(shards) > limits.shards:
        raise _too_many_shards(path, limits)
    for shard in shards:
        if not shard.is_file():
            raise BadData(f"There is no shard {shorten(shard)}, which {shorten(path)} names.")
    return shards


def _too_many_shards(path: str, limits: Limits) -> BadData:
    """Makes the error for a pattern that names more shards than the limit."""
    return BadData(
        f"{shorten(path)} names more than {limits.shards:,} shards. Give fewer, or a higher limit: "
        "Limits(shards=...), --limits shards=..."
    )


def _expand_ranges(pattern: str, limits: Limits) -> Iterator[str]:
    """Yields the pattern with every number of its {000..123} ranges, zeros in front included.

    How many there are is known before the first of them is made.
    """
    parts = RANGE_PATTERN.split(pattern)  # text, first, last, text, first, last, ..., text
    ranges: list[tuple[int, int, int]] = []
    count = 1
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if max(len(first), len(last)) > MOST_DIGITS:
            raise _too_many_shards(pattern, limits)
        low, high = int(first), int(last)
        if high < low:
            raise BadData(f"{shorten(pattern)}: the range {first}..{last} goes down.")
        count *= high - low + 1
        ranges.append((low, high, len(first)))
    if count > limits.shards:
        raise _too_many_shards(pattern, limits)
    choices = (
        [str(number).zfill(width) for number in range(low, high + 1)] for low, high, width in ranges
    )
    for numbers in itertools.product(*choices):
        filled = zip(numbers, parts[3::3], strict=True)
        yield parts[0] + "".join(number + text for number, text in filled)


def _expand_stars(pattern: Path) -> list[Path]:
    """Lists the files that match a pattern, sorted; a name without wildcards is returned as is."""
    if not any(mark in str(pattern) for mark in "*?["):
        return [pattern]
    root = Path(pattern.anchor)
    try:
        return sorted(root.glob(str(pattern.relative_to(root))))
    except (OSError, ValueError, NotImplementedError, re.error) as error:
        raise BadData(f"{shorten(pattern)} is no pattern: {shorten(error)}.") from error
