"""Small methods for tests, for each place and each kind of reduction."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import patchslim
from patchslim.methods import Method, Place
from patchslim.methods._method import method_settings
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.tokens.merging import Merge
from patchslim.tokens.mixing import Mix
from patchslim.tokens.reduction import Keep, Mask


def slim_unchecked(host, method, schedule, tail="full"):
    """Makes the slim model without the checks of `slim`."""
    return SlimModel(
        host, plan_schedule(host, patchslim.find_adapter(host), method, schedule, tail)
    )


def row_norms(tokens):
    """Computes the norm of each patch row (B, n)."""
    return tokens.x[:, tokens.prefix :].norm(dim=2)


class KeepLongest(Method):
    """Keeps the rows with the largest norm, and reads nothing but the tokens."""

    def choose(self, tokens, signals, keep):
        return Keep(row_norms(tokens).topk(keep, dim=1).indices)


class KeepLongestBefore(KeepLongest):
    place: ClassVar[Place] = Place.BEFORE_BLOCK


class KeepLongestOnQueries(KeepLongest):
    place: ClassVar[Place] = Place.ON_QUERIES


class KeepAttendedOnQueries(Method):
    """Keeps the rows that the class token attends to most; only they are queries."""

    place: ClassVar[Place] = Place.ON_QUERIES
    needs_class_token: bool = True

    def choose(self, tokens, signals, keep):
        return Keep(signals.class_attention().topk(keep, dim=1).indices)

    def macs(self, rows, prefix, block):
        return block.attention_row_macs(rows) + prefix * block.q


class MergeShortest(Method):
    """Merges the rows with the smallest norms into the others, one after another."""

    proportional = True

    def choose(self, tokens, signals, keep):
        order = row_norms(tokens).argsort(dim=1, descending=True)
        gone = order[:, keep:]
        into = torch.arange(gone.shape[1], device=order.device) % keep
        return Merge(order[:, :keep], gone=gone, into=into.expand_as(gone))


class MergeShortestBefore(MergeShortest):
    place: ClassVar[Place] = Place.BEFORE_BLOCK


class MergeShortestOnMap(MergeShortest):
    place: ClassVar[Place] = Place.ON_MAP


class MergeShortestOnQueries(MergeShortest):
    place: ClassVar[Place] = Place.ON_QUERIES


class MixAll(Method):
    """Makes each row that goes on a mean of all rows, by their distance from the first ones."""

    def choose(self, tokens, signals, keep):
        x = tokens.x[:, tokens.prefix :].float()
        return Mix.of_slots((-torch.cdist(x[:, :keep], x)).softmax(dim=2))

    def macs(self, rows, prefix, block):
        return (block.left - prefix) * (rows - prefix) * block.width


class MixAllOnQueries(MixAll):
    place: ClassVar[Place] = Place.ON_QUERIES


class Predictor(Method):
    """Scores rows by a layer of its own; masks rows in training, and drops them otherwise."""

    place: ClassVar[Place] = Place.BEFORE_BLOCK

    def __init__(self, *, width=16):
        super().__init__()
        self.width = width
        self.score = nn.Linear(width, 1)

    def choose(self, tokens, signals, keep):
        score = self.score(tokens.x[:, tokens.prefix :]).squeeze(2)
        if self.training:
            return Mask(score.sigmoid())
        return Keep(score.topk(keep, dim=1).indices)

    def macs(self, rows, prefix, block):
        return (rows - prefix) * self.width


class HardMask(KeepLongest):
    """Masks all but the rows with the largest norm, with a mask of 0 and 1; removes none."""

    place: ClassVar[Place] = Place.BEFORE_BLOCK

    def choose(self, tokens, signals, keep):
        length = row_norms(tokens)
        if tokens.alive is not None:
            length = length * tokens.alive
        kept = length.topk(keep, dim=1).indices
        return Mask(torch.zeros_like(length).scatter(1, kept, 1.0))


class KeepAboveMean(Method):
    """Keeps the rows whose norm is above the mean of their image: an adaptive method."""

    place: ClassVar[Place] = Place.BEFORE_FEED
    adaptive = True

    def choose(self, tokens, signals, keep):
        length = row_norms(tokens)
        keep = min(keep, tokens.patches)
        alive = torch.ones_like(length) if tokens.alive is None else tokens.alive.to(length)
        mean = (length * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
        wanted = ((length > mean) & (alive > 0)).sum(dim=1, keepdim=True).clamp(1, keep)
        kept = (length * alive).topk(keep, dim=1).indices
        padding = torch.arange(keep, device=length.device) < wanted
        return Keep(kept, padding=padding)


# Settings that make a method choose in another way, so that the laws are checked again.
METHOD_VARIANTS = {
    "similarity": (
        {"threshold": 0.05, "floor": 0.0},
        {"threshold": 0.05, "floor": 0.1, "window": 2},
        {"group": "nearest", "survivor": "medoid", "threshold": 0.3, "floor": 0.1},
        {"group": "nearest", "measure": "cosine", "weight": "size", "survivor": "alone"},
        {"group": "bipartite", "on": "keys", "measure": "cosine", "threshold": 0.3, "floor": 0.1},
        {
            "group": "leader",
            "measure": "cosine",
            "threshold": 0.2,
            "survivor": "mean",
            "floor": 0.1,
        },
        {
            "group": "components",
            "measure": "cosine",
            "threshold": 0.4,
            "survivor": "first",
            "floor": 0.1,
        },
        {"group": "average", "on": "values", "measure": "cosine", "floor": 0.0},
        {"group": "average", "on": "keys", "weight": "size", "threshold": 0.6, "floor": 0.0},
        {"group": "density", "weight": "received"},
        {"group": "medoids", "survivor": "heaviest"},
        {"group": "iterative", "measure": "cosine"},
        {"preset": "paper"},
        {"preset": "paper", "on": "keys", "threshold": 0.1, "floor": 0.5},
    ),
    "gtp": ({"neighbours": 4, "alpha": 1.0},),
    "ppt": ({"threshold": 0.0015}, {"threshold": 1.0}),
    "saint": ({"threshold": 0.0},),
    "tome": ({"threshold": 0.3},),
    "ats": ({"floor": 1},),
    "duplicates": ({"tolerance": 0.5}, {"window": 2}),
}


BY_DEFAULT = 4  # variants of a method in the default suite


def shipped_methods():
    """Lists every method on disk: with its defaults, with each switch turned, and its variants."""
    for name in patchslim.method_names():
        kind = patchslim.find_method(name)
        plain = kind().eval()
        yield pytest.param(plain, id=name)
        for setting, value in method_settings(plain).items():
            if isinstance(value, bool):
                turned = kind(**{setting: not value}).eval()
                yield pytest.param(turned, id=f"{name}-{setting}={not value}")
        for number, settings in enumerate(METHOD_VARIANTS.get(name, ())):
            settings_text = ",".join(f"{key}={value}" for key, value in settings.items())
            marks = [pytest.mark.slow] * (number >= BY_DEFAULT)
            yield pytest.param(kind(**settings).eval(), id=f"{name}-{settings_text}", marks=marks)
    yield pytest.param(patchslim.find_method("topk+tome")().eval(), id="topk+tome")


def all_toys():
    """Lists all toys that remove rows in evaluation mode."""
    for kind in (
        KeepLongestBefore,
        KeepLongest,
        KeepLongestOnQueries,
        KeepAttendedOnQueries,
        MergeShortestBefore,
        MergeShortest,
        MergeShortestOnQueries,
        MergeShortestOnMap,
        MixAll,
        MixAllOnQueries,
        Predictor,
        KeepAboveMean,
    ):
        yield pytest.param(kind().eval(), id=kind.__name__)
