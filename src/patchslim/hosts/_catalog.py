"""Hosts by name: the embedded example, models that a library builds, and folders of models.

It knows no library by name: the files of `_libraries` say what each of them has. It fetches nothing
unless asked to. It knows no methods, and nothing of what `saving` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import (
    BadFile,
    MissingExtra,
    OldVersion,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
)
from patchslim.files import resolve_path
from patchslim.hosts._building import check_arguments
from patchslim.hosts._library import Library
from patchslim.hosts._registry import (
    adapter_names,
    find_family_library,
    find_host_library,
    find_libraries,
    library_names,
    load_adapter,
    load_library,
)
from patchslim.hosts._weights import advise_on_bare_weights, check_finite, check_fit, read_weights

EXAMPLE = "digits"
SAVED = "recipe.json"  # the sign of a folder that `SlimModel.save` wrote
# A repository of the Hub as people write it; without a prefix it may be a folder, too.
REPOSITORY = re.compile(
    r"(?P<prefix>hf[-_]hub:|https?://huggingface\.co/)?(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)/?"
)


def model_hint() -> str:
    """Says in one sentence what names a model."""
    hints = ", ".join(library.hint for library in find_libraries())
    return f"A model is {EXAMPLE!r}, {hints}, or a folder saved by patchslim."


def find_host(
    name: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Finds the model called `name`, in evaluation mode.

    Args:
        name: `digits`; a name of a library's, with `library:` before it where two libraries have
            the name; or a folder that a library opens.
        pretrained: whether the library may fetch its pretrained weights.
        weights: a file of weights for a model that is built by name.
        image_size: the side of the images, for a model that is built by name.
        settings: further arguments of the library's factory, such as global_pool="avg".
    """
    given = dict(settings or {})
    if has_own_weights(name):
        if pretrained or weights is not None or given or image_size is not None:
            raise PatchslimError(
                f"{name} comes with its own weights and image size; --pretrained, --weights, "
                "--image-size and --model-kwargs are for models that a library builds by name."
            )
        return _open_local(name).eval()
    library, own_name = find_library_of(name)
    state = None if weights is None else read_weights(weights)
    implied = {} if state is None else library.settings_from_weights(state)
    given = {**implied, **_image_size_setting(library, name, image_size), **given}
    check_arguments(name, given, library.setting_names(own_name))
    host = library.build(own_name, pretrained=pretrained, settings=given)
    if state is not None:
        load_weights(host, state, weights)
    return host.eval()


def has_own_weights(name: str) -> bool:
    """Tells whether a model comes with weights of its own: the embedded example, or a folder."""
    return name == EXAMPLE or resolve_path(name).is_dir()


def has_random_weights(name: str, *, pretrained: bool, weights: Path | None) -> bool:
    """Tells whether `find_host` gives a model whose weights nobody trained."""
    return not (has_own_weights(name) or pretrained or weights is not None)


def build_without_weights(name: str, image_size: int | None = None) -> nn.Module:
    """Builds the model called `name` without any weights, for counting: it takes no memory."""
    if name == EXAMPLE:
        return find_host(name, image_size=image_size)
    with torch.device("meta"):
        if not has_own_weights(name):
            library, own_name = find_library_of(name)
            settings = _image_size_setting(library, name, image_size)
            return library.build(own_name, settings=settings).eval()
        if image_size is None:
            return _open_local(name, weights=False).eval()
    return find_host(name, image_size=image_size)  # which says what a folder cannot be given


def find_library_of(name: str) -> tuple[Library, str]:
    """Finds the library that builds the model called `name`, and what that library calls it.

    `torchvision:vit_b_16` is torchvision's. A name without a prefix is that of the first library
    that has it, in the order of `find_libraries`.
    """
    prefix, colon, own_name = name.partition(":")
    if colon and prefix in library_names():
        library = load_library(prefix)
        if library.builds_by_name and library.has_name(own_name):
            return library, own_name
        raise UnknownName.of(f"{prefix} model", own_name, library.names(), f"Give {library.hint}.")
    missing: MissingExtra | None = None
    known: list[str] = [EXAMPLE]
    for library in find_libraries():
        if not library.builds_by_name:
            continue
        try:
            library.check_version()
        except MissingExtra as error:
            missing = missing or error
            continue
        if library.has_name(name):
            return library, name
        known += library.names()
    if any(mark in name for mark in "/\\"):
        raise BadFile(f"There is no folder {name}. {_advise_on_repository(name)}")
    unknown = UnknownName.of("model", name, known, model_hint())
    raise unknown if missing is None else MissingExtra(f"{missing} Without it: {unknown}")


