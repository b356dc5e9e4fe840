"""Every architecture variant that timm's registry builds with our two families, made small.

The registry's own functions are called with the constructors of the host classes replaced by one
that notes its arguments and stops. Arguments that only set a scale (depth, width, image, number of
classes ...) are dropped; names whose other arguments agree are one variant. `python
tests/timm_variants.py` prints how many there are and compares each with its host. It knows nothing
of methods.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import resnet, resnetv2, vision_transformer_hybrid, vitamin
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchslim.hosts._registry import load_library

HOSTS: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled, Eva)
DEFAULTS = {cls: inspect.signature(cls).parameters for cls in (VisionTransformer, Eva)}
DEFAULTS[VisionTransformerDistilled] = DEFAULTS[VisionTransformer]
GRID = (4, 5)  # not square, so that height and width cannot be confused
STEM_GRID = (2, 3)  # for hosts with a convolutional stem, whose images are larger
PATCH, WIDTH, HEADS, DEPTH, CLASSES = 4, 32, 4, 3, 7

# What only sets the scale: dropped from the comparison, or compared as given or not given.
SCALE_ARGUMENTS = """
img_size in_chans num_classes embed_dim depth num_heads mlp_ratio rope_temperature
swiglu_align_to head_init_scale weight_init fix_init rope_rescale_coords""".split()
SWITCH_ARGUMENTS = (
    "init_values ref_feat_shape attn_pool_num_heads attn_pool_mlp_ratio num_kv_heads".split()
)


@dataclass(frozen=True, eq=False)
class Variant:
    """One architecture variant: how to build it small, and the registered names that are it.

    `prepare` is done to the built host before its weights are drawn.
    """

    label: str
    host: type[nn.Module]
    args: Mapping[str, Any]
    names: tuple[str, ...] = ()
    prepare: Callable[[Any], object] | None = None
    dtype: torch.dtype = torch.float32

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            host = self.host(**shrink_arguments(self.args))
        if self.prepare is not None:
            self.prepare(host)
        randomise(host)
        return host.eval().to(self.dtype)

    @property
    def prefix(self) -> int:
        """How many rows of the host are not patches."""
        if self.host is VisionTransformerDistilled:
            return 2
        registers = self.args.get("reg_tokens", 0) + self.args.get("num_reg_tokens", 0)
        return int(self.args.get("class_token", True)) + int(registers)

    def __str__(self) -> str:
        return self.label


class ArgumentsRecorded(Exception):
    """Stops a constructor; carries the class and the arguments."""


@contextlib.contextmanager
def recording_arguments() -> Iterator[None]:
    """Lets constructors of the host classes note their arguments and stop."""
    originals = {cls: cls.__init__ for cls in HOSTS}

    def note(self: nn.Module, **kwargs: Any) -> None:
        raise ArgumentsRecorded(type(self), kwargs)

    try:
        for cls in HOSTS:
            cls.__init__ = note  # type: ignore[method-assign]
        yield
    finally:
        for cls, original in originals.items():
            cls.__init__ = original  # type: ignore[method-assign]


def candidate_names() -> list[str]:
    """Lists names that a module, timm's or our own, registers with one of the host classes.

    Our own architectures are registered first, so that the names are the same whatever a test
    file has imported before.
    """
    load_library("timm").import_library()
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    knowing = {
        module
        for module in set(modules.values())
        if any(cls is value for cls in HOSTS for value in vars(sys.modules[module]).values())
    }
    return [
        name
        for name in sorted(modules, key=lambda name: (modules[name], name))
        if modules[name] in knowing
    ]


def record_arguments(name: str) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """Finds the host class that a name builds, and its arguments; None for another class."""
    try:
        with torch.device("meta"):
            timm.create_model(name)
    except ArgumentsRecorded as result:
        host, args = result.args
        return host, args
    return None


@functools.cache
def registered_variants() -> tuple[Variant, ...]:
    """Lists all variants of timm's registry, largest group first."""
    groups: dict[Any, list[str]] = {}
    first: dict[Any, tuple[type[nn.Module], dict[str, Any]]] = {}
    with recording_arguments(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in candidate_names():
            result = record_arguments(name)
            if result is not None:
                key = variant_key(*result)
                groups.setdefault(key, []).append(name)
                first.setdefault(key, result)
    ordered = sorted(groups, key=lambda key: (-len(groups[key]), groups[key]))
    return tuple(Variant(groups[key][0], *first[key], names=tuple(groups[key])) for key in ordered)


def variant_key(
    host: type[nn.Module], args: Mapping[str, Any]
) -> tuple[str, frozenset[tuple[str, str]]]:
    """Makes what identifies a variant: its class, and arguments but scale and defaults."""
    defaults = DEFAULTS[host]
    parts = set()
    for name, value in args.items():
        plain = name == "patch_size" and "embed_layer" not in args
        if (
            name in SCALE_ARGUMENTS
            or plain
            or canonical(value) == canonical(defaults[name].default)
        ):
            continue
        parts.add((name, "given" if name in SWITCH_ARGUMENTS else canonical(value)))
    return host.__name__, frozenset(parts)


def canonical(value: Any) -> str:
    """Returns a layer's name without its epsilon, a stem's stages, or anything else as text."""
    if isinstance(value, functools.partial):
        inner = {name: v for name, v in value.keywords.items() if name != "eps"}
        shown = ",".join(f"{name}={canonical(v)}" for name, v in sorted(inner.items()))
        return canonical(value.func) + (f"({shown})" if shown else "")
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}{len(stem_stages(value))}"
    name = getattr(value, "__name__", None) or (value if isinstance(value, str) else repr(value))
    plain = str(name).lower().replace("_", "")
    return "none" if plain in ("layernorm", "gelu", "none") else plain


