"""Models that contain an encoder: the error says which part to slim, and putting it back works.

The advice is taken as it stands in the error: it is run, and the library's own calls after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import patchslim
from hf_hosts import DINO_CONFIG, OBLONG_CONFIG, SMALL_CONFIG
from hf_towers import TEXT, WIDE, tiny_tower
from patchslim.errors import PatchslimError, UnsupportedModel, WrongInput
from patchslim.hosts._catalog import find_host
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.model.model import SlimModel
from patchslim.testing.adapter_laws import AdapterTrial
from timm_variants import randomise

VISION = {**SMALL_CONFIG, **WIDE}
OWN_TOWER = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 8}
TIMM_TOWER = {
    "timm_model_name": "test_vit",
    "timm_proj": "linear",
    "timm_pool": "avg",
    "image_size": 160,
}
WORDS = ("a", "photo", "of", "cat", "dog", "[start]", "[end]", "[pad]")


def clip() -> Any:
    """Makes a small CLIP."""
    text = {**TEXT, "eos_token_id": WORDS.index("[end]"), "pad_token_id": WORDS.index("[pad]")}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=12)
    return prepared(transformers.CLIPModel(config))


def siglip() -> Any:
    """Makes a small SigLIP."""
    config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
    return prepared(transformers.SiglipModel(config))


def aimv2() -> Any:
    """Makes a small AIMv2 with its text tower."""
    config = transformers.Aimv2Config(vision_config=VISION, text_config=TEXT, projection_dim=12)
    return prepared(transformers.Aimv2Model(config))


def open_clip_model(tower: dict[str, Any]) -> Any:
    """Makes a small model of open_clip's with this image tower."""
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    cls = open_clip.CustomTextCLIP if "timm_model_name" in tower else open_clip.CLIP
    return prepared(cls(embed_dim=12, vision_cfg=tower, text_cfg=text))


def prepared(host: nn.Module) -> nn.Module:
    """Gives a model weights that matter, in evaluation mode."""
    randomise(host)
    return host.eval()


def image_features(model: Any, x: Tensor) -> Tensor:
    """Calls transformers' own function for an image's embedding."""
    features: Tensor = model.get_image_features(x).pooler_output
    return features


def encode_image(model: Any, x: Tensor) -> Tensor:
    """Calls open_clip's own function for an image's embedding."""
    features: Tensor = model.encode_image(x, normalize=True)
    return features


TOWERS: tuple[tuple[str, Callable[[], Any], Callable[[Any, Tensor], Tensor], int], ...] = (
    ("vision_model", clip, image_features, 16),
    ("vision_model", siglip, image_features, 16),
    ("vision_model", aimv2, image_features, 16),
    ("visual", lambda: open_clip_model(OWN_TOWER), encode_image, 16),
    ("visual.trunk", lambda: open_clip_model(TIMM_TOWER), encode_image, 160),
)


def take_advice(model: Any, method: str, **budget: Any) -> str:
    """Slims the part that the error names, as the error says; returns its name."""
    with pytest.raises(UnsupportedModel, match="put that back") as caught:
        patchslim.slim(model, method, **budget)
    (advice,) = re.findall(
        r"(model\.\S+) = (patchslim\.slim\(model\.\S+), \.\.\.\)", str(caught.value)
    )
    place, call = advice
    arguments = "".join(f", {name}={value!r}" for name, value in budget.items())
    exec(f"{place} = {call}, {method!r}{arguments})", {"model": model, "patchslim": patchslim})
    return str(place).removeprefix("model.")


@pytest.mark.parametrize(("part", "build", "embed", "side"), TOWERS, ids=range(len(TOWERS)))
def test_the_error_names_the_tower_and_putting_it_back_serves_the_librarys_own_calls(
    part: str, build: Callable[[], Any], embed: Callable[[Any, Tensor], Tensor], side: int
) -> None:
    model, x = build(), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = embed(model, x)
        assert take_advice(model, "identity") == part
        assert torch.allclose(embed(model, x), wanted, rtol=1e-4, atol=1e-5)
        setattr(*owner_and_name(model, part), model.get_submodule(part).host)
        take_advice(model, "tome", keep=0.5)
        got = embed(model, x)
    assert isinstance(model.get_submodule(part), SlimModel)
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    assert not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def owner_and_name(model: nn.Module, part: str) -> tuple[nn.Module, str]:
    """Splits the name of a part into the module that holds it, and its name there."""
    owner, _, name = part.rpartition(".")
    return model.get_submodule(owner), name


