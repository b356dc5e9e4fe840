"""`Limits`: how large the images, archives and folders may be that somebody else has made.

A file of some hundred bytes can say that it is an image of gigabytes. What is beyond a limit is
found in headers, before any memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from patchslim.errors import BadData, BadSetting, UnknownName


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is read at most. An image beyond a limit is named and left out, an archive refused.

    Attributes:
        file_bytes: bytes of one image, in a folder, an archive, a shard or a data set.
        pixels: pixels of one image, before and after it is resized. Those of a WebP count twice,
            since its decoder keeps several copies.
        members: files in one folder or archive.
        ratio: bytes that an archive unpacks to, for each of its own. Below `file_bytes` in all,
            any ratio is accepted.
        shards: files that a pattern with braces or stars names.
    """

    file_bytes: int = 64 << 20
    pixels: int = 26_000_000
    members: int = 2_000_000
    ratio: int = 100
    shards: int = 100_000

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 1:
                raise BadSetting(f"{each.name}={value!r}: a limit is a whole number of 1 or more.")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Limits:
        """The limits of the command line: NAME=VALUE for each that is not the usual one."""
        known = [each.name for each in fields(cls)]
        given: dict[str, int] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in known:
                raise UnknownName.of("limit", name, known, "Give NAME=VALUE.")
            try:
                given[name] = int(value)
            except ValueError as error:
                raise BadSetting(f"--limits {text[:80]}: {name} is a whole number.") from error
        return cls(**given)

    def check_file(self, size: int) -> None:
        """Refuses an image of too many bytes, with a ValueError as an unreadable one."""
        if size > self.file_bytes:
            raise ValueError(
                f"it has {size:,} bytes, and the limit is {self.file_bytes:,} (file_bytes)"
            )

    def check_pixels(self, width: int, height: int, when: str = "", times: int = 1) -> None:
        """Refuses an image of too many pixels, with a ValueError as an unreadable one."""
        if width < 1 or height < 1:
            raise ValueError(f"it has {width:,} x {height:,} pixels{when}")
        if width * height * times > self.pixels:
            raise ValueError(
                f"it has {width:,} x {height:,} pixels{when}, and the limit is {self.pixels:,} "
                "(pixels)"
            )

    def check_members(self, count: int, where: object) -> None:
        """Refuses a folder or an archive of too many files."""
        if count > self.members:
            raise BadData(
                f"{where} has more than {self.members:,} files. Give a part of it, or a higher "
                "limit: Limits(members=...), --limits members=..."
            )

    def check_unpacked(self, unpacked: int, packed: int, where: object) -> None:
        """Refuses an archive that unpacks to too many bytes."""
        if unpacked > max(self.file_bytes, self.ratio * packed):
            raise BadData(
                f"{where} has {packed:,} bytes and unpacks to more than {self.ratio} times as "
                "many, as images never do. If it is yours, unpack it first, or give a higher "
                "limit: Limits(ratio=...), --limits ratio=..."
            )


USUAL_LIMITS = Limits()
