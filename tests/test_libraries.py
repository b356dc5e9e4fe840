"""Libraries: one file each, from which names, folders, versions and preprocessing follow."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import patchslim
import patchslim.hosts
import patchslim.hosts._libraries
from patchslim.cli.main import main
from patchslim.errors import (
    BadFile,
    BrokenLaw,
    MissingExtra,
    OldVersion,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
)
from patchslim.hosts import _catalog
from patchslim.hosts._adapter import HostFacts
from patchslim.hosts._library import crop_share
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.hosts._registry import (
    find_family_library,
    find_libraries,
    library_names,
    load_adapter,
    load_library,
)
from patchslim.versions import installed_version

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "patchslim"
BY_NAME = [each.name for each in find_libraries() if each.builds_by_name]

# A library and a family of it, as two files that somebody adds. Its only model is a timm host of a
# class of its own, so that the family has nothing to do but to serve it.
LIBRARY = '''
"""A zoo."""
from patchslim.hosts._library import Library, build_error

class Zoo(Library):
    name = "zoo"
    distribution = "zoo-models"
    oldest = (2, 1)
    extra = "zoo"
    hint = "a name of zoo's"
    builds_by_name = True
    image_size_setting = "img_size"

    def names(self):
        return ["test_vit", "zebra"]

    def has_name(self, name):
        self.check_version()
        return name in self.names()

    def build(self, name, *, pretrained=False, settings=None):
        import zoo
        return zoo.Zebra(**{"embed_dim": 32, "depth": 2, "num_heads": 2, **(settings or {})})

    def settings_from_weights(self, state):
        return {"num_classes": len(state["head.weight"])}

    def served_names(self, adapter):
        return self.names()

    def read_preprocessing(self, host, image_size):
        return {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
'''
FAMILY = '''
"""Zebras."""
from patchslim.hosts.timm_vit import TimmVit

class ZooZebra(TimmVit):
    family = "zoo Zebra"
    def serves(self, host): return type(host).__name__ == "Zebra"
    def unsupported_reason(self, host): return None
'''
MODULE = """
from timm.models.vision_transformer import VisionTransformer
class Zebra(VisionTransformer): pass
"""


def forget_libraries():
    for known in (installed_version, load_library, load_adapter):
        known.cache_clear()


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """The package with another library and a family of it, each of which is one file."""
    forget_libraries()
    for package, folder, file, text in (
        (patchslim.hosts._libraries, "libraries", "zoo.py", LIBRARY),
        (patchslim.hosts, "families", "zoo_zebra.py", FAMILY),
        (None, "site", "zoo.py", MODULE),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text, encoding="utf-8")
        if package is not None:
            path = [*package.__path__, str(tmp_path / folder)]
            monkeypatch.setattr(package, "__path__", path)
    info = tmp_path / "site" / "zoo_models-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-models\nVersion: 2.1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield info
    forget_libraries()
    for name in ("zoo", "patchslim.hosts.zoo_zebra", "patchslim.hosts._libraries.zoo"):
        sys.modules.pop(name, None)


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_a_new_library_is_one_file_and_the_command_line_serves_it(zoo, capsys, tmp_path):
    listed = json.loads(run(capsys, "models", "--json"))
    assert listed["zoo_zebra"] == {"family": "zoo Zebra", "names": ["zoo:test_vit", "zebra"]}
    counted = json.loads(run(capsys, "macs", "zebra", "--image-size", 64, "--json"))
    assert counted["image_size"] == [64, 64]
    path = tmp_path / "weights.pth"
    torch.save(_catalog.find_host("zebra", settings={"num_classes": 3}).state_dict(), path)
    run(capsys, "slim", "zebra", "--weights", path, "--macs", 0.7, "--out", tmp_path / "saved")
    recipe = json.loads((tmp_path / "saved" / "recipe.json").read_text())
    assert recipe["versions"]["zoo-models"] == "2.1"
    assert recipe["images"]["mean"] == [0.1, 0.2, 0.3]
    assert recipe["images"]["stated"]
    assert "zoo-models 2.1" in run(capsys, "measure", "zebra", "--keep", 0.5, "--repeats", 2)


@pytest.mark.parametrize(
    ("promise", "lacking"),
    [
        ("builds_by_name", "build(), names()"),
        ("opens_folders", "is_folder(), open_folder()"),
    ],
)
def test_a_library_that_defines_less_than_it_says_is_refused_with_what_is_missing(
    zoo, capsys, promise, lacking
):
    text = f"""
