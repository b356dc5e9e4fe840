"""Small Hugging Face towers of the newer families, with strongly random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.kosmos2 import modeling_kosmos2
from transformers.models.vjepa2 import modeling_vjepa2

from hf_hosts import DINO_CONFIG, OBLONG_CONFIG, SMALL_CONFIG
from timm_variants import randomise

WIDE = {"intermediate_size": 48}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
PROJECTED = {**WIDE, "projection_dim": 12}
ROTARY = {**WIDE, "image_size": (16, 20), "layerscale_value": 0.1, "num_register_tokens": 2}
BEIT = {**WIDE, "layer_scale_init_value": 0.1, "out_indices": [0, 1, 2, 3]}
DATA2VEC = {**WIDE, "layer_scale_init_value": 0.1}
RELATIVE = {"image_size": (16, 20), "use_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True, "use_mean_pooling": False}
TIPS = {**DINO_CONFIG, "num_register_tokens": 2}
MASK_TOKEN = ("embeddings.mask_token",)
YOLOS = {**WIDE, "image_size": (16, 20), "num_detection_tokens": 3}
AST = {**WIDE, "max_length": 20, "num_mel_bins": 12, "frequency_stride": 3, "time_stride": 3}
VIDEO = {**WIDE, "num_frames": 4, "tubelet_size": 2}
VIVIT = {**WIDE, "num_frames": 4, "tubelet_size": [2, 4, 4], "image_size": (8, 12)}
VJEPA = {"mlp_ratio": 2, "frames_per_clip": 4, "crop_size": 16}
PIXIO = {"mlp_ratio": 2, "n_cls_tokens": 3}
INTERNVL = {
    **WIDE,
    "use_qk_norm": True,
    "layer_scale_init_value": 0.1,
    "hidden_dropout_prob": 0.1,
    "projection_dropout": 0.1,
    "use_absolute_position_embeddings": True,
}


@dataclass(frozen=True, eq=False)
class Tower:
    """One kind of host: its class, its configuration beside `SMALL_CONFIG`, and arguments.

    Attributes:
        label: the class, and after a space what is special.
        settings: entries of the configuration; of its vision part, where it has parts.
        arguments: arguments of the class.
        attention: "sdpa" or "eager".
        dtype: the type of its weights.
        slow: whether the laws run on it in the slow suite alone.
        unread: where names of parameters begin that the class itself never reads; they are frozen.
    """

    label: str
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    slow: bool = True
    unread: tuple[str, ...] = ()

    def host_class(self) -> Any:
        """Finds the class of the host."""
        name = self.label.partition(" ")[0]
        places = (transformers, modeling_kosmos2, modeling_vjepa2, modeling_idefics2)
        return next(getattr(place, name) for place in places if hasattr(place, name))

    def config(self) -> Any:
        """Makes the configuration of the class."""
        # The encoder of V-JEPA 2 is no model of its own to transformers.
        cls = getattr(self.host_class(), "config_class", transformers.VJEPA2Config)
        given = {**SMALL_CONFIG, **self.settings, "attn_implementation": self.attention}
        if "vision_config" not in getattr(cls, "sub_configs", {}):
            return cls(**given)
        config = cls(vision_config=given, text_config=TEXT, num_labels=7)
        config._attn_implementation = self.attention
        return config

    def build(self) -> Any:
        """Builds the host, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            host = self.host_class()(self.config(), **self.arguments)
        randomise(host)
        for name, parameter in host.named_parameters():
            if self.unread and name.startswith(self.unread):
                parameter.requires_grad_(False)
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return f"{self.label} ({self.attention})"