def test_the_zero_shot_pipeline_runs_a_slimmed_tower() -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]"
    )
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    model = clip()

    image = Image.effect_noise((40, 30), 90).convert("RGB")

    def classify() -> dict[str, float]:
        run = transformers.pipeline(
            "zero-shot-image-classification",
            model=model,
            tokenizer=fast,
            image_processor=processor,
        )
        answers = run(
            image, candidate_labels=["cat", "dog"], hypothesis_template="a photo of {} [end]"
        )
        return {each["label"]: each["score"] for each in answers}

    wanted = classify()
    model.vision_model = patchslim.slim(model.vision_model, "identity")
    assert classify() == pytest.approx(wanted, rel=1e-3)
    model.vision_model = patchslim.slim(model.vision_model.host, "random", keep=0.3)
    assert classify() != pytest.approx(wanted, rel=1e-4)


def test_the_projected_tower_gives_the_models_own_image_features() -> None:
    model = clip()
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=12)
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    tower.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.vision_model = patchslim.slim(model.vision_model, "tome", r=2)
        got = patchslim.slim(tower, "tome", r=2)(x).image_embeds
        assert torch.allclose(got, image_features(model, x), atol=1e-5)


def mae(cls: Any, **settings: Any) -> Any:
    """Makes a small ViTMAE of this class."""
    return prepared(cls(transformers.ViTMAEConfig(**VISION, **settings)))


def test_mae_that_masks_is_refused_and_its_encoder_as_a_vit_is_the_same_model(
    tmp_path: Any,
) -> None:
    host = mae(transformers.ViTMAEModel)
    with pytest.raises(UnsupportedModel, match=r"mask_ratio = 0\.0.*ViTModel\.from_pretrained"):
        patchslim.slim(host, "tome", r=2)
    host.save_pretrained(tmp_path)
    vit = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    host.config.mask_ratio = 0.0
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        in_order = torch.arange(16.0).expand(2, -1)
        wanted = host(x, noise=in_order)
        got = patchslim.slim(vit, "identity")(x).last_hidden_state
        same = patchslim.slim(host, "identity")(x)
    assert torch.allclose(got, wanted.last_hidden_state, atol=1e-5)
    assert [*same] == [*wanted]
    for name, value in wanted.items():
        assert torch.allclose(same[name], value, atol=1e-5), name


def test_maes_decoder_gets_the_patches_of_its_encoder_in_order() -> None:
    model = mae(transformers.ViTMAEForPreTraining)
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(UnsupportedModel, match=r"mask_ratio = 0\.0"):
        patchslim.slim(model, "tome", r=2)
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        wanted = model(x).logits
        assert take_advice(model, "identity") == "vit"
        assert torch.allclose(model(x).logits, wanted, rtol=1e-4, atol=1e-4)
        model.vit = patchslim.slim(model.vit.host, "tome", keep=0.5)
        assert model(x).logits.shape == wanted.shape
        with pytest.raises(WrongInput, match="noise"):
            model(x, noise=torch.rand(2, 16))


@pytest.mark.parametrize(
    "label", ["Dinov2Backbone stages", "DINOv3ViTBackbone stages, class token", "VitPoseBackbone"]
)
def test_a_backbone_returns_the_stages_that_it_is_asked_for(label: str) -> None:
    stages = ["stage1", "stage2"]
    host = tiny_tower(label, out_features=stages)
    x = AdapterTrial(host, patchslim.find_adapter(host)).images()
    with torch.no_grad():
        wanted = host(x)
        assert len(wanted.feature_maps) == 2
        same = patchslim.slim(host, "identity")
        less = patchslim.slim(host, "tome", keep=0.5)
        for got in (same(x), same.forward_with_costs(x)[0]):
            assert [*got] == [*wanted]
            for mine, own in zip(got.feature_maps, wanted.feature_maps, strict=True):
                assert torch.allclose(mine, own, rtol=1e-4, atol=1e-5)
        for mine, own in zip(less(x).feature_maps, wanted.feature_maps, strict=True):
            assert mine.shape == own.shape
        stated = less(x, output_hidden_states=True)
        assert len(stated.hidden_states) == len(host.stage_names)


