"""A small example: find and read one handwritten digit in a cluttered scene.

The handwritten digits in ``digits.npz`` are the 8x8 images scikit-learn ships as
``load_digits``, a part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, DOI 10.24432/C50P49, licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/).  Everything else in a scene is drawn here.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Split = Literal["train", "test"]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

SIDE = 96
PATCH = 8
CLASSES = 10
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
BUILT_FROM = "vit_tiny_patch16_224"
ARCHITECTURE: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "num_classes": CLASSES,
    "class_token": True,
    "global_pool": "token",
}

_TEST_PER_CLASS = 50
_CELLS = 10  # the 8 cells of a digit's side and an empty one at either end
_ENLARGED_SIDE = 80  # samples along the side of an enlarged digit, its empty border included
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


@dataclass(frozen=True)
class Scenes:
    """Cluttered scenes, each with one digit, the digit's label and where it is.

    ``images`` is uint8 (N, 96, 96, 3), ``labels`` int64 (N,), and ``boxes`` int64 (N, 4):
    left, top, right, bottom of the digit's ink in pixels, right and bottom exclusive.
    ``sources`` int64 (N,) says which of the handwritten digits each scene shows.
    """

    images: Bytes
    labels: Ints
    boxes: Ints
    sources: Ints

    def __len__(self) -> int:
        """Counts the scenes."""
        return len(self.labels)


def scenes(split: Split, count: int, seed: int = 0) -> Scenes:
    """Returns the first ``count`` scenes of a split's endless sequence for ``seed``.

    Scene ``i`` depends on ``(split, seed, i)`` alone, never on ``count``, and the digits of
    the two splits are different handwritten digits.
    """
    return scenes_at(split, range(count), seed)


def scenes_at(split: Split, indices: range, seed: int = 0) -> Scenes:
    """Returns the scenes at the given indices of a split's sequence."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if len(indices) and min(indices) < 0:
        raise ValueError("scene indices start at 0")
    images = np.empty((len(indices), SIDE, SIDE, 3), np.uint8)
    boxes = np.empty((len(indices), 4), np.int64)
    sources = np.empty(len(indices), np.int64)
    for row, index in enumerate(indices):
        rng = np.random.default_rng((seed, int(split == "test"), index))
        images[row], boxes[row], sources[row] = _draw_scene(rng, split)
    return Scenes(images, _load_digits()[1][sources], boxes, sources)


def handwritten_digits() -> tuple[Bytes, Ints]:
    """Returns the 1797 handwritten digits, uint8 0..16 (1797, 8, 8), and their labels."""
    images, labels = _load_digits()
    return images.copy(), labels.copy()


def digit_indices(split: Split) -> Ints:
    """Returns which of the handwritten digits the scenes of a split are made from."""
    return np.sort(np.concatenate(_indices_by_class(split)))


def normalise(images: Bytes | torch.Tensor) -> torch.Tensor:
    """Returns uint8 (N, 96, 96, 3) images as the float NCHW tensor the host expects."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(1, 3, 1, 1)
    return ((pixels / 255.0 - mean) / std).contiguous()


def untrained_host(depth: int = ARCHITECTURE["depth"]) -> VisionTransformer:
    """Returns the example's vision transformer with random weights."""
    import timm

    # timm's own factory keeps the arguments, so that a saved model can be rebuilt from its recipe.
    model: VisionTransformer = timm.create_model(BUILT_FROM, **{**ARCHITECTURE, "depth": depth})
    model.pretrained_cfg = {
        "architecture": BUILT_FROM,
        "tag": "patchslim_digits",
        "input_size": (3, SIDE, SIDE),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": CLASSES,
    }
    return model


