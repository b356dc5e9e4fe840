"""What a SlimModel shows of its host: timm's and transformers' own tools run on it unchanged."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import patchslim
from comparison import host_state, is_close
from hf_hosts import random_pixels, tiny_hf
from patchslim.errors import WrongInput
from small_hosts import HOSTS, every_host, slim_host
from timm_variants import Variant, random_images

FIXED = ("tome", "evit", "topk", "random")  # methods whose counts are fixed


@pytest.mark.parametrize(
    ("variant", "method"),
    [(variant, "tome") for variant in HOSTS.values()]
    + [(HOSTS[name], "evit") for name in ("class token", "distilled", "rotary query")],
    ids=str,
)
def test_head_of_features_is_the_answer(variant: Variant, method: str) -> None:
    """Pooling by size equals pooling the restored sequence."""
    host = variant.build()
    model, x = slim_host(host, method), random_images(host)
    with torch.no_grad():
        assert is_close(model.forward_head(model.forward_features(x)), model(x), factor=3)
        flat = model.forward_head(model.forward_features(x), pre_logits=True)
        assert flat.shape == host.forward_head(host.forward_features(x), pre_logits=True).shape


@pytest.mark.parametrize("label", ["Dinov2", "Dinov2WithRegisters", "ViT", "DeiT"])
def test_classifier_of_hidden_state_is_the_answer(label: str) -> None:
    host = tiny_hf(f"{label}ForImageClassification")
    model, x = slim_host(host), random_pixels(host)
    prefix = patchslim.find_adapter(host).describe(host).prefix
    with torch.no_grad():
        rows = model.forward_features(x)
        read = rows[:, 0]
        if label.startswith("Dino"):
            read = torch.cat([read, rows[:, prefix:].mean(dim=1)], dim=1)
        assert is_close(host.classifier(read), model(x).logits, factor=3)


FLAGS = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only")
CALLS = [
    {"indices": indices, **dict(zip(FLAGS, flags, strict=True))}
    for indices, flags in itertools.product(
        [None, 2, [-1], (2, 0, 2)], itertools.product([False, True], repeat=4)
    )
]


@pytest.mark.parametrize(
    ("name", "output_fmt"),
    [
        ("distilled", "NLC"),
        ("registers, no class token", "NCHW"),
        ("rotary average", "NCHW"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("distilled", "NCHW"),
                ("registers, no class token", "NLC"),
                ("rotary average", "NLC"),
            )
        ),
    ],
)
def test_intermediates_equal_the_host(name: str, output_fmt: str) -> None:
    host = HOSTS[name].build()
    model, x = patchslim.slim(host, "identity"), random_images(host, 1)
    with torch.no_grad():
        for call in CALLS:
            got = model.forward_intermediates(x, **call, output_fmt=output_fmt)
            wanted = host.forward_intermediates(x, **call, output_fmt=output_fmt)
            same(got, wanted)


def test_intermediates_by_position_and_as_dictionary() -> None:
    host = HOSTS["distilled"].build()
    model, x = patchslim.slim(host, "identity"), random_images(host)
    with torch.no_grad():
        for call in [(2, True, True), ([0, 1], True, False, True, "NLC"), (None, False, True)]:
            same(model.forward_intermediates(x, *call), host.forward_intermediates(x, *call))
        for prefix, alone in itertools.product([False, True], repeat=2):
            call = (2, prefix, False, False, "NCHW", alone, True)
            got, wanted = (each.forward_intermediates(x, *call) for each in (model, host))
            assert set(got) == set(wanted)
            for key, value in wanted.items():
                same(got[key], value)


def test_intermediates_are_asked_for_as_timm_asks() -> None:
    """By the same names, in the same order, with the same defaults."""
    host = HOSTS["distilled"].build()
    model = patchslim.slim(host, "identity")
    asked, known = (
        inspect.signature(each.forward_intermediates).parameters for each in (model, host)
    )
    assert {name: each.default for name, each in asked.items()} == {
        name: known[name].default for name in asked
    }
    assert list(asked) == [name for name in known if name in asked]


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4]])
def test_intermediates_of_blocks_that_are_not_there(vit: Any, indices: Any) -> None:
    model = slim_host(vit)
    with pytest.raises(WrongInput, match="levels 0 to 2"):
        model.forward_intermediates(random_images(vit), indices)


@every_host
def test_reduced_intermediates_keep_their_shape(variant: Variant) -> None:
    host = variant.build()
    x = random_images(host)
    with torch.no_grad():
        got = slim_host(host).forward_intermediates(x, [0, 2], intermediates_only=True)
        wanted = host.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert [each.shape for each in got] == [each.shape for each in wanted]
    assert all(torch.isfinite(each).all() for each in got)


def same(got: Any, wanted: Any) -> None:
    """Asserts that nested lists and tuples of tensors are equal to rounding."""
    if isinstance(wanted, Tensor):
        assert is_close(got, wanted)
        return
    assert type(got) is type(wanted)
    assert len(got) == len(wanted)
    for mine, its in zip(got, wanted, strict=True):
        same(mine, its)


@pytest.mark.parametrize("indices", [2, (0, 2), (-1,)])
@pytest.mark.parametrize("norm", [False, True])
def test_timm_feature_getter(indices: Any, norm: Any) -> None:
    from timm.models._features import FeatureGetterNet

    host = HOSTS["class token"].build()
    x = random_images(host)
    net = FeatureGetterNet(patchslim.slim(host, "identity"), out_indices=indices, norm=norm)
    whole = FeatureGetterNet(host, out_indices=indices, norm=norm, prune=False)
    less = FeatureGetterNet(slim_host(host), out_indices=indices, norm=norm)
    with torch.no_grad():
        same(net(x), whole(x))
        assert [each.shape for each in less(x)] == [each.shape for each in whole(x)]
    assert net.feature_info.channels() == whole.feature_info.channels()


def test_timm_tools_run_unchanged() -> None:
    host = timm.create_model("test_vit", num_classes=7)
    model = slim_host(host, r=9)
    config = timm.data.resolve_model_data_config(model)
    assert config == timm.data.resolve_model_data_config(host)
    transform = timm.data.create_transform(**config)
    image = pytest.importorskip("PIL.Image").new("RGB", (200, 180), (40, 90, 160))
    x = torch.stack([transform(image)] * 2)
    with torch.no_grad():
        top1, top5 = timm.utils.accuracy(model(x), torch.tensor([0, 1]), topk=(1, 5))
    assert 0 <= float(top1) <= float(top5) <= 100
    for name in ("num_classes", "num_features", "pretrained_cfg", "feature_info", "embed_dim"):
        assert getattr(model, name) is getattr(host, name)
    model.set_grad_checkpointing()
    assert host.grad_checkpointing
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_dense_forward_is_not_public(vit: Any) -> None:
    model = slim_host(vit)
    with pytest.raises(AttributeError, match=r"\.host"):
        _ = model.blocks
    assert not hasattr(model, "get_intermediate_layers")


@pytest.mark.parametrize("label", ["ViT", "DeiT", "Dinov2"])
def test_transformers_pipeline(label: str) -> None:
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    host = tiny_hf(f"{label}ForImageClassification")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    pictures = [
        image.frombytes("RGB", (20, 18), torch.randint(256, (1080,)).byte().numpy().tobytes())
        for _ in range(3)
    ]

    def answers(model: nn.Module) -> Any:
        pipe = transformers.pipeline("image-classification", model, image_processor=processor)
        assert type(model).__name__ in repr(pipe)
        return pipe(pictures, top_k=3, batch_size=2)

    wanted, got = answers(host), answers(patchslim.slim(host, "identity"))
    for mine, its in zip(got, wanted, strict=True):
        assert [each["label"] for each in mine] == [each["label"] for each in its]
        assert math.isclose(mine[0]["score"], its[0]["score"], rel_tol=1e-4)
    assert [len(each) for each in answers(slim_host(host))] == [3, 3, 3]


@every_host
def test_copies_and_pickles_give_the_same_answer(variant: Variant) -> None:
    host = variant.build()
    model, x = slim_host(host), random_images(host)
    with torch.no_grad():
        wanted = model(x)
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x), wanted)
        assert torch.equal(thawed(x), wanted)
    assert twin.host is not host
    assert repr(thawed) == repr(model)


@every_host
@pytest.mark.parametrize("classes", [7, 0])
def test_mixed_precision(variant: Variant, classes: int) -> None:
    host = Variant(variant.label, variant.host, {**variant.args, "num_classes": classes}).build()
    x = random_images(host)
    with torch.no_grad():
        exact = host(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = host(x)
            assert is_close(patchslim.slim(host, "identity")(x).float(), exact, factor=5e3)
            got = slim_host(host)(x)
    assert got.dtype == wanted.dtype
    assert torch.isfinite(got).all()


def test_weights_move_with_the_model(vit: Any) -> None:
    model = slim_host(vit)
    assert set(model.state_dict()) == {f"host.{name}" for name in vit.state_dict()}
    model.double()
    assert model(random_images(vit)).dtype == torch.float64 == vit(random_images(vit)).dtype
    model.train()
    assert vit.training
    assert vit.blocks[0].training


@pytest.mark.parametrize("method", FIXED)
def test_two_threads_get_the_answers_of_one(vit: Any, method: str) -> None:
    model = slim_host(vit, method)
    batches = [random_images(vit, 1 + n % 3, seed=n) for n in range(24)]

    def answer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    wanted = [answer(x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        for got, alone in zip(pool.map(answer, batches), wanted, strict=True):
            assert torch.equal(got, alone)


def test_dropping_the_slimmed_model_leaves_nothing_behind(vit: Any) -> None:
    before = host_state(vit)
    model = slim_host(vit, macs=0.7)
    model(random_images(vit)).sum().backward()  # type: ignore[no-untyped-call]
    vit.zero_grad()
    model.forward_intermediates(random_images(vit))
    copy.deepcopy(model)
    assert model.host is vit
    del model
    assert host_state(vit) == before
    assert patchslim.slim(vit, "tome", r=1)(random_images(vit)).shape == (2, 7)