def test_depth_is_estimated_from_the_stages_of_a_slimmed_backbone() -> None:
    backbone = transformers.Dinov2Config(
        **{**SMALL_CONFIG, **DINO_CONFIG},
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1, 0.5],
        neck_hidden_sizes=[8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    model = prepared(transformers.DepthAnythingForDepthEstimation(config))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(x).predicted_depth
        assert take_advice(model, "identity") == "backbone"
        assert torch.allclose(model(x).predicted_depth, wanted, rtol=1e-3, atol=1e-4)
        model.backbone = patchslim.slim(model.backbone.host, "tome", keep=0.5)
        assert model(x).predicted_depth.shape == wanted.shape


def test_yolos_detects_the_same_boxes_and_returns_rows_in_its_own_order() -> None:
    host = tiny_tower("YolosForObjectDetection")
    x = torch.randn(2, 3, 24, 12, generator=torch.Generator().manual_seed(0))
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2
    with torch.no_grad():
        wanted = host(x, labels=labels)
        got = patchslim.slim(host, "identity")(x, labels=labels)
        less = patchslim.slim(host, "tome", r=2)(x)
    assert list(got) == list(wanted)
    for name in ("loss", "logits", "pred_boxes", "last_hidden_state"):
        assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5), name
        assert name == "loss" or less[name].shape == wanted[name].shape


def test_dpt_estimates_depth_from_the_states_of_its_slimmed_encoder() -> None:
    config = transformers.DPTConfig(
        **VISION,
        backbone_out_indices=[0, 1, 2],
        neck_hidden_sizes=[8, 8, 8],
        reassemble_factors=[2, 1, 0.5],
        fusion_hidden_size=8,
    )
    model = prepared(transformers.DPTForDepthEstimation(config))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(x).predicted_depth
        assert take_advice(model, "identity") == "dpt"
        assert torch.allclose(model(x).predicted_depth, wanted, rtol=1e-3, atol=1e-4)
        model.dpt = patchslim.slim(model.dpt.host, "tome", keep=0.5)
        assert model(x).predicted_depth.shape == wanted.shape


def test_dpt_with_a_convolutional_network_before_it_is_refused() -> None:
    with torch.device("meta"):
        host = transformers.DPTForDepthEstimation(transformers.DPTConfig(is_hybrid=True))
    with pytest.raises(UnsupportedModel, match=r"is_hybrid=True.*dpt-large"):
        patchslim.find_adapter(host)


def test_radio_refuses_what_is_no_batch_of_images() -> None:
    slimmed = patchslim.slim(tiny_tower("RadioModel"), "tome", keep=0.5)
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(WrongInput, match="image_grid_hw"):
        slimmed(x, image_grid_hw=torch.tensor([[4, 4]]))
    with pytest.raises(WrongInput, match="batch, 3, 16, 16"):
        slimmed(torch.rand(2, 6, 16, 16))
    with pytest.raises(WrongInput, match="multiples of the patch, 4x4"):
        slimmed(torch.rand(2, 3, 16, 18))
    host, wanted = slimmed.host, slimmed(x).features
    images = host.make_preprocessor_external()(x)
    assert torch.allclose(slimmed(images).features, wanted, atol=1e-5)


def test_yolos_with_losses_of_all_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"auxiliary_loss = False"):
        patchslim.slim(tiny_tower("YolosForObjectDetection", auxiliary_loss=True), "tome", r=2)


def test_a_backbone_with_several_experts_is_refused() -> None:
    host = tiny_tower("VitPoseBackbone", num_experts=2, part_features=8)
    with pytest.raises(UnsupportedModel, match=r"num_experts=2 it chooses"):
        patchslim.slim(host, "tome", r=2)


def test_poses_are_estimated_by_a_slimmed_backbone() -> None:
    backbone = transformers.VitPoseBackboneConfig(
        **{**SMALL_CONFIG, "image_size": [32, 40], "patch_size": [8, 8], "out_indices": [3]}
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=5)
    model = prepared(transformers.VitPoseForPoseEstimation(config))
    x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(x).heatmaps
        assert take_advice(model, "identity") == "backbone"
        assert torch.allclose(model(x).heatmaps, wanted, rtol=1e-4, atol=1e-5)
        model.backbone = patchslim.slim(model.backbone.host, "random", keep=0.4)
        got = model(x).heatmaps
    assert got.shape == wanted.shape
    assert not torch.allclose(got, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["SmolVLM", "Idefics3"])
def test_a_language_model_gets_the_rows_of_its_encoder_in_order(name: str) -> None:
    text = {**TEXT, "model_type": "llama", "intermediate_size": 48, "pad_token_id": 0}
    cls = getattr(transformers, f"{name}Model")
    config = cls.config_class(
        vision_config=VISION, text_config=text, scale_factor=2, image_token_id=5, pad_token_id=0
    )
    model = prepared(cls(config))
    x = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.ones(1, 2, 16, 16, dtype=torch.bool)
    padded[:, 0, :, 8:] = False
    with torch.no_grad():
        wanted = torch.stack([*model.get_image_features(x).pooler_output])
        assert take_advice(model, "identity") == "vision_model"
        got = torch.stack([*model.get_image_features(x).pooler_output])
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
        model.vision_model = patchslim.slim(model.vision_model.host, "tome", keep=0.5)
        assert len(model.get_image_features(x).pooler_output) == len(wanted)
        with pytest.raises(WrongInput, match="patch_attention_mask hides patches"):
            model.get_image_features(x, pixel_attention_mask=padded)


