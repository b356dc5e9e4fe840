"""Hugging Face's `ViTMAE`, as an encoder that sees all patches: `mask_ratio=0.0`.

Also then the host returns its patches in an order that it draws anew in every call, beside
`ids_restore`, by which they are put back. A slimmed one returns them in the order of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.rows import take
from patchslim.tokens.tokens import Tokens


class TransformersMae(TransformersHost):
    """The encoder of ViTMAE, alone or in `ViTMAEForPreTraining`."""

    family: ClassVar[str] = "transformers ViTMAE"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "vit_mae": Layout(
            classes=("ViTMAEModel",),
            norm="layernorm_before",
            mix=("attention.o_proj", "dropout"),
            feed=("layernorm_after", "mlp", "dropout"),
            interpolates=True,
        )
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses random masking, and what every tower refuses."""
        share = getattr(getattr(host, "config", None), "mask_ratio", 0)  # a part may have none
        if share > 0:
            return (
                f"with mask_ratio={share:g} it drops patches at random in every call. Set "
                "model.config.mask_ratio = 0.0, so that it encodes all of them; or load its "
                "encoder as a ViT, ViTModel.from_pretrained(...), which reads the same weights."
            )
        return super().unsupported_reason(host)

    def prefix(self, host: Any) -> int:
        """Counts the class token."""
        return 1

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def gives_states(self, host: Any) -> bool:
        """Says no: the host gives them in an order that it draws."""
        return False

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, with noise that leaves patches in their order."""
        images = images.to(self._patches(host).weight.dtype)
        grid = self._grid(host, images.shape[-2:])
        in_order = torch.arange(grid[0] * grid[1], device=images.device).expand(images.shape[0], -1)
        extra = {key: options[key] for key in ("interpolate_pos_encoding",) if options.get(key)}
        rows, _, _ = host.embeddings(images, noise=in_order, **extra)
        return Tokens(x=rows, prefix=1, grid=grid)

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the bare model, which says that no patch is masked or moved."""
        rows = self.norm(host, tokens.dense_features())
        mask = torch.zeros(rows.shape[0], rows.shape[1] - 1, device=rows.device)
        places = torch.arange(rows.shape[1] - 1, device=rows.device).expand(rows.shape[0], -1)
        made = output_class(host, "ViTMAEModelOutput")
        return made(last_hidden_state=rows, mask=mask, ids_restore=places)

    def logits(self, output: Any) -> Tensor:
        """Returns the features, with the patches put back in the order of the image."""
        names = (0, 2) if isinstance(output, tuple) else ("last_hidden_state", "ids_restore")
        rows, places = (torch.as_tensor(output[name]) for name in names)  # an artefact has arrays
        return torch.cat([rows[:, :1], take(rows, places, 1)], dim=1)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Says that nothing is pooled."""
        return None
