"""`Library`: all that the package knows of one library of models.

Where hosts of the library come from, how they are named, built, listed, and how their images are
prepared. A library is one file in `patchslim/hosts/_libraries`, named as the module that is
imported (`timm.py` for `import timm`). Nothing else names it: the command line, `patchslim models`,
preprocessing, version checks, saving and loading ask this class.

A library whose models are built by name fills in the attributes and four methods:

    class Zoo(Library):
        name = "zoo"
        distribution = "zoo-models"
        oldest = (2, 1)
        extra = "zoo"
        hint = "a name of zoo's"
        builds_by_name = True
        image_size_setting = "side"

        def names(self):
            return self.import_library().list_models()

        def build(self, name, *, pretrained=False, settings=None):
            return self.import_library().create(name, pretrained=pretrained, **(settings or {}))

        def served_names(self, adapter):
            return [name for name in self.names() if adapter.serves(...)]

        def read_preprocessing(self, host, image_size):
            return {"mean": host.mean, "std": host.std}

No library is imported before a method needs it: importing this module, or the files of
`_libraries`, imports neither them nor torch. Code that comes with a model is never run.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import BrokenLaw, PatchslimError, UnknownName
from patchslim.guides import locate_guide
from patchslim.versions import check_version, installed_version

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchslim.hosts._adapter import Adapter


# What a library has to define, by the attribute that says that it does.
PROMISES = {"builds_by_name": ("build", "names"), "opens_folders": ("is_folder", "open_folder")}

# What stands in a saved folder where another library looks for the kind of a model.
WHOM_TO_ASK = "slimmed by patchslim: open it with patchslim.load(path)"


class Library(ABC):
    """One library of models.

    Attributes:
        name: the module that is imported, which is also the prefix in `torchvision:vit_b_16` and
            the first part of the names of its families' files.
        distribution: what `pip install` calls it.
        oldest: the oldest version that is tested; () for a package without versions, such as a
            folder on the path.
        extra: the extra of patchslim that installs it, or None where patchslim itself needs it.
        hint: what to give on the command line, as it stands after "A model is".
        precedence: where two libraries have a model of one name, the name without a prefix means
            that of the library with the lower number; among equals the alphabet decides.
        builds_by_name: whether it has models by name (`names`, `build`).
        opens_folders: whether it has models in folders (`is_folder`, `open_folder`).
        folder_sign: the file that such a folder has, for messages.
        image_size_setting: the argument of `build` that sets the side of the images, if any.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    oldest: ClassVar[tuple[int, ...]]
    extra: ClassVar[str | None] = None
    hint: ClassVar[str]
    precedence: ClassVar[int] = 1
    builds_by_name: ClassVar[bool] = False
    opens_folders: ClassVar[bool] = False
    folder_sign: ClassVar[str] = ""
    image_size_setting: ClassVar[str | None] = None

    def check_definition(self) -> None:
        """Raises BrokenLaw where the library says that it can do something and does not define it.

        Called once, where the library's file is loaded.
        """
        for promise, needed in PROMISES.items():
            lacking = [each for each in needed if getattr(type(self), each) is vars(Library)[each]]
            if getattr(self, promise) and lacking:
                raise BrokenLaw(
                    f"{inspect.getfile(type(self))} says {promise} = True and does not define "
                    f"{', '.join(f'{each}()' for each in lacking)}. What they give: "
                    f"{locate_guide('adding-a-family')}"
                )

    def check_version(self) -> None:
        """Raises MissingExtra or OldVersion, with the pip command, unless the library will do."""
        check_version(self.distribution, self.oldest, self.extra, self.name)

    def installed_version(self) -> str | None:
        """Reads the version that is installed, or None."""
        return installed_version(self.distribution)

    def import_library(self) -> Any:
        """Imports the module, after checking its version."""
        self.check_version()
        return importlib.import_module(self.name)

    def refusal_reason(self, host: nn.Module) -> str | None:
        """Says why a host that no family serves has no tokens to reduce, or none exactly.

        It is a whole sentence or two, and says what to take instead; None where nothing is known.
        """
        return None

    # ------------------------------------------------------------------------- models by name

    def names(self) -> list[str]:
        """Lists the names of all models that the library builds, served or not."""
        return []

    def has_name(self, name: str) -> bool:
        """Tells whether `build` knows this name. Names may have more to them, such as a tag."""
        return name in self.names()

    def served_names(self, adapter: Adapter) -> list[str]:
        """Lists the names whose models a family serves, without building any of them."""
        return []

    def build(
        self,
        name: str,
        *,
        pretrained: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Builds the model of this name, with random weights unless `pretrained`.

        It is also called on the meta device, for counting, where no weights take any memory.

        Args:
            name: a name for which `has_name` is true.
            pretrained: whether the library may fetch the weights that it has for this name.
            settings: further arguments of the library's own factory.

        Raises:
            PatchslimError: for settings that the model does not have, with the nearest that it has,
                and for all else that the library refuses (`build_error`). Any other error is shown
                as a traceback.
        """
        raise self._undefined("build")

    def setting_names(self, name: str) -> frozenset[str] | None:
        """The arguments of the architecture that `build` takes for this name; None where unknown.

        None of them may name a file, an address or a function, or fetch anything.
        """
        return None

    def settings_from_weights(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Reads the settings that a file of weights implies, such as its number of classes."""
        return {}

    def rename_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the weights as today's models call them, if the file has older names."""
        return state

    # ----------------------------------------------------------------------- models in folders

    def is_folder(self, folder: Path) -> bool:
        """Tells whether the folder holds a model of this library."""
        return False

    def open_folder(self, folder: Path, *, weights: bool = True) -> nn.Module:
        """Opens the model in a folder from its files alone: fetches nothing, runs no code in it.

        Args:
            folder: a folder for which `is_folder` is true.
            weights: whether to load its weights; without them it is built for counting.
        """
        raise self._undefined("open_folder")

    # ------------------------------------------------------------------------------- images

    @abstractmethod
    def read_preprocessing(self, host: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
        """Reads how the host's images are prepared, if the library keeps that with the weights.

        Args:
            host: a host of this library.
            image_size: the height and width that it sees.

        Returns:
            Any of `mean`, `std`, `crop_pct`, `interpolation` and `crop_mode`, in the words of
            `Preprocessing`; nothing where the library does not know.
        """

    # --------------------------------------------------------------------------- saved folders

    def tell_origin(self, host: nn.Module, folder: Path) -> None:
        """Tells a host, rebuilt without weights, the saved folder in which its weights are."""
        return

    def describe_saved(
        self, host: nn.Module, images: Mapping[str, Any] | None
    ) -> dict[str, dict[str, Any]]:
        """Describes a folder that `SlimModel.save` wrote to this library: JSON by file name.

        A library cannot open such a folder by itself. Where it reads the kind of a model from a
        file, that file says `WHOM_TO_ASK`, which then stands in the library's own error.

        Args:
            host: the dense model, of this library or another.
            images: how images are prepared (`Preprocessing.to_json`); None where nobody said, and
                for what are no pictures.
        """
        return {}

    def _undefined(self, method: str) -> PatchslimError:
        """Makes the error for a method that only libraries with the promise define."""
        promise = next(name for name, needed in PROMISES.items() if method in needed)
        return PatchslimError(
            f"{self.name} does not define {method}(): ask only a library with {promise} = True."
        )


def has_served_class(module: str, adapter: Adapter) -> bool:
    """Tells whether an imported module has a class that a family serves."""
    from torch import nn

    classes = [value for value in vars(sys.modules[module]).values() if isinstance(value, type)]
    models = [cls for cls in classes if issubclass(cls, nn.Module)]
    # The class alone decides which family serves it, so an object that was never built will do.
    return any(adapter.serves(nn.Module.__new__(cls)) for cls in models)


def crop_share(crop: int, resized: int) -> float:
    """Computes the `crop_pct` for which timm's transforms resize to exactly `resized`."""
    share = crop / resized
    # timm rounds crop / share down, and a rounding error must not take a pixel away.
    return share if math.floor(crop / share) == resized else math.nextafter(share, 0.0)


def build_error(
    library: str, name: str, error: Exception, host_class: Any = None
) -> PatchslimError:
    """Makes the error for a model that its library could not build, as one sentence with a cure.

    Args:
        library: the name of the library.
        name: of the model.
        error: what the library raised.
        host_class: where known, the class whose arguments the settings are.
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and host_class is not None:
        known = [each for each in inspect.signature(host_class).parameters if each != "self"]
        return UnknownName.of(f"setting of {name}", unknown[1], known)
    return PatchslimError(f"{library} could not make {name}: {first_line(error)}.")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")
