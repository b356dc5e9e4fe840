"""Digests of what the numbers of a sweep depend on: weights, images, the code of a method."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from patchslim.data.source import Source
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import noise_logits
from patchslim.measurement.score import Batch

DIGITS = 16  # hexadecimal, of a digest


def digest_host(host: nn.Module, adapter: Adapter) -> str:
    """Returns a digest of a model: of its weights, and where these are packed, of an answer."""
    packed = any(not _is_plain(value) for value in host.state_dict().values())
    return digest_weights(host) + (f" {noise_logits(adapter, host)}" if packed else "")


def digest_weights(module: nn.Module) -> str:
    """Returns a digest of all weights and buffers with their names."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(f"{name} {type(value).__name__}\n".encode())
        if _is_plain(value):
            found.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
            found.update(_bytes(value))
    return found.hexdigest()[:DIGITS]


def digest_source(kind: type) -> str:
    """Returns a digest of the files that define a class and those it derives from."""
    found = hashlib.sha256()
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("builtins", "torch", "abc"):
            continue
        try:
            found.update(Path(inspect.getfile(each)).read_bytes())
        except (OSError, TypeError):  # it was written in a notebook, or at the prompt
            functions = [vars(each)[name] for name in sorted(vars(each))]
            codes = [each.__code__ for each in functions if inspect.isfunction(each)]
            found.update(repr([(code.co_code, code.co_consts) for code in codes]).encode())
    return found.hexdigest()[:DIGITS]


def digest_images(batches: Iterable[Batch]) -> str:
    """Returns a digest: of all pixels, or of the names where images are read anew each time."""
    found = hashlib.sha256()
    if isinstance(batches, Source):
        found.update(f"{batches.location()} {batches.prepared}\n".encode())
        for index in range(batches.count):
            found.update(f"{batches.name_of(index)} {batches.label_of(index)}\n".encode())
        return found.hexdigest()[:DIGITS]
    for images, labels in batches:
        found.update(_bytes(images))
        if labels is not None:
            found.update(_bytes(labels))
    return found.hexdigest()[:DIGITS]


def _is_plain(value: object) -> bool:
    """Tells whether a value is a tensor of numbers, and no packed or foreign kind of one."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_quantized  # type: ignore[attr-defined]


def _bytes(value: Tensor) -> bytes:
    """Returns the bytes of a tensor of any type."""
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