def host() -> VisionTransformer:
    """Returns the trained vision transformer of the example in evaluation mode."""
    from safetensors.torch import load

    stored = _read_resource("digits_vit.safetensors")
    if hashlib.sha256(stored).hexdigest() != host_record()["weights"]["sha256"]:
        raise ValueError("digits_vit.safetensors is not the file its record describes")
    model = untrained_host()
    weights = {name: tensor.to(torch.float32) for name, tensor in load(stored).items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def host_record() -> dict[str, Any]:
    """Returns the record of how the weights were trained."""
    record: dict[str, Any] = json.loads(_read_resource("digits_vit.json"))
    return record


def _read_resource(name: str) -> bytes:
    """Reads a file that lies beside this module."""
    return (files("patchslim.example") / name).read_bytes()


@cache
def _load_digits() -> tuple[Bytes, Ints]:
    """Loads the stored digits and labels, which all callers share."""
    with np.load(BytesIO(_read_resource("digits.npz")), allow_pickle=False) as stored:
        return stored["images"].astype(np.uint8), stored["labels"].astype(np.int64)


@cache
def _indices_by_class(split: Split) -> tuple[Ints, ...]:
    """Returns for every class the indices of the handwritten digits in a split."""
    labels = _load_digits()[1]
    rng = np.random.default_rng(1797)
    chosen = []
    for label in range(CLASSES):
        members = rng.permutation(np.flatnonzero(labels == label))
        test, train = members[:_TEST_PER_CLASS], members[_TEST_PER_CLASS:]
        chosen.append(test if split == "test" else train)
    return tuple(chosen)


@cache
def _enlarging_matrix() -> Floats:
    """Returns the (80, 10) matrix that enlarges a bordered digit along one axis."""
    centres = (np.arange(_ENLARGED_SIDE, dtype=np.float32) + 0.5) * _CELLS / _ENLARGED_SIDE - 0.5
    away = np.abs(centres[:, None] - np.arange(_CELLS, dtype=np.float32)[None, :])
    # Catmull-Rom: it keeps the strokes of an 8x8 digit crisper than linear interpolation.
    near = (1.5 * away - 2.5) * away * away + 1.0
    far = ((-0.5 * away + 2.5) * away - 4.0) * away + 2.0
    weights: Floats = np.where(away < 1.0, near, np.where(away < 2.0, far, 0.0)).astype(np.float32)
    return weights


@cache
def _texture_basis() -> Floats:
    """Returns the (96, 6) matrix that spreads a coarse random grid over the image."""
    pixels = np.linspace(0.0, 5.0, SIDE, dtype=np.float32)
    away = np.abs(pixels[:, None] - np.arange(6, dtype=np.float32)[None, :])
    basis: Floats = np.clip(1.0 - away, 0.0, 1.0).astype(np.float32)
    return basis


def _enlarge_digit(index: int) -> Floats:
    """Returns a handwritten digit enlarged to (80, 80), ink between 0 and 1."""
    bordered = np.zeros((_CELLS, _CELLS), np.float32)
    bordered[1:-1, 1:-1] = _load_digits()[0][index] / np.float32(16.0)
    enlarger = _enlarging_matrix()
    fine = enlarger @ bordered @ enlarger.T
    ink: Floats = np.clip((fine - np.float32(0.15)) / np.float32(0.6), 0.0, 1.0)
    return ink


def _draw_scene(rng: np.random.Generator, split: Split) -> tuple[Bytes, Ints, int]:
    """Returns one scene's image, its digit's box, and which handwritten digit it shows."""
    ground = rng.uniform(0.0, 0.65, 3).astype(np.float32)
    canvas = _background(rng, ground)
    size = float(rng.uniform(28.0, 44.0))
    centre = rng.uniform(0.56 * size, SIDE - 0.56 * size, 2)
    for _ in range(int(rng.integers(4, 10))):
        _draw_clutter(rng, canvas, ground, centre, size)
    members = _indices_by_class(split)[int(rng.integers(CLASSES))]
    source = int(members[rng.integers(len(members))])
    turn = float(rng.uniform(-0.22, 0.22))
    window, ink = _place_digit(
        _enlarge_digit(source), centre, size, turn, float(rng.uniform(0.9, 1.1))
    )
    _blend(canvas, window, ink * np.float32(rng.uniform(0.85, 1.0)), _ink_colour(rng, ground))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(0.01, 0.05))
    image = (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return image, _ink_box(window, ink), source


def _background(rng: np.random.Generator, ground: Floats) -> Floats:
    """Returns a (96, 96, 3) ground with a colour gradient and a soft texture."""
    angle = float(rng.uniform(0.0, 2.0 * math.pi))
    along = (_COLUMNS * math.cos(angle) + _ROWS * math.sin(angle)) / SIDE
    slope = rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    basis = _texture_basis()
    coarse = rng.uniform(-0.1, 0.1, (3, 6, 6)).astype(np.float32)
    texture = (basis @ coarse @ basis.T).transpose(1, 2, 0)
    canvas: Floats = ground + (along - along.mean())[:, :, None] * slope + texture
    return np.ascontiguousarray(canvas, np.float32)


def _draw_clutter(
    rng: np.random.Generator, canvas: Floats, ground: Floats, digit_centre: Any, size: float
) -> None:
    """Draws one stroke, arc, blob or digit fragment on the canvas."""
    centre = rng.uniform(0.0, SIDE, 2)
    kind = int(rng.integers(4))
    reach = float(rng.uniform(7.0, 14.0))
    # Even a person cannot read a digit among too much other ink, so most clutter stays away.
    if np.abs(centre - digit_centre).max() < 0.5 * size + 0.5 * reach:
        return
    colour = np.clip(ground + rng.uniform(-0.5, 0.5, 3), 0.0, 1.0).astype(np.float32)
    turn = float(rng.uniform(-math.pi, math.pi))
    width = float(rng.uniform(1.2, 3.6))
    if kind == 3:
        window, ink = _fragment(rng, centre, reach, turn)
    else:
        window = _window(centre, reach + 2.0)
        across, down = _offsets(window, centre)
        shape = (_stroke, _arc, _blob)[kind]
        ink = shape(across, down, reach, turn, width)
    _blend(canvas, window, ink, colour)


def _stroke(across: Floats, down: Floats, reach: float, turn: float, width: float) -> Floats:
    """Returns the ink of a straight stroke through the window's centre."""
    along = across * math.cos(turn) + down * math.sin(turn)
    aside = down * math.cos(turn) - across * math.sin(turn)
    beyond = np.maximum(np.abs(along) - reach, 0.0)
    return np.clip(0.5 * width + 0.5 - np.hypot(beyond, aside), 0.0, 1.0).astype(np.float32)


def _arc(across: Floats, down: Floats, reach: float, turn: float, width: float) -> Floats:
    """Returns the ink of an arc of a circle about the window's centre."""
    radius = np.hypot(across, down)
    # Less than half of the circle: a closed ring would be a readable zero.
    facing = across * math.cos(turn) + down * math.sin(turn) > 0.3 * radius
    ink = np.clip(0.5 * width + 0.5 - np.abs(radius - 0.8 * reach), 0.0, 1.0) * facing
    return ink.astype(np.float32)


def _blob(across: Floats, down: Floats, reach: float, turn: float, width: float) -> Floats:
    """Returns the ink of a soft ellipse."""
    along = across * math.cos(turn) + down * math.sin(turn)
    aside = down * math.cos(turn) - across * math.sin(turn)
    radius = np.hypot(along / reach, aside / (0.2 * reach * width))
    return np.clip((1.0 - radius) * 3.0, 0.0, 1.0).astype(np.float32)


def _fragment(
    rng: np.random.Generator, centre: Any, reach: float, turn: float
) -> tuple[tuple[slice, slice], Floats]:
    """Returns where a piece torn off a training digit lies, and its ink."""
    # Half of a one still reads as a one, so ones are never torn.
    label = int(rng.choice((0, 2, 3, 4, 5, 6, 7, 8, 9)))
    members = _indices_by_class("train")[label]
    digit = _enlarge_digit(int(members[rng.integers(len(members))]))
    offset = (np.arange(_ENLARGED_SIDE, dtype=np.float32) - 0.5 * _ENLARGED_SIDE) / _ENLARGED_SIDE
    angle = float(rng.uniform(-math.pi, math.pi))
    side = offset[None, :] * math.cos(angle) + offset[:, None] * math.sin(angle)
    return _place_digit(digit * (side > 0.08), centre, 2.2 * reach, turn, 1.0)


def _ink_colour(rng: np.random.Generator, ground: Floats) -> Floats:
    """Returns a colour for the digit, always lighter than the ground."""
    tint = rng.uniform(-0.2, 0.2, 3)
    colour = float(ground.mean()) + float(rng.uniform(0.4, 0.75)) + tint - tint.mean()
    visible: Floats = np.clip(colour, 0.0, 1.0).astype(np.float32)
    return visible


def _window(centre: Any, reach: float) -> tuple[slice, slice]:
    """Returns the rows and columns of the image within ``reach`` of a point."""
    left, top = (max(0, math.floor(float(middle) - reach)) for middle in centre)
    right, bottom = (min(SIDE, math.ceil(float(middle) + reach) + 1) for middle in centre)
    return slice(top, bottom), slice(left, right)


def _offsets(window: tuple[slice, slice], centre: Any) -> tuple[Floats, Floats]:
    """Returns how far right of and below a place each pixel of a window is."""
    return _COLUMNS[window] - np.float32(centre[0]), _ROWS[window] - np.float32(centre[1])


def _place_digit(
    digit: Floats, centre: Any, size: float, turn: float, stretch: float
) -> tuple[tuple[slice, slice], Floats]:
    """Returns where an enlarged digit lies after turning and scaling, and its ink there."""
    bordered = size * _CELLS / (_CELLS - 2)
    window = _window(centre, 0.66 * bordered)
    across, down = _offsets(window, centre)
    cosine, sine = math.cos(turn) / bordered, math.sin(turn) / bordered
    column = (across * cosine + down * sine) * stretch
    row = down * cosine - across * sine
    # The border of an enlarged digit is empty, so clamping to it draws nothing.
    column_index = np.clip((column + 0.5) * _ENLARGED_SIDE, 0, _ENLARGED_SIDE - 1).astype(np.intp)
    row_index = np.clip((row + 0.5) * _ENLARGED_SIDE, 0, _ENLARGED_SIDE - 1).astype(np.intp)
    return window, digit[row_index, column_index]


def _blend(canvas: Floats, window: tuple[slice, slice], ink: Floats, colour: Floats) -> None:
    """Lays ink of one colour over a window of the canvas."""
    canvas[window] += ink[:, :, None] * (colour - canvas[window])


def _ink_box(window: tuple[slice, slice], ink: Floats) -> Ints:
    """Returns left, top, right, bottom of the visible ink of a window."""
    visible = ink > 0.3
    rows = np.flatnonzero(visible.any(axis=1)) + window[0].start
    columns = np.flatnonzero(visible.any(axis=0)) + window[1].start
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.int64)
