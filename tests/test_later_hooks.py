"""Hooks that are added after slimming: those that can never fire are told of, once, at a call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import patchslim
from comparison import is_close
from hf_hosts import random_pixels
from patchslim.errors import BypassedHook, UnsupportedModel
from small_hosts import slim_host
from timm_variants import random_images


@pytest.mark.parametrize("name", ["", "blocks.1", "blocks.2.attn"])
def test_a_hook_that_is_added_later_and_never_fires_is_told_once(vit: Any, name: str):
    slimmed, images = slim_host(vit), random_images(vit)
    slimmed(images)
    vit.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.warns(BypassedHook, match=rf"on {name or 'VisionTransformer'}: it goes around"):
        slimmed(images)
    silent(slimmed, images)
    vit.blocks[0].register_full_backward_hook(lambda *_: None)
    with pytest.warns(BypassedHook, match=r"on blocks\.0: it goes around"):
        slimmed(images)


def silent(model: Any, images: Any) -> None:
    """Runs the model, in which no hook is to be told of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedHook)
        model(images)


def test_hooks_that_fire_and_hooks_of_the_slimmed_model_are_silent(vit: Any):
    slimmed, seen = slim_host(vit), []
    vit.blocks[1].norm1.register_forward_hook(lambda *_: seen.append("norm"))
    slimmed.register_forward_hook(lambda *_: seen.append("model"))
    silent(slimmed, random_images(vit))
    assert seen == ["norm", "model"]


def test_hooks_of_the_slimming_are_told_there_and_not_again(vit: Any):
    vit.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.warns(BypassedHook):
        slimmed = slim_host(vit)
    silent(slimmed, random_images(vit))


def test_copies_watch_their_own_host(vit: Any):
    slimmed, images = slim_host(vit), random_images(vit)
    twin = copy.deepcopy(slimmed)
    vit.blocks[1].register_forward_hook(lambda *_: None)
    silent(twin, images)
    twin.host.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(BypassedHook, match=r"blocks\.1"):
        twin(images)


def test_hugging_face_hosts_are_watched(hf_vit: Any):
    slimmed = patchslim.slim(hf_vit, "tome", r=2)
    hf_vit.vit.layers[1].register_forward_hook(lambda *_: None)
    with pytest.warns(BypassedHook, match=r"on vit\.layers\.1: it goes around"):
        slimmed(random_pixels(hf_vit))


@pytest.mark.slow
def test_compiled_calls_do_not_look_for_hooks(vit: Any):
    slimmed, images = slim_host(vit), random_images(vit)
    compiled = torch.compile(slimmed, backend="eager", fullgraph=True)
    vit.blocks[1].register_forward_hook(lambda *_: None)
    silent(compiled, images)


def test_a_class_map_from_the_trace_is_that_of_hooks_on_the_dense_blocks(vit: Any):
    """Grad-CAM, as docs/libraries.md does it."""
    images, kept = random_images(vit), []
    handle = vit.blocks[1].register_forward_hook(lambda _module, _given, got: kept.append(got))
    (wanted,) = torch.autograd.grad(vit(images)[:, 3].sum(), kept)
    handle.remove()
    for slimmed in (patchslim.slim(vit, "identity"), slim_host(vit)):
        traced = slimmed.trace(images)
        logits = slimmed.forward_head(slimmed.host.norm(traced[-1].dense_features()))
        (slope,) = torch.autograd.grad(logits[:, 3].sum(), traced[1].x)
        heat = traced[1].with_x((slope * traced[1].x).sum(dim=2, keepdim=True)).dense_features()
        assert heat.shape == (*wanted.shape[:2], 1)
        if slimmed.plan.decision_blocks == ():
            assert is_close(slope, wanted)
        else:
            assert slope.shape[1] < wanted.shape[1]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A group of one process, and its mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_model_is_sharded_as_a_whole_and_blocks_by_themselves_are_refused(
    vit: Any, one_process: Any
):
    from torch.distributed.fsdp import fully_shard

    slimmed, images = slim_host(vit), random_images(vit)
    wanted = slimmed(images)
    whole = fully_shard(copy.deepcopy(slimmed), mesh=one_process)
    assert is_close(whole(images), wanted)
    whole(images).square().mean().backward()
    assert all(each.grad is not None for each in whole.host.blocks.parameters())
    fully_shard(vit.blocks[1], mesh=one_process)
    with pytest.raises(UnsupportedModel, match=r"blocks\.1 of the host is sharded .* as a whole"):
        slimmed(images)
    with pytest.raises(UnsupportedModel, match=r"blocks\.1 of the host is sharded"):
        slim_host(vit)
