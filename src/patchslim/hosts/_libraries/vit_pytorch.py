"""lucidrains' vit-pytorch: hosts that are built in Python alone, since it has no names for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.hosts._library import Library

if TYPE_CHECKING:
    from torch import nn


class VitPytorch(Library):
    """vit-pytorch."""

    name: ClassVar[str] = "vit_pytorch"
    distribution: ClassVar[str] = "vit-pytorch"
    oldest: ClassVar[tuple[int, ...]] = (1, 26)
    extra: ClassVar[str | None] = "vit_pytorch"
    hint: ClassVar[str] = "a folder that was saved in Python (vit-pytorch has no names)"

    def read_preprocessing(self, host: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
        """Returns nothing: vit-pytorch does not say how images are prepared."""
        return {}
