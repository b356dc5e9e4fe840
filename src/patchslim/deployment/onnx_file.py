"""An ONNX file as a file: sealed at its end, and looked through before a runtime opens it.

ONNX itself has no checksum: a flipped bit in a weight would be another answer, told by nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from patchslim.deployment.shared_weights import WEIGHTS_FILE, SharedWeights, digest_file
from patchslim.errors import BadFile

CARD_KEY = "patchslim"
SEAL_KEY = "patchslim.sha256"  # the last entry of the file: the SHA-256 of all bytes before it
# Stands in the file beside the card, so that a seal that was cut off is missed.
SEALED = {"patchslim.sealed": "sha256"}
WEIGHTS_KEY = "patchslim.weights"  # the SHA-256 of the file that holds weights of several models
CHUNK = 1 << 20
SMALL = 1 << 10  # bytes; what is smaller stays in the file itself


def seal_file(path: Path) -> None:
    """Appends the checksum of an ONNX file to it, as an entry of its metadata.

    Protocol buffers may be continued at their end, so it stays an ONNX file.
    """
    _append(path, SEAL_KEY, _digest(path, path.stat().st_size))


def share_weights(paths: Sequence[Path], weights: Path) -> None:
    """Moves the weights of ONNX files into the file `weights` beside them, equal ones once."""
    import onnx

    with SharedWeights(weights) as shared:
        for path in paths:
            model = onnx.load_model(path)
            kept = [(each.key, each.value) for each in model.metadata_props]
            onnx.helper.set_model_props(model, {key: v for key, v in kept if key != SEAL_KEY})
            for tensor in model.graph.initializer:
                _move(tensor, shared)
            onnx.save_model(model, path)
    digest = digest_file(weights)
    for path in paths:
        _append(path, WEIGHTS_KEY, digest)
        seal_file(path)


def _move(tensor: Any, shared: SharedWeights) -> None:
    """Moves the numbers of a tensor into a file that it then refers to, unless they are few."""
    import onnx

    content = tensor.raw_data
    if len(content) >= SMALL:
        place = shared.add(content)
        onnx.external_data_helper.set_external_data(tensor, WEIGHTS_FILE, place, len(content))
        tensor.ClearField("raw_data")


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
    others = {name for each in _tensors(model) for name in _places_elsewhere(each)}
    if others and (others != {WEIGHTS_FILE} or WEIGHTS_KEY not in names or not sealed):
        raise BadFile(
            f"{path} has weights in another file, which patchslim does not write and does not "
            "open. Export it again."
        )
    if others:
        _check_weights(path, dict(entries)[WEIGHTS_KEY])
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


def _check_weights(path: Path, digest: str) -> None:
    """Refuses another file of weights than the one that was written with the model."""
    weights = path.with_name(WEIGHTS_FILE)
    if not weights.is_file():
        raise BadFile(f"{weights} is missing, and {path} has its weights there. Copy both again.")
    if digest_file(weights) != digest:
        raise BadFile(
            f"{weights} is not the file that was exported with {path.name} (its SHA-256 differs). "
            "Copy both again, or export again."
        )


def _append(path: Path, key: str, value: str) -> None:
    """Appends an entry to the metadata of an ONNX file."""
    with path.open("ab") as file:
        file.write(_entry(key, value))


def _seal_entry(digest: str) -> bytes:
    """The bytes of the entry with the checksum; their number is always the same."""
    return _entry(SEAL_KEY, digest)


def _entry(key: str, value: str) -> bytes:
    """The bytes of an entry of the metadata."""
    import onnx

    entry = onnx.StringStringEntryProto(key=key, value=value)
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


def _places_elsewhere(tensor: Any) -> list[str]:
    """Names of the files in which numbers of a tensor stand, if not in its own."""
    if not tensor.external_data and tensor.data_location != tensor.EXTERNAL:
        return []
    return [each.value for each in tensor.external_data if each.key == "location"] or [""]