@pytest.mark.parametrize(("kind", "layer"), [("clip", -2), ("siglip", [1, -1]), ("pixtral", -1)])
def test_llava_gets_the_states_of_its_tower(kind: str, layer: Any) -> None:
    named = kind if kind == "pixtral" else f"{kind}_vision_model"
    text = {**TEXT, "model_type": "llama", "intermediate_size": 48}
    config = transformers.LlavaConfig(
        vision_config={**VISION, "model_type": named},
        text_config=text,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
    )
    model = prepared(transformers.LlavaModel(config))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"image_sizes": torch.tensor([[16, 16]])} if kind == "pixtral" else {}

    def embed() -> Tensor:
        return torch.cat([*model.get_image_features(x, **sizes).pooler_output])

    with torch.no_grad():
        wanted, states = embed(), model.vision_tower(x, output_hidden_states=True).hidden_states
        assert take_advice(model, "identity") == "vision_tower"
        assert torch.allclose(embed(), wanted, rtol=1e-4, atol=1e-4)
        got = model.vision_tower(x, output_hidden_states=True).hidden_states
        assert len(got) == len(states)
        for mine, own in zip(got, states, strict=True):
            assert torch.allclose(mine, own, rtol=1e-4, atol=1e-4)
        model.vision_tower = patchslim.slim(model.vision_tower.host, "tome", keep=0.5)
        less = embed()
    assert less.shape == wanted.shape
    assert not torch.allclose(less, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_an_encoder_that_lays_all_images_in_one_row_is_not_exported(tmp_path: Any) -> None:
    slimmed = patchslim.slim(tiny_tower("PixtralVisionModel"), "random", keep=0.5)
    with pytest.raises(UnsupportedModel, match="lays the rows of all images in one"):
        patchslim.export(slimmed, tmp_path / "model.onnx")


def test_mistral_gets_the_rows_of_its_encoder_and_images_of_one_size() -> None:
    vision = {**VISION, "model_type": "pixtral"}
    text = {**TEXT, "model_type": "mistral", "intermediate_size": 48, "num_key_value_heads": 2}
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=5, spatial_merge_size=2
    )
    model = prepared(transformers.Mistral3Model(config))
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16, 24], [16, 24]])

    def embed(sizes: Tensor) -> Tensor:
        every = model.get_image_features(x, image_sizes=sizes).pooler_output
        return torch.cat([*every])

    with torch.no_grad():
        wanted = embed(sizes)
        assert take_advice(model, "identity") == "vision_tower"
        assert torch.allclose(embed(sizes), wanted, rtol=1e-4, atol=1e-4)
        model.vision_tower = patchslim.slim(model.vision_tower.host, "tome", keep=0.5)
        assert embed(sizes).shape == wanted.shape
        with pytest.raises(WrongInput, match="image of 16x16 pixels in a batch of 16x24"):
            embed(torch.tensor([[16, 24], [16, 16]]))


def test_patches_of_several_sizes_are_refused_with_the_model_that_takes_images() -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModel, match="fixed resolution is a SiglipModel"):
        patchslim.slim(transformers.Siglip2VisionModel(config), "tome", r=2)


def test_a_decoder_on_an_encoder_gets_the_encoders_rows_in_order() -> None:
    settings = {**SMALL_CONFIG, **OBLONG_CONFIG, "image_size": 16, "encoder_stride": 4}
    model = prepared(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**settings)))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x).reconstruction
        assert take_advice(model, "identity") == "vit"
        assert torch.allclose(model(x).reconstruction, wanted, atol=1e-5)


def test_a_model_without_an_encoder_gets_no_advice() -> None:
    with pytest.raises(UnsupportedModel, match="No adapter knows") as caught:
        patchslim.slim(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "tome", r=2)
    assert "put that back" not in str(caught.value)


def test_a_part_in_a_list_is_named_by_its_number() -> None:
    towers = nn.ModuleList([nn.Identity(), tiny_tower("CLIPVisionModel")])
    model: Any = nn.Module()
    model.towers = towers
    assert take_advice(model, "identity") == "towers[1]"