def stem_stages(stem: nn.Module) -> list[str]:
    """Lists the stages of a convolutional stem by name."""
    return [name for name, _ in getattr(stem, "stages", stem).named_children()]


def shrink_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the arguments of the same variant at a small scale."""
    less = {**args, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    less["num_classes"] = CLASSES if args.get("num_classes", CLASSES) else 0
    if "embed_layer" in args:
        less["embed_layer"], ratio = shrink_stem(args["embed_layer"])
        ratio *= int(args["patch_size"])
        less["img_size"] = (STEM_GRID[0] * ratio, STEM_GRID[1] * ratio)
    else:
        less |= {"patch_size": PATCH, "img_size": (GRID[0] * PATCH, GRID[1] * PATCH)}
    shrunk = {"attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 3.0, "init_values": 0.1}
    less |= {name: value for name, value in shrunk.items() if args.get(name) is not None}
    if isinstance(args.get("num_kv_heads"), tuple):
        less["num_kv_heads"] = (HEADS, HEADS // 2, 1)
    elif args.get("num_kv_heads") is not None:
        less["num_kv_heads"] = HEADS // 2
    return less


def shrink_stem(embed: functools.partial[nn.Module]) -> tuple[Any, int]:
    """Makes a narrow, shallow stem of the same kind; says by how much it shrinks an image."""
    stem = embed.keywords["backbone"]
    match type(stem).__name__:
        case "ResNetV2":
            conv = functools.partial(vision_transformer_hybrid.StdConv2dSame, eps=1e-8)
            less: nn.Module = resnetv2.ResNetV2(
                layers=[1] * len(stem_stages(stem)),
                channels=(128,) * len(stem_stages(stem)),
                stem_chs=32,
                num_classes=0,
                global_pool="",
                preact=False,
                stem_type="same",
                conv_layer=conv,
            )
        case "FeatureListNet":
            last = len([name for name in stem_stages(stem) if name.startswith("layer")])
            less = resnet.resnet26d(
                features_only=True,
                out_indices=[last],
                block=resnet.BasicBlock,
                layers=(1, 1, 1, 1),
                channels=(8, 8, 16, 16),
                stem_width=8,
            )
        case "MbConvStages":
            less = vitamin.MbConvStages(
                vitamin.VitCfg(embed_dim=(8, 16, WIDTH), depths=(1, 1, 1), stem_width=8)
            )
        case "ConvStem":
            less = vision_transformer_hybrid.ConvStem(
                channels=(8, 8, WIDTH),
                stride=(4, 2, 2),
                kernel_size=(4, 2, 2),
                padding=0,
                act_layer=nn.GELU,
            )
        case _:  # the stem of ResNetV2 is already small
            less = vision_transformer_hybrid._resnetv2(layers=())
    with torch.no_grad():
        result = less.eval()(torch.zeros(1, 3, 64, 64))
    out: Tensor = result[-1] if isinstance(result, list | tuple) else result
    rest = {name: value for name, value in embed.keywords.items() if name != "backbone"}
    return functools.partial(embed.func, backbone=less, **rest), 64 // out.shape[-1]


def randomise(host: nn.Module, seed: int = 0) -> None:
    """Draws weights under which no part of the model can be left out unnoticed."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*host.named_parameters(), *host.named_buffers()]:
            if not p.is_floating_point() or "rope" in name or "inv_freq" in name:
                continue
            value = torch.randn(p.shape, generator=noise, dtype=torch.float32)
            leaf = name.rpartition(".")[2]
            if p.ndim >= 2 and p.shape[0] > 1:
                value *= 1.3 * p[0].numel() ** -0.5
            elif "lambda" in leaf or p.ndim >= 2 or "bias" in leaf or leaf == "running_mean":
                value *= 0.4
            elif leaf == "running_var":
                value = 0.5 + value.abs()
            else:
                value = 1.0 + 0.4 * value
            p.copy_(value)


