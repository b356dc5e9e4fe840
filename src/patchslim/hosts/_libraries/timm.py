"""timm: hosts by name, with tags for weights, as in `vit_base_patch16_224.augreg_in21k`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import PatchslimError, UnknownName
from patchslim.hosts._building import NEVER, class_arguments
from patchslim.hosts._library import WHOM_TO_ASK, Library, build_error, has_served_class

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchslim.hosts._adapter import Adapter


# Why models of these modules are not slimmed, in the words that follow "Swin is not slimmed:".
WINDOWS = (
    "it attends in windows, each of which needs all of its cells. Take a model whose tokens attend "
    "to all of the grid: a ViT, or among pyramids a CoAtNet, CAFormer, NesT, Hiera or LeViT."
)
NEIGHBOURS = (
    "between its attentions, convolutions read each token's neighbours, so that every cell has to "
    "be there. Take a model without them: a ViT, or among pyramids a CoAtNet or CAFormer, of which "
    "one stage attends without convolutions."
)
CHANNELS = (
    "its attention is between channels and not between tokens, so its cost grows with tokens as "
    "that of a convolution, and convolutions need every cell. Take a ViT, DeiT or CaiT."
)
POOLED_KEYS = (
    "its attention pools keys and values over the grid, which needs every cell. Take a model whose "
    "tokens attend to all others: a ViT, CoAtNet or CAFormer."
)
BRANCHES = (
    "its tokens are kept in two sequences that exchange what they know, and one of them cannot be "
    "made shorter alone. Take a ViT or DeiT."
)
LATE = (
    "it attends in its last blocks alone, to the 49 tokens that are left there, so that there is "
    "next to nothing to save. Take a ViT, or among pyramids a CoAtNet or CAFormer."
)
CONVOLUTIONS = (
    "it is a convolutional network, with attention in few layers or over channels, and "
    "convolutions need every cell. Take a vision transformer, or a CoAtNet or CAFormer."
)
TWO_MAPS = (
    "its attention adds a map by position to that by content after the softmax, which is not "
    "served yet. Take a ViT or DeiT."
)
NOT_YET = (
    "its stages are not served yet. Take a pyramid that is: a CoAtNet, CAFormer, NesT or Hiera."
)
NO_TOKENS = (
    "it has no attention over tokens, so there are none to remove. Take a vision transformer: "
    "`patchslim models` lists those that are served."
)
REASONS = {
    module: reason
    for reason, modules in {
        WINDOWS: "swin_transformer_v2_cr davit gcvit hieradet_sam2 vision_transformer_sam",
        NEIGHBOURS: """cpubone csatv2 efficientformer_v2 efficientvit_msra fastvit
            focalnet iformer lowformer mobilenetv5 mobilevit nextvit repvit shvit swiftformer
            tiny_vit""",
        CHANNELS: "edgenext efficientvit_mit xcit",
        POOLED_KEYS: "coat mvitv2 pvt_v2 twins",
        BRANCHES: "crossvit tnt",
        LATE: "efficientformer",
        CONVOLUTIONS: "byobnet cspnet efficientnet mobilenetv3 nfnet resnet vovnet",
        TWO_MAPS: "convit",
        NOT_YET: "visformer",
    }.items()
    for module in modules.split()
}


class Timm(Library):
    """timm, and the hosts of `patchslim.architectures` that are in its registry."""

    name: ClassVar[str] = "timm"
    distribution: ClassVar[str] = "timm"
    oldest: ClassVar[tuple[int, ...]] = (1, 0, 26)
    hint: ClassVar[str] = "a name of timm's (`patchslim models` lists them)"
    precedence: ClassVar[int] = 0
    builds_by_name: ClassVar[bool] = True
    image_size_setting: ClassVar[str | None] = "img_size"

    def import_library(self) -> Any:
        """Imports timm, whose registry knows our own architectures too."""
        timm = super().import_library()
        import patchslim.architectures.evo_levit  # noqa: F401 (registers them)

        return timm

    def refusal_reason(self, host: nn.Module) -> str | None:
        """Says what stands between the tokens of a host and a shorter sequence."""
        package, _, module = type(host).__module__.rpartition(".")
        if package != "timm.models":
            return None
        attends = any("attn" in name for name, _ in host.named_modules())
        return REASONS.get(module) if attends else NO_TOKENS

    def names(self) -> list[str]:
        """Lists all names in timm's registry."""
        names: list[str] = self.import_library().list_models()
        return names

    def has_name(self, name: str) -> bool:
        """Tells whether timm knows the name, with a tag or without."""
        return bool(self.import_library().is_model(name))

    def served_names(self, adapter: Adapter) -> list[str]:
        """Lists names that timm registers from a module with a class that the family serves."""
        timm = self.import_library()
        modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
        served = {each for each in set(modules.values()) if has_served_class(each, adapter)}
        beginnings = getattr(adapter, "names_served", ("",))
        return [
            name
            for name, module in modules.items()
            if module in served and name.startswith(beginnings)
        ]

    def build(
        self,
        name: str,
        *,
        pretrained: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Calls `timm.create_model`."""
        timm = self.import_library()
        try:
            host: nn.Module = timm.create_model(name, pretrained=pretrained, **(settings or {}))
        except Exception as error:  # a library may raise anything at the settings of a user
            if "tag" in str(error):
                tags = timm.list_pretrained(f"{name.partition('.')[0]}*")
                raise UnknownName.of("pretrained tag", name, tags) from error
            raise _build_error(timm, name, error, pretrained=pretrained) from error
        return host

    def setting_names(self, name: str) -> frozenset[str]:
        """The arguments of the models in the module that registers the name.

        Entries of a configuration there are arguments, too (`NaFlexVitCfg`, `MaxxVitCfg`).
        """
        module = sys.modules[
            self.import_library().model_entrypoint(name.partition(".")[0]).__module__
        ]
        every = [found for found in vars(module).values() if isinstance(found, type)]
        configured = {
            f"{part}{field.name}"
            for cls in every
            if dataclasses.is_dataclass(cls)
            for part in ("", "conv_", "transformer_")
            for field in dataclasses.fields(cls)
        }
        classes = [cls for cls in every if hasattr(cls, "forward_features")]
        return class_arguments(classes) | (frozenset(configured) - NEVER)

    def settings_from_weights(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Counts the classes: the rows of the classifier."""
        for classifier in ("head.weight", "head.linear.weight"):
            if classifier in state:
                return {"num_classes": len(state[classifier])}
        return {}

    def read_preprocessing(self, host: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Reads the values of `pretrained_cfg`; nothing if it does not normalise."""
        from timm.data import resolve_model_data_config

        if not (getattr(host, "pretrained_cfg", None) or {}).get("mean"):
            return {}
        config = resolve_model_data_config(host)
        names = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
        return {name: config[name] for name in names}

    def describe_saved(
        self, host: nn.Module, images: Mapping[str, Any] | None
    ) -> dict[str, dict[str, Any]]:
        """Says whom to ask in place of an architecture."""
        return {"config.json": {"architecture": WHOM_TO_ASK}}


def _build_error(timm: Any, name: str, error: Exception, *, pretrained: bool) -> PatchslimError:
    """Makes the error for a model that timm could not build; it knows the model's settings."""
    module = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    named = re.match(r"(\w+)\.__init__\(\)", str(error))
    cls = getattr(module, named[1], None) if named else None
    failure = build_error("timm", name, error, cls)
    if pretrained and not isinstance(failure, UnknownName):
        return PatchslimError(f"{failure} Without a network, give --weights FILE.")
    return failure