@pytest.mark.parametrize(
    "label",
    [
        "DINOv3ViTModel",
        "BeitModel",
        "RadioModel",
        "MLCDVisionModel",
        "Aimv2VisionModel native, eager",
    ],
)
def test_images_of_other_sizes(label: str) -> None:
    host = tiny_tower(label)
    x = torch.randn(2, 3, 24, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = host(x).last_hidden_state
        same = patchslim.slim(host, "identity")(x).last_hidden_state
        less = patchslim.slim(host, "tome", r=2)(x).last_hidden_state
    assert torch.allclose(same, wanted, rtol=1e-4, atol=1e-4)
    assert less.shape == wanted.shape


def test_interpolated_positions_of_clip() -> None:
    host = tiny_tower("CLIPVisionModel")
    x = torch.randn(2, 3, 24, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = host(x, interpolate_pos_encoding=True).pooler_output
        slimmed = patchslim.slim(host, "identity")
        assert torch.allclose(
            slimmed(x, interpolate_pos_encoding=True).pooler_output, wanted, atol=1e-5
        )


@pytest.mark.parametrize("label", ["SiglipVisionModel", "Aimv2VisionModel"])
def test_the_readout_is_the_attention_of_the_pooling_head(label: str) -> None:
    host = tiny_tower(label)
    adapter = patchslim.find_adapter(host)
    slimmed = patchslim.slim(host, "identity")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = slimmed.trace(x)[-1]
        got = adapter.readout(host, tokens)
        rows, pooling = adapter.norm(host, tokens.x), host.head
        if label == "SiglipVisionModel":
            probe = pooling.probe.repeat(2, 1, 1)
            wanted = pooling.attention(probe, rows, rows)[1][:, 0]
        else:
            query = pooling.cls_token.unflatten(2, (4, -1)).transpose(1, 2)
            key = pooling.k_proj(rows).unflatten(2, (4, -1)).transpose(1, 2)
            logits = query @ key.transpose(2, 3) * 8**-0.5
            wanted = logits.softmax(dim=3).mean(dim=1)[:, 0]
    assert torch.allclose(got, wanted, atol=1e-6)


def test_a_tower_is_prepared_for_as_the_processor_of_its_folder_says(tmp_path: Any) -> None:
    tower = tiny_tower("CLIPVisionModel")
    tower.save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.1, 0.2, 0.3],
    )
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": images.to_dict(), "processor_class": "CLIPProcessor"})
    )
    host = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    found = find_preprocessing(host, patchslim.find_adapter(host))
    assert found.stated
    assert found.mean == (0.1, 0.2, 0.3)
    assert found.resized_size(100, 100) == (20, 20)


@pytest.mark.slow
def test_a_tower_of_open_clip_says_how_images_are_prepared_and_keeps_it(tmp_path: Any) -> None:
    host = find_host("ViT-S-32-alt")
    stated = find_preprocessing(host, patchslim.find_adapter(host))
    assert stated.stated
    assert stated.mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    whole = {f"visual.{name}": value for name, value in host.state_dict().items()}
    torch.save({**whole, "logit_scale": torch.ones(())}, tmp_path / "whole.pth")
    loaded = find_host("ViT-S-32-alt", weights=tmp_path / "whole.pth")
    assert torch.equal(loaded.conv1.weight, host.conv1.weight)
    slimmed = patchslim.slim(loaded, "tome", macs=0.6)
    slimmed.save(tmp_path / "saved")
    again = patchslim.load(tmp_path / "saved").host
    assert find_preprocessing(again, patchslim.find_adapter(again)) == stated


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-B-16-SigLIP", r"timm's vit_base_patch16_siglip_224.*model\.visual\.trunk"),
        ("ViT-B-32.laion2b_s34b_b79", "Did you mean 'ViT-B-32.laion2b_s34b_b79k'"),
    ],
)
def test_names_of_open_clip_that_are_not_built_say_what_to_do(name: str, said: str) -> None:
    with pytest.raises(PatchslimError, match=said):
        find_host(name)


def test_weights_of_open_clip_are_fetched_by_name_alone() -> None:
    with pytest.raises(PatchslimError, match=r"Name them behind a dot: one of ViT-B-32\.openai"):
        find_host("ViT-B-32", pretrained=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_dropout": 0.5}, r"patch_dropout = torch\.nn\.Identity\(\)"),
        ({"attentional_pool": True}, "attentional_pool"),
        ({"block_type": "custom", "scaled_cosine_attn": True}, "scaled_cosine_attn"),
    ],
)
def test_what_a_tower_of_open_clip_cannot_give_exactly_is_refused(
    change: dict[str, Any], said: str
) -> None:
    tower = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_ratio=2, **change
    )
    with pytest.raises(UnsupportedModel, match=said):
        patchslim.slim(tower, "tome", r=2)
