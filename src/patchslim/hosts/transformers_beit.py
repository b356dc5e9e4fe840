"""Hugging Face's `BEiT` and `Data2VecVision`, whose attention adds a bias by relative position.

A token keeps the grid cell it comes from, so its bias to any other is looked up in the host's own
table, however many tokens are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._pooling import mean_of_patches
from patchslim.hosts._relative import pick_bias
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout, find_part
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens


class TransformersBeit(TransformersHost):
    """BEiT and Data2VecVision: a class token, relative positions, LayerScale."""

    family: ClassVar[str] = "transformers BEiT / Data2VecVision"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "beit": Layout(
            classes=("BeitModel", "BeitForImageClassification"),
            inner="beit",
            norm="layernorm_before",
            mix=("attention.o_proj", "dropout", "lambda_1", "drop_path"),
            feed=("layernorm_after", "mlp", "dropout", "lambda_2", "drop_path"),
            any_size=True,
        ),
        "data2vec": Layout(
            classes=("Data2VecVisionModel", "Data2VecVisionForImageClassification"),
            inner="data2vec_vision",
            layers="encoder.layer",
            attention="attention.attention",
            projections=("query", "key", "value"),
            norm="layernorm_before",
            mix=(
                "attention.output.dense",
                "attention.output.dropout",
                "lambda_1",
                "drop_path",
            ),
            feed=("layernorm_after", "intermediate", "output", "lambda_2", "drop_path"),
            any_size=True,
        ),
    }

    def prefix(self, host: Any) -> int:
        """Counts the class token."""
        return 1

    def rows_read(self, host: Any) -> int | None:
        """Says whether a classifier reads the class token, or the mean of the patches."""
        by_mean = self.base(host).config.use_mean_pooling
        return None if self.returns_rows(host) or by_mean else 1

    def has_relative_bias(self, host: Any) -> bool:
        """Tells whether any layer adds a bias by relative position."""
        return any(self._tables(host, index) for index in range(len(self.blocks(host))))

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Looks up the bias of these rows in what the host adds to all rows."""
        tables = self._tables(host, index)
        if not tables:
            return None
        whole: Tensor = tables[0](keys.grid)  # (1, heads, N, N)
        for table in tables[1:]:
            whole = whole + table(keys.grid)
        return pick_bias(whole, queries, keys)

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of a bare model, in the class of its own."""
        output = super().features(host, tokens)
        own = type(host).__name__.replace("Model", "ModelOutputWithPooling")
        return output_class(host, own)(**output)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Takes the class token, or the mean of the patches and its norm, as the pooler does."""
        pooler = self.base(host).pooler
        if pooler is None:
            return None
        if pooler.layernorm is None:
            return rows[:, 0]
        pooled: Tensor = pooler.layernorm(mean_of_patches(tokens, tokens.x))
        return pooled

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Takes what the bare model pools."""
        pooled = self.pool(host, tokens, self.norm(host, tokens.x))
        assert pooled is not None  # noqa: S101 (a classifier is built with a pooler)
        return pooled

    def _tables(self, host: Any, index: int) -> list[Any]:
        """Finds the modules that compute what one layer adds: its own, and that of all layers."""
        base, layer = self.base(host), self.blocks(host)[index]
        if self._kind(host) == "beit":
            found = [base.shared_position_bias, layer.relative_position_bias]
        else:
            of_all = [getattr(base.encoder, "relative_position_bias", None)]
            attention = find_part(layer, "attention.attention")
            found = [*of_all, getattr(attention, "relative_position_bias", None)]
        return [each for each in found if each is not None]