CLIP_TOWERS = (
    Tower("CLIPVisionModel", WIDE, slow=False),
    Tower("CLIPVisionModelWithProjection", PROJECTED),
    Tower("CLIPForImageClassification", WIDE, unread=("vision_model.post_layernorm",)),
    Tower(
        "CLIPVisionModel eager, quick GELU", {**WIDE, "hidden_act": "quick_gelu"}, attention="eager"
    ),
    Tower("CLIPVisionModel dropout", {**WIDE, "attention_dropout": 0.1}),
    Tower("CLIPVisionModelWithProjection half", PROJECTED, dtype=torch.float16),
    Tower("MetaClip2VisionModelWithProjection", PROJECTED),
    Tower("MetaClip2ForImageClassification", WIDE, unread=("vision_model.post_layernorm",)),
    Tower("AltCLIPVisionModel", WIDE),
    Tower("ChineseCLIPVisionModel", WIDE, attention="eager"),
    Tower("CLIPSegVisionModel", WIDE),
    Tower("OwlViTVisionModel", WIDE),
    Tower("Owlv2VisionModel", WIDE, attention="eager"),
    Tower("Kosmos2VisionModel", WIDE),
    Tower("GitVisionModel", WIDE, attention="eager"),
    Tower("BlipVisionModel", WIDE, attention="eager", slow=False),
    Tower("Blip2VisionModel", WIDE, slow=False),
    Tower("InstructBlipVisionModel no biases", {**WIDE, "qkv_bias": False}),
    Tower("InstructBlipVideoVisionModel", {**WIDE, "attention_dropout": 0.1}, attention="eager"),
    Tower("SiglipVisionModel", WIDE, slow=False),
    Tower("SiglipVisionModel eager", WIDE, attention="eager"),
    Tower("SiglipVisionModel without head", {**WIDE, "vision_use_head": False}),
    Tower("SiglipForImageClassification", WIDE, unread=("vision_model.head",)),
    Tower("SiglipForImageClassification without head", {**WIDE, "vision_use_head": False}),
    Tower("SiglipVisionModel double", WIDE, dtype=torch.float64),
    Tower("Aimv2VisionModel", WIDE, slow=False),
    Tower("Aimv2VisionModel native, eager", {**WIDE, "is_native": True}, attention="eager"),
    Tower(
        "Aimv2VisionModel biases, without head",
        {**WIDE, "use_head": False, "qkv_bias": True, "mlp_bias": True},
    ),
)
DINOV3_TOWERS = (
    Tower("DINOv3ViTModel", ROTARY, slow=False),
    Tower(
        "DINOv3ViTModel gated, all biases",
        {**ROTARY, "use_gated_mlp": True, "key_bias": True},
        slow=False,
    ),
    Tower(
        "DINOv3ViTModel eager, drop path",
        {**ROTARY, "drop_path_rate": 0.1, "num_register_tokens": 0},
        attention="eager",
    ),
    Tower("DINOv3ViTModel bfloat16", ROTARY, dtype=torch.bfloat16),
    Tower(
        "DINOv3ViTModel augmented positions",
        {**ROTARY, "pos_embed_shift": 0.1, "pos_embed_jitter": 1.1, "pos_embed_rescale": 2.0},
    ),
    Tower("DINOv3ViTBackbone", ROTARY, slow=False),
    Tower(
        "DINOv3ViTBackbone rows, class token",
        {**ROTARY, "reshape_hidden_states": False, "return_class_token": True},
    ),
)
BEIT_TOWERS = (
    Tower("BeitModel", {**BEIT, **RELATIVE}, slow=False),
    Tower(
        "BeitModel shared, mask token",
        {**BEIT, **ABSOLUTE, "use_shared_relative_position_bias": True, "use_mask_token": True},
    ),
    Tower("BeitModel absolute, without pooler", {**BEIT, **ABSOLUTE}, {"add_pooling_layer": False}),
    Tower(
        "BeitForImageClassification",
        {**BEIT, **RELATIVE, "drop_path_rate": 0.1, "hidden_dropout_prob": 0.1},
        slow=False,
    ),
    Tower(
        "BeitForImageClassification class token, both biases, eager",
        {
            **BEIT,
            **RELATIVE,
            **ABSOLUTE,
            "image_size": 16,
            "use_shared_relative_position_bias": True,
            "layer_scale_init_value": 0.0,
        },
        attention="eager",
    ),
    Tower("Data2VecVisionModel", {**DATA2VEC, **RELATIVE}, {"add_pooling_layer": True}, slow=False),
    Tower(
        "Data2VecVisionModel shared, without pooler",
        {**DATA2VEC, **ABSOLUTE, "use_shared_relative_position_bias": True},
    ),
    Tower(
        "Data2VecVisionForImageClassification eager",
        {**DATA2VEC, **RELATIVE, "layer_scale_init_value": 0.0, "drop_path_rate": 0.1},
        attention="eager",
    ),
    Tower(
        "Data2VecVisionForImageClassification class token",
        {**DATA2VEC, **ABSOLUTE, "attention_probs_dropout_prob": 0.1},
    ),
)
# More kinds of the family `transformers_vit`, whose other variants are in hf_hosts.py.
VIT_TOWERS = (
    Tower("ViTMSNModel", OBLONG_CONFIG),
    Tower("ViTMSNForImageClassification", OBLONG_CONFIG, attention="eager"),
    Tower("IJepaModel", OBLONG_CONFIG, {"add_pooling_layer": True}),
    Tower("IJepaModel without pooler", OBLONG_CONFIG),
    Tower("IJepaForImageClassification", OBLONG_CONFIG, attention="eager"),
    Tower("Dinov2Backbone", DINO_CONFIG),
    Tower(
        "Dinov2Backbone rows, without norm",
        {**DINO_CONFIG, "reshape_hidden_states": False, "apply_layernorm": False},
        unread=("layernorm",),
    ),
    Tower("Dinov2WithRegistersBackbone", {**DINO_CONFIG, "num_register_tokens": 3}),
    Tower("Tipsv2VisionModel", TIPS, unread=MASK_TOKEN),
    Tower("Tipsv2VisionBackbone swiglu", {**TIPS, "use_swiglu_ffn": True}, unread=MASK_TOKEN),
    Tower("PixioModel", PIXIO, slow=False),
    Tower("PixioBackbone", {**PIXIO, "drop_path_rate": 0.1}, unread=("pixio.layernorm",)),
    Tower("InternVLVisionModel", INTERNVL, slow=False),
    Tower(
        "InternVLVisionModel mean, RMS, no query norms",
        {**INTERNVL, "use_mean_pooling": True, "norm_type": "rms_norm", "use_qk_norm": False},
        attention="eager",
    ),
    Tower("VitPoseBackbone", {"mlp_ratio": 2, "image_size": (32, 40), "patch_size": 8}, slow=False),
)
YOLOS_TOWERS = (
    Tower("YolosModel", YOLOS, slow=False),
    Tower(
        "YolosModel without positions between layers and pooler, eager",
        {**YOLOS, "use_mid_position_embeddings": False},
        {"add_pooling_layer": False},
        attention="eager",
        slow=False,
    ),
    Tower("YolosForObjectDetection", YOLOS, unread=("bbox_predictor",), slow=False),
)
AST_TOWERS = (
    Tower("ASTModel", AST, slow=False),
    Tower("ASTModel eager", AST, attention="eager", slow=False),
    Tower("ASTForAudioClassification", {**AST, "hidden_dropout_prob": 0.1}, slow=False),
)
VIDEO_TOWERS = (
    Tower("VideoMAEModel", VIDEO, slow=False),
    Tower("VideoMAEModel norm, eager", {**VIDEO, "use_mean_pooling": False}, attention="eager"),
    Tower("VideoMAEForVideoClassification", VIDEO, slow=False),
    Tower("VivitModel", VIVIT),
    Tower("VivitModel without pooler", VIVIT, {"add_pooling_layer": False}),
    Tower("VivitForVideoClassification", VIVIT),
    Tower("VJEPA2Encoder", VJEPA, slow=False),
    Tower("VJEPA2Encoder drop path, eager", {**VJEPA, "drop_path_rate": 0.1}, attention="eager"),
)
SMOLVLM_TOWERS = (
    Tower("SmolVLMVisionTransformer", WIDE, slow=False),
    Tower("Idefics3VisionTransformer", {**WIDE, "attention_dropout": 0.1}, slow=False),
    Tower("Idefics2VisionTransformer eager", WIDE, attention="eager", slow=False),
)
MLCD_TOWERS = (
    Tower("MLCDVisionModel", WIDE, slow=False),
    Tower(
        "MLCDVisionModel eager, quick GELU",
        {**WIDE, "hidden_act": "quick_gelu"},
        attention="eager",
        slow=False,
    ),
    Tower("MLCDVisionModel dropout", {**WIDE, "attention_dropout": 0.1}),
    Tower("MLCDVisionModel wide heads", {**WIDE, "num_attention_heads": 2}, slow=False),
    Tower("MLCDVisionModel bfloat16", WIDE, dtype=torch.bfloat16),
)
PIXTRAL_TOWERS = (
    Tower("PixtralVisionModel", WIDE, slow=False),
    Tower("PixtralVisionModel eager", WIDE, attention="eager", slow=False),
    Tower("PixtralVisionModel wide heads", {**WIDE, "num_attention_heads": 2}, slow=False),
)
EVERY_TOWER = (
    *CLIP_TOWERS,
    *DINOV3_TOWERS,
    *BEIT_TOWERS,
    *VIT_TOWERS,
    *YOLOS_TOWERS,
    *AST_TOWERS,
    *VIDEO_TOWERS,
    *SMOLVLM_TOWERS,
    *MLCD_TOWERS,
    *PIXTRAL_TOWERS,
)


def tiny_tower(label: str, **settings: Any) -> Any:
    """Makes the tower of this label, with these additions to its configuration."""
    (tower,) = (each for each in EVERY_TOWER if each.label == label)
    return Tower(label, {**tower.settings, **settings}, tower.arguments, tower.attention).build()
