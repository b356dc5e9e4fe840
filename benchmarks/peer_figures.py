"""What the authors' own code reached on DeiT-Ti, nothing trained: 1,000 images, one of each class.

Measured by us with the code as it was released, not quoted. Knows no models, so that tables are
made without torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

STAGES = (3, 6, 9)
BLOCKS, LATER = range(12), range(1, 12)


class Peer(NamedTuple):
    """One setting, and what the authors' code reached with it.

    Attributes:
        name: how tables call it.
        settings: what `slim` is asked for.
        gmacs, kl, agree, top1: the official code's, on 1,000 images.
    """

    name: str
    settings: dict[str, Any]
    gmacs: float
    kl: float
    agree: float
    top1: float


# The first ones say most: a run may be stopped.
PEERS = (
    Peer("mctf r=9", {"r": 9, "at": LATER}, 0.930, 0.0134, 96.3, 78.5),
    Peer("mctf r=15", {"r": 15, "at": LATER}, 0.729, 0.0396, 94.2, 77.9),
    Peer("diffrate 0.9", {"preset": "0.9"}, 0.902, 0.0118, 96.1, 78.9),
    Peer("diffrate 0.6", {"preset": "0.6"}, 0.655, 0.0702, 91.3, 77.1),
    Peer("atc 0.7", {"keep_rate": 0.7, "at": STAGES}, 0.808, 0.0270, 95.2, 78.8),
    Peer("pitome 0.95", {"keep_rate": 0.95, "at": BLOCKS}, 0.930, 0.0403, 93.0, 78.6),
    Peer("pitome 0.905", {"keep_rate": 0.905, "at": BLOCKS}, 0.725, 0.1210, 89.0, 75.8),
    Peer("atc 0.5", {"keep_rate": 0.5, "at": STAGES}, 0.621, 0.1206, 88.8, 76.5),
    Peer("mctf r=5", {"r": 5, "at": LATER}, 1.070, 0.0053, 97.6, 79.1),
    Peer("mctf r=19", {"r": 19, "at": LATER}, 0.614, 0.1104, 89.0, 76.8),
    Peer("mctf fast 0.8", {"keep_rate": 0.8, "at": STAGES}, 0.921, 0.0103, 96.8, 79.0),
    Peer("mctf fast 0.6", {"keep_rate": 0.6, "at": STAGES}, 0.690, 0.0662, 91.6, 79.0),
    Peer("pitome 0.975", {"keep_rate": 0.975, "at": BLOCKS}, 1.087, 0.0137, 96.2, 79.7),
    Peer("pitome 0.88", {"keep_rate": 0.88, "at": BLOCKS}, 0.632, 0.1961, 84.9, 73.3),
    Peer("diffrate 0.8", {"preset": "0.8"}, 0.809, 0.0221, 94.6, 78.9),
    Peer("diffrate 0.7", {"preset": "0.7"}, 0.726, 0.0412, 92.1, 77.9),
    Peer("atc 0.9", {"keep_rate": 0.9, "at": STAGES}, 1.075, 0.0028, 98.2, 79.3),
    Peer("dpcknn 0.7", {"keep_rate": 0.7, "at": STAGES}, 0.775, 0.1626, 86.9, 75.1),
    Peer("dpcknn 0.9", {"keep_rate": 0.9, "at": STAGES}, 1.060, 0.0302, 93.9, 79.5),
    Peer("dpcknn 0.5", {"keep_rate": 0.5, "at": STAGES}, 0.581, 0.5649, 72.6, 65.1),
    Peer("gtp r=8", {"r": 8, "alpha": 0.1, "neighbours": 8}, 0.924, 0.0465, 92.4, 77.7),
    Peer("gtp r=13", {"r": 13, "alpha": 0.3, "neighbours": 8}, 0.731, 0.1168, 87.3, 75.5),
    Peer("tofu r=8", {"r": 8}, 0.924, 0.0641, 91.9, 77.9),
    Peer("tofu r=13", {"r": 13}, 0.731, 0.1977, 86.5, 73.8),
    Peer("kmedoids 0.7", {"keep_rate": 0.7, "at": STAGES}, 0.775, 0.1795, 85.0, 74.1),
    Peer("kmedoids 0.9", {"keep_rate": 0.9, "at": STAGES}, 1.060, 0.0279, 95.0, 79.5),
    Peer("kmedoids 0.5", {"keep_rate": 0.5, "at": STAGES}, 0.581, 0.6885, 66.6, 60.4),
    Peer("dct r=8", {"r": 8, "at": LATER}, 0.953, 0.2097, 82.4, 73.3),
    Peer("dct r=12", {"r": 12, "at": LATER}, 0.811, 0.3054, 79.9, 71.9),
)