def _advise_on_repository(name: str) -> str:
    """Says what to give instead of a name on the Hub; else what names a model."""
    match = REPOSITORY.fullmatch(name)
    if match is None:
        return model_hint()
    owner, own_name = match["owner"], match["name"]
    if owner in library_names():
        library = load_library(owner)
        if library.builds_by_name and library.has_name(own_name):
            return (
                f"{owner} builds this model by its name: give {own_name}, with --weights FILE, or "
                "with --pretrained where there is a network."
            )
    is_surely_there = match["prefix"] is not None
    where = "It is a name" if is_surely_there else "If it is a name"
    advice = (
        f"{where} on the Hugging Face Hub: nothing is fetched by it. Download it where there is a "
        f"network, `hf download {owner}/{own_name} --local-dir {own_name}`, and give the folder "
        f"{own_name}."
    )
    return advice if is_surely_there else f"{advice} Otherwise: {model_hint()}"


def served_names(family: str, containing: str = "") -> list[str]:
    """Lists the names under which `find_host` builds models that a family serves.

    A name that a library of lower precedence has, too, gets its prefix: `torchvision:vit_b_16`.
    """
    library = find_family_library(family)
    if not library.builds_by_name:
        return []
    before = find_libraries()
    before = before[: before.index(library)]
    names = [name for name in library.served_names(load_adapter(family)) if containing in name]
    return [
        f"{library.name}:{name}" if any(other.has_name(name) for other in before) else name
        for name in names
    ]


def family_facts(containing: str = "") -> dict[str, dict[str, Any]]:
    """Says of each family that ships its name, the models it serves, and how to name them.

    If the library of a family is missing or too old, `unavailable` says so, with the cure.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name in adapter_names():
        try:
            family, names = load_adapter(name).family, served_names(name, containing)
        except (MissingExtra, OldVersion) as error:
            facts[name] = {"family": name, "names": [], "unavailable": str(error)}
        else:
            hint = find_family_library(name).hint
            facts[name] = {"family": family, "names": names, "hint": hint}
    return facts


def load_weights(host: nn.Module, state: Mapping[str, Tensor], path: Path | None) -> None:
    """Loads all weights of the file `path`, rounded to the types of the host.

    Raises:
        BadFile: they are of another model, of another kind of numbers, or not finite.
    """
    library = find_host_library(host)
    state = dict(state) if library is None else library.rename_weights(dict(state))
    own: dict[str, Tensor] = host.state_dict(keep_vars=True)
    check_fit(path, own, state, type(host).__name__)
    check_finite(path, own, state, keep=False)
    host.load_state_dict(state)


def _open_local(name: str, *, weights: bool = True) -> nn.Module:
    """Opens the embedded example, or the model in a folder."""
    if name == EXAMPLE:
        from patchslim.example.digits import host as example

        trained: nn.Module = example()
        return trained
    folder = resolve_path(name)
    if (folder / SAVED).is_file():
        raise UnsupportedModel(
            f"{folder} is slimmed already, and a dense model is needed here. Give the model that "
            "it was made of."
        )
    opening = [library for library in find_libraries() if library.opens_folders]
    for library in opening:
        if library.is_folder(folder):
            return library.open_folder(folder, weights=weights)
    signs = " nor ".join(library.folder_sign for library in opening)
    raise BadFile(
        f"{folder} holds no model: neither {SAVED} (saved by patchslim) nor {signs}."
        f"{advise_on_bare_weights(folder) or ' ' + model_hint()}"
    )


def _image_size_setting(library: Library, name: str, image_size: int | None) -> dict[str, Any]:
    """Names the setting by which a library learns the side of the images."""
    if image_size is None:
        return {}
    if library.image_size_setting is None:
        raise PatchslimError(f"{name}: {library.name} builds it for one image size; leave it out.")
    return {library.image_size_setting: image_size}