def tiny_vit(**args: Any) -> Any:
    """Makes a small VisionTransformer with these arguments."""
    return Variant("tiny", VisionTransformer, args).build()


def random_images(host: Any, batch: int = 2, *, seed: int = 1) -> Tensor:
    """Makes random images that fit the host."""
    parameter = next(host.parameters())
    size = host.patch_embed.img_size
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(batch, host.in_chans, *size, generator=noise).to(parameter.dtype)


def identity_error(host: Any, x: Tensor) -> float:
    """Computes how far a host differs from itself slimmed with nothing removed."""
    import patchslim
    from patchslim.hosts._answers import relative_difference

    logits = patchslim.find_adapter(host).logits
    with torch.no_grad():
        got, wanted = logits(patchslim.slim(host, "identity")(x)), logits(host(x))
    return relative_difference(got.double(), wanted.double())


def summary_line(what: str, off: list[float]) -> str:
    """Says in one line how many hosts were compared and how they came out."""
    equal = sum(each == 0 for each in off)
    return f"{what}: keep-everything is bit-equal on {equal}, within {max(off):.1g} on all."


def main() -> None:
    """Prints how many names map to how many variants, and the identity law on each."""
    import transformers

    from hf_hosts import HF_HOSTS, random_pixels
    from timm_options import OPTIONS

    torch.set_num_threads(1)
    variants = registered_variants()
    for variant in variants:
        print(f"{len(variant.names):4d} names  {variant.host.__name__:26s} {variant.label}")  # noqa: T201
    names = sum(len(variant.names) for variant in variants)
    hosts = [variant.build() for variant in variants]
    off = [identity_error(host, random_images(host)) for host in hosts]
    print(summary_line(f"timm {timm.__version__}: {names} names -> {len(variants)} variants", off))  # noqa: T201
    off = [identity_error(host, random_images(host)) for host in (each.build() for each in OPTIONS)]
    print(summary_line(f"{len(OPTIONS)} further options of the two families", off))  # noqa: T201
    off = [
        identity_error(host, random_pixels(host)) for host in (each.build() for each in HF_HOSTS)
    ]
    print(  # noqa: T201
        summary_line(f"transformers {transformers.__version__}: {len(HF_HOSTS)} kinds of host", off)
    )


if __name__ == "__main__":
    main()
