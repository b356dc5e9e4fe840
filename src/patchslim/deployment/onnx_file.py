"""An ONNX file as a file: sealed at its end, and looked through before a runtime opens it.

ONNX itself has no checksum: a flipped bit in a weight would be another answer, told by nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile

CARD_KEY = "patchslim"
SEAL_KEY = "patchslim.sha256"  # the last entry of the file: the SHA-256 of all bytes before it
# Stands in the file beside the card, so that a seal that was cut off is missed.
SEALED = {"patchslim.sealed": "sha256"}
CHUNK = 1 << 20


def seal_file(path: Path) -> None:
    """Appends the checksum of an ONNX file to it, as an entry of its metadata.

    Protocol buffers may be continued at their end, so it stays an ONNX file.
    """
    entry = _seal_entry(_digest(path, path.stat().st_size))
    with path.open("ab") as file:
        file.write(entry)


def read_card_text(path: Path) -> str | None:
    """The card in an ONNX file, None if it has none, without running or loading anything else.

    Raises:
        BadFile: it is no ONNX file, is not the one that was written, or leads to other files.
    """
    import onnx

    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # its parsers raise errors of their own
        raise BadFile(f"{path} cannot be read by ONNX: {str(error)[:200]}") from error
    entries = [(each.key, each.value) for each in model.metadata_props]
    names = [name for name, _ in entries]
    if CARD_KEY not in names:
        return None
    sealed = any(name in names for name in (*SEALED, SEAL_KEY))
    if len(set(names)) < len(names) or (sealed and not _is_whole(path)):
        raise BadFile(
            f"{path} is not the file that was exported (its SHA-256 differs). Copy it again, or "
            "export again."
        )
    if any(map(_is_elsewhere, _tensors(model))):
        raise BadFile(
            f"{path} has weights in another file, which patchslim does not write and does not "
            "open. Export it again."
        )
    card: str = dict(entries)[CARD_KEY]
    return card


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the checksum of what stands before it."""
    size = path.stat().st_size - len(_seal_entry("0" * 64))
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        end = file.read()
    return end == _seal_entry(_digest(path, size))


def _seal_entry(digest: str) -> bytes:
    """The bytes of a metadata entry with the checksum; their number is always the same."""
    import onnx

    entry = onnx.StringStringEntryProto(key=SEAL_KEY, value=digest)
    made: bytes = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    return made


def _digest(path: Path, size: int) -> str:
    """The SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0:
            part = file.read(min(CHUNK, size))
            if not part:
                break
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors in a message, those of inner graphs too."""
    import onnx

    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for each in value if _is_many(value) else [value]:
            if isinstance(each, onnx.TensorProto):
                yield each
            else:
                yield from _tensors(each)


def _is_many(value: Any) -> bool:
    """Whether the value of a field is a list of messages."""
    return not hasattr(value, "ListFields")


def _is_elsewhere(tensor: Any) -> bool:
    """Whether the numbers of a tensor stand in another file."""
    return bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL
