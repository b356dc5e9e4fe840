"""torchvision: hosts by name, with the name of their weights, as in `vit_b_16.IMAGENET1K_V1`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import PatchslimError, UnknownName
from patchslim.hosts._building import class_arguments
from patchslim.hosts._library import Library, build_error, crop_share, has_served_class

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchslim.hosts._adapter import Adapter

# torchvision's models do not keep which weights they have. A host that is built here does, under
# this attribute, as torchvision prints it: "ViT_B_16_Weights.IMAGENET1K_V1".
WEIGHTS_ATTRIBUTE = "pretrained_weights"
# Arguments of the factories that are given in another way: in the model's name, by --pretrained.
TAKEN_ARGUMENTS = ("weights", "pretrained", "progress")


class Torchvision(Library):
    """torchvision's classification models."""

    name: ClassVar[str] = "torchvision"
    distribution: ClassVar[str] = "torchvision"
    oldest: ClassVar[tuple[int, ...]] = (0, 21)
    extra: ClassVar[str | None] = "torchvision"
    hint: ClassVar[str] = "a name of torchvision's (vit_b_16)"
    builds_by_name: ClassVar[bool] = True
    image_size_setting: ClassVar[str | None] = "image_size"

    def names(self) -> list[str]:
        """Lists the classification models in torchvision's registry."""
        models = self._import_models()
        names: list[str] = models.list_models(module=models)
        return names

    def has_name(self, name: str) -> bool:
        """Tells whether torchvision has the model, whatever weights are named behind the dot."""
        return name.partition(".")[0] in self.names()

    def served_names(self, adapter: Adapter) -> list[str]:
        """Lists models whose module has a class that the family serves."""
        models = self._import_models()
        modules = {name: models.get_model_builder(name).__module__ for name in self.names()}
        return [name for name, module in modules.items() if has_served_class(module, adapter)]

    def build(
        self,
        name: str,
        *,
        pretrained: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Calls the model's factory, at the image size of the weights that are named.

        `vit_b_16.IMAGENET1K_SWAG_E2E_V1` names weights; `pretrained` fetches these, and without a
        name torchvision's default ones. The host notes which weights it has either way.
        """
        models = self._import_models()
        model, _, weights = name.partition(".")
        given = dict(settings or {})
        for taken in TAKEN_ARGUMENTS:
            if taken in given:
                raise PatchslimError(
                    f"{model} takes no setting {taken!r} here. Name the weights behind a dot, as "
                    f"in {model}.IMAGENET1K_V1, and give --pretrained to have them fetched."
                )
        entry = _find_weights(models.get_model_weights(model), model, weights, pretrained)
        if entry is not None and not pretrained:
            given.setdefault("image_size", entry.meta["min_size"][0])
        builder = models.get_model_builder(model)
        try:
            host: nn.Module = builder(
                weights=entry if pretrained else None, progress=False, **given
            )
        except Exception as error:  # a library may raise anything at the settings of a user
            host_class = vars(models.vision_transformer)["VisionTransformer"]
            failure = build_error(self.name, name, error, host_class)
            if isinstance(error, OSError):
                raise PatchslimError(
                    f"{failure} Without a network, give --weights FILE."
                ) from error
            raise failure from error
        if entry is not None:
            setattr(host, WEIGHTS_ATTRIBUTE, str(entry))
        return host

    def setting_names(self, name: str) -> frozenset[str]:
        """The arguments of the models in the module that registers the name."""
        module = sys.modules[
            self._import_models().get_model_builder(name.partition(".")[0]).__module__
        ]
        every = [found for found in vars(module).values() if isinstance(found, type)]
        return class_arguments(cls for cls in every if cls.__module__ == module.__name__)

    def settings_from_weights(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Counts classes by the classifier's rows; also the width of a layer before it."""
        rows = {
            "num_classes": "heads.head.weight",
            "representation_size": "heads.pre_logits.weight",
        }
        return {setting: len(state[name]) for setting, name in rows.items() if name in state}

    def rename_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the layers of the feed-forward: torchvision's own files have older names."""
        places = {"1": "0", "2": "3"}
        return {
            re.sub(r"\.mlp\.linear_([12])\.", lambda old: f".mlp.{places[old[1]]}.", name): value
            for name, value in state.items()
        }

    def read_preprocessing(self, host: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Reads the transforms of the host's weights; nothing if it does not say which it has."""
        name = getattr(host, WEIGHTS_ATTRIBUTE, None)
        if name is None:
            return {}
        preset = self._import_models().get_weight(name).transforms()
        return {
            "mean": preset.mean,
            "std": preset.std,
            "crop_pct": crop_share(preset.crop_size[0], preset.resize_size[0]),
            "interpolation": preset.interpolation.value,
            "crop_mode": "center",
        }

    def _import_models(self) -> Any:
        """Imports the module `torchvision.models`."""
        return self.import_library().models


def _find_weights(every: Any, model: str, name: str, pretrained: bool) -> Any:  # noqa: FBT001
    """Finds the weights called `name`; the default ones for a pretrained model."""
    if not name:
        return every.DEFAULT if pretrained else None
    if name not in every.__members__:
        known = [f"{model}.{each}" for each in every.__members__]
        raise UnknownName.of("weights", f"{model}.{name}", known)
    return every[name]