from patchslim.hosts._library import Library

class Zoo(Library):
    name = distribution = "zoo"
    oldest = (1,)
    hint = "a zoo"
    {promise} = True

    def read_preprocessing(self, host, image_size):
        return {{}}
"""
    file = Path(patchslim.hosts._libraries.__path__[-1]) / "zoo.py"
    file.write_text(text, encoding="utf-8")
    wanted = f"zoo.py says {promise} = True and does not define {lacking}"
    with pytest.raises(BrokenLaw, match=re.escape(wanted)) as caught:
        _catalog.find_host("zebra")
    assert Path(str(caught.value).split()[-1]).is_file()
    assert main(["macs", "zebra"]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["build", "open_folder"])
def test_what_a_library_does_not_do_is_refused_in_its_words(method):
    library = next(each for each in find_libraries() if method not in vars(type(each)))
    with pytest.raises(PatchslimError, match=rf"{library.name} does not define {method}\(\)"):
        getattr(library, method)("anything")


@pytest.mark.parametrize("library", find_libraries(), ids=lambda library: library.name)
def test_a_hint_stands_after_a_model_is_and_after_give(library):
    assert library.hint.split()[0] in ("a", "the")


def test_an_old_version_of_a_new_library_is_refused_with_the_cure(zoo):
    metadata = "Metadata-Version: 2.1\nName: zoo-models\nVersion: 2.0.9\n"
    (zoo / "METADATA").write_text(metadata, encoding="utf-8")
    installed_version.cache_clear()
    with pytest.raises(OldVersion, match=r"pip install -U 'zoo-models>=2\.1'"):
        _catalog.find_host("zebra")
    with pytest.raises(OldVersion, match="zoo-models"):
        load_adapter("zoo_zebra")


def uninstall(info, *, module=True):
    """Removes what pip knows of the package, and what can be imported."""
    (info / "METADATA").unlink()
    info.rmdir()
    if module:
        (info.parent / "zoo.py").unlink()
    importlib.invalidate_caches()
    installed_version.cache_clear()


def test_a_package_that_pip_does_not_know_is_told_from_a_missing_one(zoo, monkeypatch):
    uninstall(zoo, module=False)
    with pytest.raises(MissingExtra, match="zoo can be imported, but pip knows no zoo-models"):
        _catalog.find_host("zoo:zebra")
    monkeypatch.setattr(type(load_library("zoo")), "oldest", ())
    assert type(_catalog.find_host("zoo:zebra")).__name__ == "Zebra"


def test_a_wrong_name_is_told_beside_a_missing_library(zoo):
    uninstall(zoo)
    with pytest.raises(MissingExtra, match=r"zoo-models is not installed.*Did you mean 'test_vit"):
        _catalog.find_host("tset_vit")


def test_a_missing_library_is_named_only_where_it_may_be_meant(zoo):
    uninstall(zoo)
    with pytest.raises(MissingExtra, match=r"zoo-models is not installed: .*'patchslim\[zoo\]'"):
        _catalog.find_host("zebra")
    assert type(_catalog.find_host("test_vit")).__name__ == "VisionTransformer"


def test_models_are_listed_without_a_library_with_how_to_install_it(zoo, capsys):
    uninstall(zoo)
    listed = run(capsys, "models")
    assert "zoo_zebra: zoo-models is not installed: pip install 'patchslim[zoo]'" in listed
    assert "timm Levit: " in listed
    assert "test_vit" in run(capsys, "models", "test_vit")


def test_a_name_that_two_libraries_have_is_the_first_ones(zoo):
    assert type(_catalog.find_host("test_vit")).__name__ == "VisionTransformer"
    assert type(_catalog.find_host("timm:test_vit")).__name__ == "VisionTransformer"
    assert type(_catalog.find_host("zoo:test_vit")).__name__ == "Zebra"
    assert type(_catalog.find_host("zebra")).__name__ == "Zebra"
    assert next(iter(find_libraries())).name == "timm"


def test_an_unknown_name_behind_a_prefix_is_refused_with_the_nearest(zoo):
    with pytest.raises(UnknownName, match=r"Unknown zoo model 'zebre'\. Did you mean 'zebra'"):
        _catalog.find_host("zoo:zebre")
    with pytest.raises(UnknownName, match="Unknown model 'nobody:zebra'"):
        _catalog.find_host("nobody:zebra")


def test_a_setting_that_the_model_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match=r"setting of test_vit 'global_pol'.*'global_pool'"):
        _catalog.find_host("test_vit", settings={"global_pol": "avg"})


def test_a_folder_takes_no_settings(tmp_path):
    with pytest.raises(PatchslimError, match="comes with its own weights and image size"):
        _catalog.find_host(str(tmp_path), settings={"img_size": 32})
    with pytest.raises(BadFile, match=r"neither recipe\.json .* nor config\.json"):
        _catalog.find_host(str(tmp_path))


def test_a_folder_is_counted_without_its_weights(tmp_path):
    from hf_hosts import tiny_hf

    tiny_hf().config.save_pretrained(tmp_path)
    host = _catalog.build_without_weights(str(tmp_path))
    assert next(host.parameters()).is_meta
    assert patchslim.macs(host).total == patchslim.macs(tiny_hf()).total
    with pytest.raises(BadFile, match="not a whole image classifier"):
        _catalog.find_host(str(tmp_path))


def test_code_in_a_folder_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n"
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    auto = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    for open_it in (_catalog.find_host, _catalog.build_without_weights):
        with pytest.raises(BadFile, match=r"brings along \(auto_map\) is never run"):
            open_it(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", patchslim.adapter_names())
def test_every_family_is_of_a_library_and_its_page_says_which_version(family):
    library = find_family_library(family)
    assert family.startswith(f"{library.name}_")
    page = (ROOT / "docs" / "families" / f"{family}.md").read_text(encoding="utf-8")
    assert f"{library.distribution} {'.'.join(map(str, library.oldest))}" in page.replace("`", "")


def test_the_family_of_a_host_is_found_by_the_names_of_its_classes(zoo):
    host = _catalog.find_host("zebra")
    forget_libraries()
    assert type(patchslim.find_adapter(host)).__name__ == "ZooZebra"  # not timm's, which it is, too
    assert load_library.cache_info().currsize == 1  # for the version; timm's was not asked
    assert patchslim.find_adapter(host) is load_adapter("zoo_zebra")
    assert type(patchslim.find_adapter(_catalog.find_host("test_vit"))).__name__ == "TimmVit"


@pytest.mark.parametrize("place", [0, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BY_NAME)
def test_served_names_are_served(name, place):
    """A name of each family is built on the meta device and served by that family."""
    families = [
        each for each in patchslim.adapter_names() if find_family_library(each).name == name
    ]
    for family in families:
        named = _catalog.served_names(family)
        assert named
        host = _catalog.build_without_weights(named[place])
        assert next(host.parameters()).is_meta
        assert load_adapter(family).serves(host)


def test_nothing_but_the_library_files_and_its_families_names_a_library():
    """The command line, the catalog and preprocessing ask `Library`, and name no library."""
    files = [
        SOURCE / "hosts" / f"{name}.py" for name in ("_catalog", "_preprocessing", "_registry")
    ]
    files += [SOURCE / "versions.py", *(SOURCE / "cli").glob("*.py")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name in library_names():
            assert f"import {name}" not in text, file.name
            assert f'"{name}' not in text, file.name


def test_a_crop_resizes_to_the_very_pixel():
    from timm.data import create_transform

    for crop, resized in ((16, 93), (224, 242), (224, 256), (518, 518)):
        made = create_transform((3, crop, crop), crop_pct=crop_share(crop, resized))
        assert made.transforms[0].size == resized


def test_a_host_of_no_library_has_no_stated_preprocessing():
    class Own(torch.nn.Module):
        pass

    class Mine:
        def describe(self, host):
            return HostFacts(1, (3, 32, 32), (1.0,), (0.0,), True, 1)

    assert not find_preprocessing(Own(), Mine()).stated


def test_variants_of_timm_do_not_depend_on_what_was_imported_before():
    """Our own architectures are in timm's registry, in a module that is not timm's."""
    import timm

    import patchslim.architectures.evo_levit  # noqa: F401 (registers them)
    from timm_variants import registered_variants

    assert "evo_levit" in timm.list_modules()
    again = registered_variants.__wrapped__()
    assert [each.names for each in again] == [each.names for each in registered_variants()]


class Nobody(torch.nn.Module):
    """A host that no adapter knows."""


def test_the_error_for_an_unknown_host_names_a_guide_that_is_there():
    with pytest.raises(UnsupportedModel, match="No adapter knows") as caught:
        patchslim.slim(Nobody(), "tome", r=2)
    named = Path(str(caught.value).rpartition("To add one: ")[2])
    assert named.is_file()
    assert named.read_text(encoding="utf-8").startswith("# Adding a family")
