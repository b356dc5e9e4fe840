"""timm's tools take a slimmed model as they take its host, or an error says what to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import patchslim
from comparison import is_close
from patchslim.errors import BadFile, WrongExport
from small_hosts import HOSTS, slim_host
from timm_variants import random_images

GROUPED = ("class token", "registers, no class token", "distilled", "rotary query")


def parameter_groups(model: nn.Module, **settings: Any) -> list[Any]:
    """Lists what timm's optimiser does to each parameter, by the host's own names."""
    names = {each: name.removeprefix("host.") for name, each in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, **settings)
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
    return sorted(
        (sorted(names[each] for each in group["params"]), group["weight_decay"], group["lr_scale"])
        for group in optimizer.param_groups
    )


@pytest.mark.parametrize("name", [*GROUPED, "levit"])
@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.7}], ids=["plain", "by layer"])
def test_timm_groups_parameters_as_those_of_the_dense_model(name: str, settings: dict[str, Any]):
    if name == "levit":
        host = timm.create_model("levit_128s", num_classes=3, img_size=64).eval()
    else:
        host = HOSTS[name].build()
    slimmed = patchslim.slim(host, "tome", keep_rate=0.9, at=(0,))
    wanted = parameter_groups(host, **settings)
    assert len(wanted) > 1
    assert parameter_groups(slimmed, **settings) == wanted


@pytest.mark.parametrize("coarse", [False, True])
def test_matchers_name_the_parameters_of_the_slimmed_model(vit: Any, coarse: Any):
    from timm.models import group_parameters

    wanted = group_parameters(vit, vit.group_matcher(coarse=coarse))
    slimmed = slim_host(vit)
    found = group_parameters(slimmed, slimmed.group_matcher(coarse=coarse))
    assert found == {group: [f"host.{name}" for name in names] for group, names in wanted.items()}


def test_layers_of_a_method_learn_as_the_head_does(vit: Any):
    with pytest.warns(patchslim.errors.Untrained):
        slimmed = patchslim.slim(vit, "dynamicvit", keep_rate=0.7, at=(1,))
    names = {each: name for name, each in slimmed.named_parameters()}
    optimizer = create_optimizer_v2(slimmed, "adamw", lr=0.1, layer_decay=0.5)
    scales = {
        names[each]: group["lr_scale"]
        for group in optimizer.param_groups
        for each in group["params"]
    }
    learned = {scale for name, scale in scales.items() if name.startswith("method.")}
    assert learned == {scales["host.head.weight"]} == {1.0}


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "pit_ti_distilled_224"])
def test_both_heads_learn_in_timms_task_of_token_distillation(name: str):
    task = pytest.importorskip("timm.task", reason="an older timm has no tasks")
    settings = {"depth": 2} if name.startswith("deit") else {}
    host = timm.create_model(name, img_size=96, num_classes=7, **settings).eval()
    teacher = timm.create_model("test_vit", img_size=96, num_classes=7)
    slimmed = patchslim.slim(host, "tome", keep_rate=0.7, at=(1,)).train()
    learning = task.TokenDistillationTask(slimmed, teacher, nn.CrossEntropyLoss(), verbose=False)
    images = torch.randn(2, 3, 96, 96)
    learning(images, torch.tensor([1, 4]))["loss"].backward()
    assert host.head.weight.grad.any()
    assert host.head_dist.weight.grad.any()


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_dense_model_are_loaded_into_the_host(vit: Any, tmp_path: Path, strict: Any):
    from timm.models import load_checkpoint

    slimmed, file = slim_host(vit), str(tmp_path / "dense.pth")
    torch.save({name: torch.zeros_like(each) for name, each in vit.state_dict().items()}, file)
    with pytest.raises(BadFile, match=r"names of the dense model.*\.host"):
        load_checkpoint(slimmed, file, strict=strict)
    load_checkpoint(slimmed.host, file, strict=strict)
    assert not vit.head.weight.any()
    slimmed.load_state_dict(slimmed.state_dict())


def test_weights_of_the_dense_model_do_not_pass_by_a_slimmed_part(vit: Any):
    whole = nn.ModuleDict({"encoder": vit})
    dense = whole.state_dict()
    whole["encoder"] = slim_host(vit)
    with pytest.raises(BadFile, match=r"names of the dense model \(encoder\.cls_token"):
        whole.load_state_dict(dense, strict=False)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("get_intermediate_layers", r"slimmed\.forward_intermediates"),
        ("prune_intermediate_layers", "before it is slimmed"),
        ("set_input_size", "before it is slimmed"),
        ("load_pretrained", r"slimmed\.host"),
        ("blocks", r"\.host"),
    ],
)
def test_what_a_slimmed_model_lacks_says_what_to_call(vit: Any, name: str, cure: str):
    slimmed = slim_host(vit)
    assert not hasattr(slimmed, name)
    with pytest.raises(AttributeError, match=f"SlimModel has no '{name}'.*{cure}"):
        getattr(slimmed, name)


@pytest.mark.parametrize("n", [1, 2, (0, 2)])
def test_the_call_instead_of_intermediate_layers_gives_the_same(vit: Any, n: Any):
    slimmed, images = patchslim.slim(vit, "identity"), random_images(vit)
    with torch.no_grad():
        wanted = vit.get_intermediate_layers(images, n)
        got = slimmed.forward_intermediates(images, n, output_fmt="NLC", intermediates_only=True)
        reduced = slim_host(vit).forward_intermediates(
            images, n, output_fmt="NLC", intermediates_only=True
        )
    assert all(is_close(*each) for each in zip(got, wanted, strict=True))
    assert [each.shape for each in reduced] == [each.shape for each in wanted]


def test_a_host_of_another_size_is_slimmed_again():
    host = timm.create_model("test_vit", num_classes=3, img_size=96).eval()
    slimmed = patchslim.slim(host, "tome", macs=0.7)
    slimmed.host.set_input_size((64, 64))
    again = patchslim.slim(slimmed.host, "tome", macs=0.7)
    assert again(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def trace_by_fx(model: nn.Module) -> None:
    torch.fx.symbolic_trace(model)


def trace_features(model: nn.Module) -> None:
    from timm.models._features_fx import create_feature_extractor

    create_feature_extractor(model, {"host.norm": "features"})


@pytest.mark.parametrize("trace", [trace_by_fx, trace_features])
@pytest.mark.parametrize("inside", [False, True])
def test_fx_is_refused_with_what_to_call(vit: Any, trace: Any, inside: Any):
    slimmed = slim_host(vit)
    with pytest.raises(WrongExport, match=r"torch\.fx.*torch\.export.*forward_intermediates"):
        trace(nn.Sequential(slimmed) if inside else slimmed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused_with_what_to_call(vit: Any, inside: Any):
    slimmed = slim_host(vit)
    with pytest.raises(WrongExport, match=r"torch\.jit\.script.*patchslim\.export"):
        torch.jit.script(nn.Sequential(slimmed) if inside else slimmed)
