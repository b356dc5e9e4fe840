"""Hugging Face's image towers beside a text tower: `CLIP` and its kin, `SigLIP` and `AIMv2`.

The vision model, by itself or as it stands in `CLIPModel`, `SiglipModel` or `Aimv2Model`; CLIP's
with its projection; and image classifiers. OWL-ViT, KOSMOS-2, GIT and BLIP have kin of CLIP's
tower. SigLIP and AIMv2 have no class token: a query of the head pools the patches, and a merged row
weighs as many as it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._macs import linear_macs
from patchslim.hosts._pooling import log_sizes, mean_of_patches
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.attention import attention
from patchslim.tokens.tokens import Tokens


def _clip(
    *classes: str,
    inner: str = "vision_model",
    first: str = "pre_layrnorm",
    mix: tuple[str, ...] = ("self_attn.out_proj",),
) -> Layout:
    """Says where CLIP and SigLIP keep their parts."""
    return Layout(
        classes=classes,
        inner=inner,
        layers="encoder.layers",
        patches="embeddings.patch_embedding",
        first=first,
        final="post_layernorm",
        attention="self_attn",
        norm="layer_norm1",
        mix=mix,
        feed=("layer_norm2", "mlp"),
        interpolates=True,
    )


def _blip(*classes: str) -> Layout:
    """Says where BLIP keeps its parts."""
    return Layout(
        classes=classes,
        layers="encoder.layers",
        patches="embeddings.patch_embedding",
        final="post_layernorm",
        attention="self_attn",
        fused="qkv",
        norm="layer_norm1",
        mix=("self_attn.projection",),
        feed=("layer_norm2", "mlp"),
        interpolates=True,
    )


def _aimv2() -> Layout:
    """Says where AIMv2 keeps its parts."""
    return Layout(
        classes=("Aimv2VisionModel",),
        layers="encoder.layers",
        patches="embeddings.patch_embed",
        final="rms_norm",
        norm="rms_norm1",
        mix=("attention.out_proj",),
        feed=("rms_norm2", "ffn"),
    )


class TransformersClip(TransformersHost):
    """Vision towers of CLIP, SigLIP (and SigLIP 2 at a fixed resolution) and AIMv2."""

    family: ClassVar[str] = "transformers CLIP / SigLIP / AIMv2"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "clip": _clip(
            "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"
        ),
        "metaclip_2": _clip(
            "MetaClip2VisionModel",
            "MetaClip2VisionModelWithProjection",
            "MetaClip2ForImageClassification",
        ),
        "altclip": _clip("AltCLIPVisionModel"),
        "chinese_clip": _clip("ChineseCLIPVisionModel"),
        "clipseg": _clip("CLIPSegVisionModel"),
        "owlvit": _clip("OwlViTVisionModel", "OwlViTVisionTransformer", first="pre_layernorm"),
        "owlv2": _clip("Owlv2VisionModel", "Owlv2VisionTransformer", first="pre_layernorm"),
        "kosmos2": _clip("Kosmos2VisionModel", "Kosmos2VisionTransformer", inner="model"),
        "git": _clip("GitVisionModel"),
        "blip": _blip("BlipVisionModel"),
        "blip_2": _blip("Blip2VisionModel"),
        "instructblip": _blip("InstructBlipVisionModel"),
        "instructblipvideo": _blip("InstructBlipVideoVisionModel"),
        "siglip": _clip("SiglipVisionModel", "SiglipForImageClassification", first=""),
        "siglip2": _clip(first=""),
        "janus": _clip(
            "JanusVisionModel",
            inner="",
            first="",
            mix=("self_attn.projection_layer", "self_attn.projection_dropout"),
        ),
        "aimv2": _aimv2(),
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses other tasks, and SigLIP 2 with patches of several resolutions in a batch."""
        if self._kind(host) == "siglip2":
            return (
                f"{type(host).__name__} takes patches of images of several sizes, with a mask "
                "(NaFlex), not images. SigLIP 2 at a fixed resolution is a SiglipModel or "
                "SiglipVisionModel, which is served."
            )
        if getattr(getattr(host, "config", None), "use_qk_norm", False):  # which JANUS cannot run
            return "with use_qk_norm=True it norms queries and keys in a way that is not served."
        return super().unsupported_reason(host)

    def prefix(self, host: Any) -> int:
        """Counts CLIP's class token; the others have none."""
        return 1 if self._is_clip(host) else 0

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned or averaged."""
        return None

    def takes_any_size(self, host: Any) -> bool:
        """Tells whether its positions are computed for the size of the images."""
        return bool(getattr(self.base(host).config, "is_native", False))

    def returns_rows(self, host: Any) -> bool:
        """Tells whether it returns its last hidden state, also beside a projection."""
        return not type(host).__name__.endswith("ForImageClassification")

    def has_query_pooling(self, host: Any) -> bool:
        """Tells whether a query of the head pools the patches."""
        return self._pooling(host) is not None

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm. CLIP returns its rows without: it norms what it pools."""
        returns_bare = bool(self.layout(host).first) and self._kind(host) != "git"
        return x if returns_bare else super().norm(host, x)

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the bare model, or of the model with its projection."""
        if self._kind(host) == "git":
            rows = self.norm(host, tokens.dense_features())
            return output_class(host, "BaseModelOutput")(last_hidden_state=rows)
        output = super().features(host, tokens)
        if not hasattr(host, "visual_projection"):
            return output
        name = type(host).__name__.replace("ModelWithProjection", "ModelOutput")
        return output_class(host, name)(
            image_embeds=host.visual_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
        )

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Norms the first row of CLIP and its kin; pools by a query where there is one."""
        if self._is_clip(host) or self._kind(host) == "janus":
            normed: Tensor = super().norm(host, rows[:, 0])
            return normed
        return None if self._pooling(host) is None else self._pool_by_query(host, tokens)

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Averages the patches. The host pools by its query, too, and does not read that."""
        x = self.norm(host, tokens.x)
        if self._pooling(host) is not None:
            self._pool_by_query(host, tokens)  # so that as much is spent as the host spends
        return mean_of_patches(tokens, x)

    def readout(self, host: Any, tokens: Tokens) -> Tensor:
        """Computes the pooling query's attention over patches; its two weights become one."""
        query, key, heads = self._query_and_key(host)
        folded = torch.einsum("hd,hdc->hc", query.unflatten(0, (heads, -1)), key)
        folded = folded * key.shape[1] ** -0.5
        logits = self.norm(host, tokens.x[:, tokens.prefix :]) @ folded.T
        if tokens.alive is not None:
            logits = logits.masked_fill(tokens.alive.unsqueeze(2) == 0, -torch.inf)
        return logits.softmax(dim=1).mean(dim=2)

    def head_macs(self, host: Any) -> tuple[int, int]:
        """Counts the multiply-adds of projection, classifier and pooling."""
        final = sum(
            linear_macs(getattr(host, name, None)) for name in ("visual_projection", "classifier")
        )
        pooling = self._pooling(host)
        if pooling is None:
            return final, 0
        width = int(self.base(host).config.hidden_size)
        keys_and_values = 2 * width * width
        if hasattr(pooling, "probe"):
            return final + keys_and_values + linear_macs(pooling.mlp), keys_and_values + 2 * width
        return final + linear_macs(pooling.output_proj), keys_and_values + 2 * width

    def score_macs(self, host: Any, inner: int) -> dict[str, int]:
        """Counts the multiply-adds of scoring by the class token or the folded pooling query."""
        pooling = self._pooling(host)
        if pooling is None:
            return {"score": inner}
        _, key, heads = self._query_and_key(host)
        projected = inner * inner if hasattr(pooling, "probe") else 0
        return {"score": heads * inner, "score_once": projected + key.numel()}

    def _is_clip(self, host: Any) -> bool:
        """Tells whether it has CLIP's class token."""
        return self._kind(host) not in ("siglip", "aimv2", "janus")

    def _pooling(self, host: Any) -> Any:
        """Finds the head that pools by a query; None where there is none."""
        return getattr(self.base(host), "head", None)

    def _pool_by_query(self, host: Any, tokens: Tokens) -> Tensor:
        """Pools the rows that are left by the head's query."""
        pooling, x = self._pooling(host), self.norm(host, tokens.x)
        bias = log_sizes(tokens, x.dtype)
        pooled: Tensor
        if bias is None:
            pooled = pooling(x)
        elif hasattr(pooling, "probe"):
            probe = pooling.probe.repeat(x.shape[0], 1, 1)
            mask = bias.repeat_interleave(pooling.attention.num_heads, dim=0).unsqueeze(1)
            pooled = pooling.attention(probe, x, x, attn_mask=mask)[0]
            pooled = (pooled + pooling.mlp(pooling.layernorm(pooled)))[:, 0]
        else:
            query, key, value = (
                each.unflatten(2, (pooling.num_heads, -1)).transpose(1, 2)
                for each in (pooling.cls_token, pooling.k_proj(x), pooling.v_proj(x))
            )
            query = query.expand(x.shape[0], -1, -1, -1)
            scale = query.shape[3] ** -0.5
            read = attention(query, key, value, scale=scale, bias=bias[:, None, None])
            pooled = pooling.output_proj(read.transpose(1, 2).flatten(2).mean(dim=1))
        return pooled

    def _query_and_key(self, host: Any) -> tuple[Tensor, Tensor, int]:
        """Finds the pooling query (C), the weight of its keys (heads, d, C), and the heads."""
        pooling = self._pooling(host)
        if hasattr(pooling, "probe"):
            of_query, of_key, _ = pooling.attention.in_proj_weight.chunk(3)
            bias = pooling.attention.in_proj_bias.chunk(3)[0]
            query = torch.nn.functional.linear(pooling.probe[0, 0], of_query, bias)
            heads = int(pooling.attention.num_heads)
        else:
            query, of_key = pooling.cls_token[0, 0], pooling.k_proj.weight
            heads = int(pooling.num_heads)
        return query, of_key.unflatten(0, (heads, -1)), heads
