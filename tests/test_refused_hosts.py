"""Hosts that cannot be slimmed exactly are refused, with a reason: foreign parts and families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import patchslim
from patchslim.errors import UnsupportedModel
from timm_variants import HOSTS, Variant, tiny_vit


def strange_block(host: Any) -> None:
    from timm.models.vision_transformer import Block

    host.blocks[1].__class__ = type("Block", (Block,), {"__module__": "elsewhere"})


def strange_attention(host: Any) -> None:
    from timm.layers.attention import Attention

    host.blocks[1].attn.__class__ = type("Attention", (Attention,), {"__module__": "elsewhere"})


def row_mixing(host: Any) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(dim=1, keepdim=True)

    host.blocks[-1].mlp = Mixing()


def hidden_part(host: Any) -> None:
    """Changes the forward pass in a way that shows in no class."""
    plain = host.blocks[1].forward
    host.blocks[1].forward = lambda x: plain(x) * 1.01


@pytest.mark.parametrize("change", [strange_block, strange_attention, hidden_part])
def test_unknown_parts_are_refused(vit: Any, change: Callable[[Any], None]) -> None:
    change(vit)
    with pytest.raises(UnsupportedModel):
        patchslim.slim(vit, "tome", r=2)


def test_exact_tail_is_refused_where_rows_mix(vit: Any) -> None:
    row_mixing(vit)
    patchslim.slim(vit, "random", keep=0.5, tail="full")
    with pytest.raises(UnsupportedModel, match="differs from the model"):
        patchslim.slim(vit, "random", keep=0.5, tail="exact")


@pytest.mark.parametrize("host", HOSTS)
def test_patch_dropout_is_refused(host: type[nn.Module]) -> None:
    variant = Variant("dropping", host, {"patch_drop_rate": 0.2})
    with pytest.raises(UnsupportedModel, match="patch_drop_rate=0"):
        patchslim.slim(variant.build(), "tome", r=2)


@pytest.mark.parametrize("name", ["forward", "forward_features", "forward_head", "pool"])
@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]])
def test_overridden_forward_is_refused(host: type[nn.Module], name: str) -> None:
    inner = getattr(host, name)

    def mine(self: Any, *args: Any) -> Any:
        return inner(self, *args)

    own = type("Own", (host,), {name: mine})
    with pytest.raises(UnsupportedModel, match=f"overrides {name}"):
        patchslim.slim(Variant("own", own, {}).build(), "tome", r=2)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 1, 1)},
            "Swin attends in windows.*Hiera",
        ),
        ("swinv2_cr_tiny_224", {"depths": (1, 1, 1, 1)}, "attends in windows.*Hiera"),
        ("xcit_nano_12_p16_224", {"depth": 1}, "between channels"),
        ("pvt_v2_b0", {}, "pools keys"),
        ("crossvit_9_240", {}, "two sequences"),
        ("poolformer_s12", {}, "CAFormer"),
        ("maxvit_pico_rw_256", {"depths": (1, 1, 1, 1)}, "windows.*CoAtNet"),
        ("coatnet_nano_cc_224", {}, "convolutions between"),
        ("resnet18", {}, "no attention over tokens"),
        ("botnet26t_256", {}, "convolutional network"),
        ("convit_tiny", {"depth": 2, "local_up_to_layer": 1}, "map by position"),
    ],
)
def test_other_models_are_refused_with_the_reason_and_what_to_take(
    name: str, args: dict[str, Any], said: str
) -> None:
    with torch.device("meta"):
        host = timm.create_model(name, num_classes=3, **args)
    with pytest.raises(UnsupportedModel, match=said) as refused:
        patchslim.find_adapter(host)
    assert str(refused.value).count("Take ") == 1


def test_lost_weights_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="meta device"):
        patchslim.slim(tiny_vit().to("meta"), "tome", r=2)


def test_not_a_module_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.nn\.Module"):
        patchslim.slim("deit_tiny_patch16_224", "tome", r=2)  # type: ignore[arg-type]
