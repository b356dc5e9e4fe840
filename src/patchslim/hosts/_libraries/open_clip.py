"""open_clip: image towers by the name of their CLIP, as in `ViT-B-32.laion2b_s34b_b79k`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import PatchslimError, UnknownName
from patchslim.hosts._library import Library, build_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchslim.hosts._adapter import Adapter

# How open_clip resizes, in the words of `Preprocessing`.
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
TOWER = "visual."  # how names of the image tower's weights begin in the file of a whole model
# Entries of a configuration with which the image tower is not open_clip's own VisionTransformer.
OTHER_TOWERS = ("timm_model_name", "hf_model_name")


class OpenClip(Library):
    """open_clip's models, of each the image tower."""

    name: ClassVar[str] = "open_clip"
    distribution: ClassVar[str] = "open_clip_torch"
    oldest: ClassVar[tuple[int, ...]] = (3, 0)
    extra: ClassVar[str | None] = "open_clip"
    hint: ClassVar[str] = "a name of open_clip's (ViT-B-32), which means its image tower"
    builds_by_name: ClassVar[bool] = True
    image_size_setting: ClassVar[str | None] = "force_image_size"

    def names(self) -> list[str]:
        """Lists all models that open_clip has a configuration of."""
        names: list[str] = self.import_library().list_models()
        return names

    def has_name(self, name: str) -> bool:
        """Tells whether open_clip has the model, whatever weights are named behind the dot."""
        return name.partition(".")[0] in self.names()

    def served_names(self, adapter: Adapter) -> list[str]:
        """Lists the models whose image tower is open_clip's own VisionTransformer."""
        library = self.import_library()
        towers = {name: library.get_model_config(name)["vision_cfg"] for name in self.names()}
        return [name for name, tower in towers.items() if _is_own_tower(tower)]

    def build(
        self,
        name: str,
        *,
        pretrained: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Builds the image tower alone; with `pretrained`, all of the model, whose weights are one.

        `ViT-B-32.laion2b_s34b_b79k` names weights, which `pretrained` fetches.
        """
        library = self.import_library()
        model, _, tag = name.partition(".")
        known = library.list_pretrained_tags_by_model(model)
        if tag and tag not in known:
            raise UnknownName.of("weights", name, [f"{model}.{each}" for each in known])
        if pretrained and not tag:
            raise PatchslimError(
                f"open_clip has no default weights. Name them behind a dot: one of "
                f"{', '.join(f'{model}.{each}' for each in known) or 'none for this model'}."
            )
        inner = library.get_model_config(model)["vision_cfg"].get("timm_model_name")
        if inner is not None:
            raise PatchslimError(
                f"The image tower of {model} is timm's {inner}. Give that name; or in Python, "
                "model.visual.trunk = patchslim.slim(model.visual.trunk, ...)."
            )
        given = dict(settings or {})
        try:
            if pretrained:
                whole: Any = library.create_model(model, pretrained=tag, **given)
                tower: nn.Module = whole.visual
                return tower
            return _build_tower(library, model, tag, given)
        except Exception as error:  # a library may raise anything at the settings of a user
            failure = build_error(self.name, name, error)
            raise PatchslimError(
                f"{failure} Without a network, give --weights FILE." if pretrained else str(failure)
            ) from error

    def rename_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the image tower's weights out of the file of a whole model."""
        whole = any(name.startswith(TOWER) for name in state)
        return {
            name.removeprefix(TOWER): value
            for name, value in state.items()
            if name.startswith(TOWER) or not whole
        }

    def setting_names(self, name: str) -> frozenset[str]:
        """The arguments of `create_model` that change the architecture of the image tower."""
        return frozenset({"force_image_size", "force_quick_gelu"})

    def read_preprocessing(self, host: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Reads the values that open_clip keeps on the image tower; nothing if it keeps none."""
        config = getattr(host, "preprocess_cfg", None)
        if not config:
            return {}
        return {
            "mean": config["mean"],
            "std": config["std"],
            "crop_pct": 1.0,
            "interpolation": config.get("interpolation", "bicubic"),
            "crop_mode": CROP_MODES[config.get("resize_mode", "shortest")],
        }


def _build_tower(library: Any, model: str, tag: str, given: Mapping[str, Any]) -> nn.Module:
    """Builds the image tower of a model with random weights, and fetches nothing for its text."""
    from dataclasses import asdict

    config = library.get_model_config(model)
    vision = dict(config["vision_cfg"])
    vision["image_size"] = given.get("force_image_size") or vision["image_size"]
    quick = bool(given.get("force_quick_gelu", config.get("quick_gelu", False)))
    tower: nn.Module = library.model._build_vision_tower(config["embed_dim"], vision, quick)
    preparing = asdict(library.transform.PreprocessCfg(size=vision["image_size"]))
    said = library.get_pretrained_cfg(model, tag) if tag else {}
    known = {name: said[name] for name in preparing if said.get(name) is not None}
    library.model.set_model_preprocess_cfg(tower, {**preparing, **known})
    return tower


def _is_own_tower(tower: Mapping[str, Any]) -> bool:
    """Tells whether a configuration describes open_clip's own VisionTransformer, and is served."""
    is_resnet = isinstance(tower.get("layers"), list | tuple)
    pools_by_query = bool(tower.get("attentional_pool"))
    return not is_resnet and not pools_by_query and not any(map(tower.get, OTHER_TOWERS))
