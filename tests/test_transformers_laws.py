"""What transformers' family keeps besides the public laws, which `test_family_laws.py` runs.

Output classes, labels and losses, masks, image sizes, and what is refused.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import patchslim
from comparison import (
    Shuffle,
    ShuffleMap,
    ShuffleQueries,
    assert_same_gradients,
    gradients,
    is_close,
    sample_methods,
    slim_unchecked,
)
from hf_hosts import (
    HF_HOSTS,
    OBLONG_CONFIG,
    SMALL_CONFIG,
    HfHost,
    random_pixels,
    tiny_hf,
)
from hf_towers import EVERY_TOWER, Tower, tiny_tower
from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.schedules.schedule import Rate
from patchslim.testing.adapter_laws import AdapterTrial
from patchslim.tokens.rows import take
from variants_transformers import is_combination

SLOW = pytest.mark.slow
LABELLED = [kind for kind in HF_HOSTS if "ForImageClassification" in kind.label]
LABELLED = [kind for kind in LABELLED if not kind.label.endswith("WithTeacher")]
FREE = ["ViTModel", "DeiTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel"]


def by_default(kinds: list[HfHost]) -> list[Any]:
    """Marks what only combines a class and an attention as slow; all public laws run on it."""
    return [pytest.param(each, marks=SLOW) if is_combination(each) else each for each in kinds]


every_kind = pytest.mark.parametrize("kind", by_default(HF_HOSTS), ids=str)


@functools.cache
def built(kind: HfHost | Tower) -> Any:
    """Builds one host for all laws that do not change it."""
    return kind.build()


def base(host: Any) -> Any:
    """Finds the bare model inside a classifier."""
    return getattr(host, host.base_model_prefix, host)


def alike(got: Any, wanted: Any, factor: float = 1.0) -> None:
    """Asserts that two outputs are of one class and have equal tensors."""
    assert type(got) is type(wanted)
    if isinstance(wanted, Tensor):
        assert is_close(got, wanted, factor)
        return
    pairs = got.items() if hasattr(got, "items") else enumerate(got)
    assert len(got) == len(wanted)
    for key, value in pairs:
        alike(value, wanted[key], factor)


@every_kind
def test_outputs_of_everything_equal_the_hosts(kind: HfHost) -> None:
    host = built(kind)
    config = host.config.to_dict()
    slimmed, x = patchslim.slim(host, "identity"), random_pixels(host)
    with torch.no_grad():
        alike(slimmed(x), host(x))
        alike(slimmed(pixel_values=x, return_dict=False), host(x, return_dict=False))
        features = base(host)(x).last_hidden_state
        assert is_close(slimmed.forward_features(x), features)
    assert slimmed.host is host
    assert host.config.to_dict() == config


@every_kind
def test_reduced_model_runs(kind: HfHost) -> None:
    host = built(kind)
    x = random_pixels(host)
    with torch.no_grad():
        wanted = host(x)
        for method in [*sample_methods(host), Shuffle(), ShuffleQueries(), ShuffleMap()]:
            got = slim_unchecked(host, method, Rate(0.7, (0, 1)))(x)
            assert (type(got), list(got)) == (type(wanted), list(wanted)), method
            for key, value in wanted.items():
                assert got[key].shape == value.shape
                assert got[key].dtype == value.dtype
                assert torch.isfinite(got[key]).all()


@every_kind
def test_dropping_equals_masking_in_the_host(kind: HfHost) -> None:
    host = built(kind)
    if "attention_mask" not in inspect.signature(type(host).forward).parameters:
        pytest.skip("this version's hosts take no attention mask")
    x = random_pixels(host)
    with torch.no_grad():
        left = slim_unchecked(host, Shuffle(), Rate(0.5, (0,))).trace(x)[-1]
        rows = left.cells() + left.prefix
        mask = torch.zeros(len(x), left.prefix + left.grid[0] * left.grid[1], dtype=torch.long)
        mask[:, : left.prefix] = 1
        mask.scatter_(1, rows, 1)
        wanted = base(host)(x, attention_mask=mask).last_hidden_state
        got = base(host).layernorm(left.x)
    assert is_close(got[:, : left.prefix], wanted[:, : left.prefix])
    assert is_close(got[:, left.prefix :], take(wanted, rows))


@every_kind
def test_prefix_stays_first_and_untouched(kind: HfHost) -> None:
    host = built(kind)
    adapter = patchslim.find_adapter(host)
    prefix = adapter.describe(host).prefix
    with torch.no_grad():
        wanted = base(host)(random_pixels(host)).last_hidden_state[:, :prefix]
        for method in [*sample_methods(host), ShuffleQueries()]:
            traced = slim_unchecked(host, method, Rate(0.5, (2,))).trace(random_pixels(host))
            assert traced[-1].patches < traced[-2].patches
            assert is_close(adapter.norm(host, traced[-1].x)[:, :prefix], wanted), method


@every_kind
def test_exact_tail_gives_the_same_answer(kind: HfHost) -> None:
    host = built(kind)
    x = random_pixels(host)
    with torch.no_grad():
        for method in [*sample_methods(host), ShuffleQueries(), ShuffleMap()]:
            full, exact = (
                slim_unchecked(host, method, Rate(0.6, (0, 2)), tail) for tail in ("full", "exact")
            )
            alike(exact(x), full(x))


STATELESS = ("Yolos", "VJEPA2Encoder", "ViTMAE")
STATED = [*HF_HOSTS, *(each for each in EVERY_TOWER if not each.label.startswith(STATELESS))]


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=SLOW if is_combination(each) else []) for each in STATED]
)
def test_hidden_states_are_the_hosts_and_in_its_order(kind: HfHost | Tower) -> None:
    host = built(kind)
    x = AdapterTrial(host, patchslim.find_adapter(host)).images()
    with torch.no_grad():
        wanted = host(x, output_hidden_states=True)
        for method, tail in (("identity", "full"), ("identity", "exact"), ("random", "exact")):
            less = {"keep": 0.5} if method == "random" else {}
            got = patchslim.slim(host, method, tail=tail, **less)(x, output_hidden_states=True)
            assert [*got] == [*wanted]
            for mine, own in zip(got.hidden_states, wanted.hidden_states, strict=True):
                assert mine.shape == own.shape
                assert method == "random" or is_close(mine, own, 2)


@pytest.mark.parametrize("label", ["YolosModel", "VJEPA2Encoder", "ViTMAEModel"])
def test_hidden_states_that_the_host_lacks_or_adds_to_are_refused(label: str) -> None:
    host = tiny_tower(label)
    x = AdapterTrial(host, patchslim.find_adapter(host)).images()
    with pytest.raises(WrongInput, match="output_hidden_states"):
        patchslim.slim(host, "tome", keep=0.5)(x, output_hidden_states=True)


@pytest.mark.parametrize("label", ["ViT", "Dinov2"])
def test_activations_can_be_recomputed(label: str) -> None:
    host = tiny_hf(f"{label}ForImageClassification")
    model = patchslim.slim(host, "tome", r=2).train()

    def answer(x: Tensor) -> Tensor:
        logits: Tensor = model(x).logits
        return logits

    wanted = gradients(answer, host, random_pixels(host))
    newest = "activation_checkpointing_enable"
    getattr(model, newest if hasattr(host, newest) else "gradient_checkpointing_enable")()
    assert patchslim.find_adapter(host).describe(host).recomputes_activations
    assert_same_gradients(gradients(answer, host, random_pixels(host)), wanted)


@pytest.mark.parametrize("kind", by_default(LABELLED), ids=str)
@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_labels_give_the_host_loss(kind: HfHost, problem: str | None) -> None:
    host = kind.build()
    host.config.problem_type = problem
    x = random_pixels(host)
    classes = torch.tensor([3, 0])
    labels = classes if problem is None else torch.eye(7, dtype=host.dtype)[classes]
    with torch.no_grad():
        got = patchslim.slim(host, "identity")(x, labels=labels)
        wanted = host(x, labels=labels)
        assert is_close(got.loss, wanted.loss)
        less = patchslim.slim(host, "tome", r=2)(x, labels=labels)
    assert torch.isfinite(less.loss)
    assert less.loss != wanted.loss


@pytest.mark.parametrize("label", FREE)
@pytest.mark.parametrize("size", [(24, 12), (18, 27)])
def test_other_image_sizes(label: str, size: tuple[int, int]) -> None:
    host = tiny_hf(label)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    dino = label.startswith("Dinov2")
    options = {} if dino else {"interpolate_pos_encoding": True}
    slimmed = patchslim.slim(host, "tome", r=2)
    with torch.no_grad():
        wanted = host(x, **options)
        alike(patchslim.slim(host, "identity")(x, **options), wanted)
        got = slimmed(x, **options)
    assert [value.shape for value in got.values()] == [value.shape for value in wanted.values()]
    if not dino:
        with pytest.raises(WrongInput, match="interpolate_pos_encoding=True"):
            slimmed(x)


def test_configured_tuple_is_returned() -> None:
    host = tiny_hf("ViTModel", return_dict=False)
    with torch.no_grad():
        alike(patchslim.slim(host, "identity")(random_pixels(host)), host(random_pixels(host)))


@pytest.mark.parametrize("option", ["output_attentions", "attention_mask"])
def test_what_a_reduced_sequence_lacks_is_refused(hf_vit: Any, option: str) -> None:
    slimmed = patchslim.slim(hf_vit, "tome", r=2)
    with pytest.raises(WrongInput, match=option):
        slimmed(random_pixels(hf_vit), **{option: True})


def test_what_the_configuration_asks_for_is_refused_or_given() -> None:
    asking = {"output_attentions": True, "attn_implementation": "eager"}
    with pytest.raises(UnsupportedModel, match="output_attentions"):
        patchslim.slim(tiny_hf(**asking), "tome", r=2)
    host = tiny_hf(output_hidden_states=True)
    with torch.no_grad():
        alike(patchslim.slim(host, "identity")(random_pixels(host)), host(random_pixels(host)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViTForMaskedImageModeling", OBLONG_CONFIG),
        ("DeiTForMaskedImageModeling", OBLONG_CONFIG),
    ],
)
def test_other_tasks_are_refused(name: str, settings: dict[str, Any]) -> None:
    cls = getattr(transformers, name)
    host = cls(cls.config_class(**{**SMALL_CONFIG, **settings}))
    with pytest.raises(UnsupportedModel, match="not among the supported tasks"):
        patchslim.slim(host, "tome", r=2)


def test_other_families_are_refused() -> None:
    cls = transformers.VitDetModel
    with pytest.raises(UnsupportedModel, match="No adapter knows"):
        patchslim.slim(cls(cls.config_class(**SMALL_CONFIG)), "tome", r=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SwinModel", "windows.*Take"),
        ("SamModel", "windows.*convolutions.*Take.*DINOv2"),
        ("Sam2VisionModel", "windows.*convolutions"),
        ("Qwen2VLModel", "several sizes in one row.*InternVL"),
        ("Qwen2_5_VisionTransformerPretrainedModel", "several sizes in one row"),
        ("SegformerForImageClassification", "pools keys"),
        ("MobileViTModel", "convolutions read"),
        ("DetrModel", "cells of a convolutional network.*YOLOS"),
        ("ViltModel", "text beside patches"),
        ("LevitForImageClassification", "model of timm is served"),
        ("ResNetForImageClassification", "no attention over tokens"),
    ],
)
def test_other_models_are_refused_with_the_reason_and_what_to_take(name: str, said: str) -> None:
    cls = host_class(name)
    with torch.device("meta"):
        host = cls(cls.config_class())
    with pytest.raises(UnsupportedModel, match=said) as refused:
        patchslim.find_adapter(host)
    assert str(refused.value).count("Take ") == 1


def host_class(name: str) -> Any:
    """Finds a class of transformers, which does not show all of them."""
    places = (transformers, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl)
    return next(getattr(place, name) for place in places if hasattr(place, name))


def test_changed_layer_is_refused(hf_vit: Any) -> None:
    plain = hf_vit.vit.layers[0].forward
    hf_vit.vit.layers[0].forward = lambda *args, **options: 1.01 * plain(*args, **options)
    with pytest.raises(UnsupportedModel, match="differs from the model"):
        patchslim.slim(hf_vit, "tome", r=2)
