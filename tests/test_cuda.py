"""The laws on a GPU: every method and family decides and answers there as it does on the CPU.

Skipped where there is no GPU. Libraries that are not installed are left out, since a machine with a
GPU may have PyTorch, timm and transformers alone.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import patchslim
from comparison import is_close
from patchslim.hosts._registry import find_family_library, load_adapter
from patchslim.model.model import SlimModel
from patchslim.testing import FAMILY_LAWS
from patchslim.testing.adapter_laws import AdapterTrial
from patchslim.testing.law import check_law
from patchslim.testing.trial import Trial, tiny_host, uneven_images
from patchslim.training.config import TrainConfig
from tiny_training import SIDE, make_batches, trainable_vit
from toy_methods import shipped_methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
HALVES = (torch.float16, torch.bfloat16)
# Each of the fused kernels; with MATH beside it for what it cannot take, such as a mask.
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
METHODS = [*shipped_methods()]
STATIC = [each for each in METHODS if not each.values[0].adaptive]
COMPILED = ("similarity", "tome", "evit", "topk", "evo")


@pytest.fixture(scope="module", autouse=True)
def full_float32() -> Iterator[None]:
    """Multiplies float32 in float32, and not in TF32, which has ten bits of precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(model: SlimModel) -> SlimModel:
    """Returns a copy on the GPU; the CPU's stays where it is."""
    copied: SlimModel = copy.deepcopy(model).cuda()
    return copied


def kept_cells(model: SlimModel, images: Tensor) -> list[Any]:
    """Lists which cells are left after each block, and how many patches each stands for."""
    kept = []
    with torch.no_grad():
        for tokens in model.trace(images):
            cells, order = tokens.cells().sort(dim=1)
            alive = None if tokens.alive is None else tokens.alive.gather(1, order).tolist()
            sizes = tokens.sizes().gather(1, order).round(decimals=3).tolist()
            kept.append((cells.tolist(), sizes, alive))
    return kept


@torch.no_grad()
def answers(model: Any, images: Tensor) -> Tensor:
    """Returns the class scores."""
    scores: Tensor = model(images)
    return scores


@pytest.mark.parametrize("method", METHODS)
def test_a_method_decides_as_on_the_cpu(method: Any) -> None:
    model, images = Trial(method, 64).model(), uneven_images(3)
    moved = on_gpu(model)
    assert kept_cells(moved, images.cuda()) == kept_cells(model, images)
    assert is_close(answers(moved, images.cuda()).cpu(), answers(model, images), 10)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_in_half_precision(method: Any, dtype: torch.dtype) -> None:
    model, images = on_gpu(Trial(method, 64).model()).to(dtype), uneven_images(3).cuda().to(dtype)
    got = answers(model, images)
    assert got.dtype == dtype
    assert got.isfinite().all()
    if not method.adaptive:
        with torch.no_grad():
            left = [tokens.x.shape[1] for tokens in model.trace(images)]
        assert left == list(model.counts())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_attention_kernel_gives_the_same(
    method: Any, dtype: torch.dtype, kernel: SDPBackend
) -> None:
    """On images with the same tokens in every block; rounding may decide near ties otherwise."""
    model = on_gpu(Trial(method, 64).model()).to(dtype)
    images = uneven_images(8).cuda().to(dtype)

    def run(*allowed: SDPBackend) -> tuple[Tensor, list[Any]]:
        with sdpa_kernel([*allowed]):
            return answers(model, images), kept_cells(model, images)

    got, theirs = run(kernel, SDPBackend.MATH)
    wanted, ours = run(SDPBackend.MATH)
    same = [
        all(
            there[0][image] == here[0][image] and there[1][image] == here[1][image]
            for there, here in zip(theirs, ours, strict=True)
        )
        for image in range(len(images))
    ]
    assert sum(same) >= len(same) / 2
    assert is_close(got[same], wanted[same])


@pytest.mark.parametrize("method", STATIC)
def test_a_fixed_method_runs_as_a_cuda_graph(method: Any) -> None:
    """Nothing waits for the GPU, so that a recorded pass gives new images their own answer."""
    model = on_gpu(Trial(method, 64).model())
    images = uneven_images(3).cuda()
    wanted = [answers(model, images), answers(model, images.flip(0))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph, given = torch.cuda.CUDAGraph(), images.clone()
    with torch.cuda.graph(graph), torch.no_grad():
        got = model(given)
    for fresh, want in zip((images, images.flip(0)), wanted, strict=True):
        given.copy_(fresh)
        graph.replay()
        assert is_close(got, want)


@pytest.mark.parametrize("name", COMPILED)
def test_a_tuned_compiled_model_gives_the_same(name: str) -> None:
    model = patchslim.slim(tiny_host(width=64).cuda(), name, keep_rate=0.7, at=(0, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="max-autotune-no-cudagraphs")
    images = uneven_images(4).cuda()
    assert is_close(answers(compiled, images), answers(model, images), 10)


def list_subjects() -> Iterator[Any]:
    """Lists the first variant of every family of the libraries that are installed."""
    for family in patchslim.adapter_names():
        try:
            module = importlib.import_module(f"variants_{find_family_library(family).name}")
            yield pytest.param(family, module.variants(family)[0], id=family)
        except ImportError:
            continue


@pytest.mark.parametrize(("family", "variant"), [*list_subjects()])
def test_a_family_keeps_the_laws(family: str, variant: Any) -> None:
    subject = AdapterTrial(variant.build().cuda(), load_adapter(family))
    for law in FAMILY_LAWS:
        check_law(law, subject, f"{family} on {variant}")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tome", "similarity", "evit", "evo", "dynamicvit"])
def test_training_and_going_on_give_the_same_weights(
    name: str, precision: Any, tmp_path: Any
) -> None:
    model = patchslim.slim(trainable_vit(), name, keep_rate=0.7, at=(1,))
    usual = {**model.method.training_defaults, "batch": 4, "precision": precision}
    config = TrainConfig.of(usual, {"steps": 3, "checkpoint": 1, "workers": 0})
    images = make_batches()
    once = patchslim.train(model, images, config, out=tmp_path / "once")
    assert next(once.model.parameters()).device.type == "cpu"

    class Stop(Exception):
        pass

    def stop_at_two(line: str) -> None:
        if "2/3" in line:
            raise Stop

    with pytest.raises(Stop):
        patchslim.train(model, images, config, out=tmp_path / "twice", progress=stop_at_two)
    twice = patchslim.train(model, images, config, out=tmp_path / "twice", resume=True)
    for one, other in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert is_close(other, one, 10)


def test_measure_and_saving_take_a_model_on_the_gpu(tmp_path: Any) -> None:
    host = trainable_vit(4).cuda()
    model = patchslim.slim(host, "similarity", macs=0.8)
    batches = [(uneven_images(4, size=SIDE), torch.tensor([0, 1, 2, 3]))]
    report = patchslim.measure({"similarity": model}, batches, batch=4, repeats=2)
    row = next(each for each in report.rows if each.name == "similarity")
    assert row.latency is not None
    assert row.kl is not None
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back: nn.Module = patchslim.load(tmp_path / "model")
    assert is_close(answers(back, batches[0][0]), answers(model, batches[0][0].cuda()).cpu(), 10)
