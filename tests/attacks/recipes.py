"""Recipes, configurations, runs and reports that were edited, damaged or made to do harm.

A change that is accepted has to give the logits that were saved. Where an author could have written
the whole recipe so, the host has to be the saved one, and the answers have to be numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import patchslim
from attacks import _saved_models as models
from attacks._mutations import list_mutations
from attacks._run_folders import run_attacks
from attacks.attack import Attack, SilentlyWrong
from patchslim.hosts._catalog import build_without_weights, find_host
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing
from patchslim.saving.folder import RECIPE_FILE, read_recipe
from patchslim.saving.seal import seal_recipe
from patchslim.schedules.schedule import Schedule

# Entries that say what the method does. Without a checksum nobody can tell that they were changed.
DECIDING = ("method", "method_class", "settings", "schedule", "tail", "trained", "calibrated")


def attacks() -> Iterator[Attack]:
    for name, run in list_all():
        yield Attack(name, models.forbid_code(run))


def list_all() -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield from edited_recipes()
    yield from forged_recipes()
    yield from spoiled_texts()
    yield from spoiled_places()
    yield from building_arguments()
    yield from hf_configurations()
    yield from hf_code()
    yield from reports()
    yield from schedules()
    yield from run_attacks()


# The entries of timm's configuration that anything reads.
READ_IN_CFG = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")


# --- recipes of saved models


def edited_recipes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Every entry of a recipe changed by hand, of a model with checksums and of one without."""
    chosen: list[tuple[Path, tuple[str, ...]]] = [
        (models.saved("tome"), ()),
        (models.saved("evit"), ("method", "schedule", "tail")),
        (models.saved("similarity"), ("settings",)),
    ]
    for path, under in chosen:
        recipe = models.read_json(path / RECIPE_FILE)
        for name, place, changed in list_mutations(recipe, *under, every=5):
            if "pretrained_cfg" in place and place[-1] not in READ_IN_CFG:
                continue
            yield f"edited {path.name}: {name}", partial(load_edited, path, changed)
        yield f"edited {path.name}: nothing", partial(load_edited, path, recipe)
    for kind, *under in (["tome", "images", "answers", "schedule"], ["similarity", "settings"]):
        path = models.old(kind)
        recipe = models.read_json(path / RECIPE_FILE)
        for name, place, changed in list_mutations(recipe, *under, every=4):
            load = load_forged if place[0] in DECIDING else load_edited
            yield f"0.6.1 {kind}: {name}", partial(load, path, changed)


def load_edited(source: Path, recipe: Any, folder: Path) -> None:
    """What is accepted has to give the logits that were saved, for images prepared as then."""
    wanted, _ = models.saved_answers(source)
    path = models.copied(source, folder)
    (path / RECIPE_FILE).write_text(json.dumps(recipe))
    model = patchslim.load(path)
    models.require_same(models.answers(model), wanted, "an edited recipe")
    before = models.read_json(source / RECIPE_FILE)["images"]
    prepared = Preprocessing.from_json(read_recipe(path)["images"])
    if prepared != Preprocessing.from_json(before):
        require_sense(prepared)


def require_sense(prepared: Preprocessing) -> None:
    """Image settings, where a model of 0.6.1 has others than before, are some that can be right."""
    picture = torch.zeros(len(prepared.mean), 8, 8)
    from torchvision.transforms.functional import to_pil_image

    pixels = prepared.transform()(to_pil_image(picture))
    if pixels.shape[1:] != prepared.image_size or not pixels.isfinite().all():
        raise SilentlyWrong(f"images are prepared as nonsense: {prepared}")


FORGED_ENTRIES = ("host", "settings", "schedule", "images", "buffers", "shared", "dtype", "answers")


def forged_recipes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Recipes that somebody wrote on purpose, with checksums that fit."""
    for kind in ("tome", "hf"):
        path = models.saved(kind)
        recipe = models.read_json(path / RECIPE_FILE)
        for name, place, changed in list_mutations(recipe, *FORGED_ENTRIES, every=5):
            if len(place) > 2 and place[1] == "pretrained_cfg" and place[2] not in READ_IN_CFG:
                continue
            yield f"forged {kind}: {name}", partial(load_forged, path, changed)
    recipe = models.read_json(models.saved("tome") / RECIPE_FILE)
    shared = {"host.head.bias": "host.blocks.0.norm1.bias", "host.nothing": "host.head.bias"}
    for name, changes in {
        "weights shared that are not alike": {"shared": shared},
        "weights shared with themselves": {"shared": {"host.head.bias": "host.head.bias"}},
        "a buffer of type load": {"buffers": {"x": "load"}},
        "no bytes": {"bytes": 0},
        "too many bytes": {"bytes": 10**18},
        "a type of numbers that forgives": {"dtype": "int4", "answers": [1.0, 2.0, 3.0]},
        "a newer format": {"patchslim": 99},
        "format true": {"patchslim": True},
        "a method that is a path": {"method": "../tome"},
        "a method that is a module": {"method": "os"},
        "a method's base": {"method": "_method"},
        "a family that is a module": {"library": "_timm"},
        "a family that is a path": {"library": "../_timm"},
        "another family": {"library": "timm_eva"},
    }.items():
        yield (
            f"forged tome: {name}",
            partial(load_forged, models.saved("tome"), {**recipe, **changes}),
        )
    for method in ("topk", "evit", "random", "ats", "dynamicvit", "patch_slimming", "identity"):
        changed = {**recipe, "method": method, "settings": {}}
        yield f"edited tome: is {method}", partial(load_edited, models.saved("tome"), changed)


def load_forged(source: Path, recipe: Any, folder: Path) -> None:
    """What is accepted is the saved host, and answers with numbers."""
    _, wanted = models.saved_answers(source)
    path = models.copied(source, folder)
    (path / RECIPE_FILE).write_text(json.dumps(seal_recipe(recipe)))
    model = patchslim.load(path)
    models.require_same(models.dense_answers(model), wanted, "a forged recipe")
    if not models.answers(model).isfinite().all():
        raise SilentlyWrong("answers that are no numbers")
    require_sense(Preprocessing.from_json(read_recipe(path)["images"]))
    require_sense(find_preprocessing(model.host, model.plan.adapter))
    model.save(folder / "again")


# --- the text of a recipe, and the place where it lies


def spoiled_bytes(text: str) -> dict[str, bytes]:
    """What may stand in a file instead of a JSON object."""
    data = text.encode()
    middle = text.index("{") + 1
    return {
        "deep lists": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep inside": f'{text[:middle]}"x": {"[" * 900}{"]" * 900}, {text[middle:]}'.encode(),
        "deeper inside": f'{text[:middle]}"x": {"[" * 9000}{"]" * 9000}, {text[middle:]}'.encode(),
        "a number of 100,000 digits": (text[:middle] + f'"x": {"9" * 100_000},').encode()
        + text[middle:].encode(),
        "infinity": f'{text[:middle]}"x": 1e999, {text[middle:]}'.encode(),
        "Infinity": f'{text[:middle]}"x": Infinity, {text[middle:]}'.encode(),
        "not a number": f'{text[:middle]}"x": NaN, {text[middle:]}'.encode(),
        "a key twice": f'{text[:middle]}"x": 1, "x": 2, {text[middle:]}'.encode(),
        "half a character": f'{text[:middle]}"x": "\\ud800", {text[middle:]}'.encode(),
        "zeros in a name": f'{text[:middle]}"\\u0000": "\\u0000", {text[middle:]}'.encode(),
        "latin letters": f'{text[:middle]}"x": "é", {text[middle:]}'.encode("latin-1"),
        "a mark in front": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16"),
        "utf-32": text.encode("utf-32"),
        "nothing": b"",
        "spaces": b" " * 1000,
        "zeros": b"\0" * 1000,
        "null": b"null",
        "true": b"true",
        "a number": b"1",
        "a text": b'"tome"',
        "a list": b"[]",
        "an object": b"{}",
        "two documents": data + data,
        "a comment": b"// mine\n" + data,
        "a comma": data.rstrip()[:-1] + b",}",
        "half": data[: len(data) // 2],
        "a byte less": data.rstrip()[:-1],
        "30 MB of spaces": data + b" " * 30_000_000,
        "80 MB of spaces": data + b" " * 80_000_000,
        "a million entries": b"{" + b",".join(b'"%d":0' % n for n in range(1_000_000)) + b"}",
        "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
        "yaml": b"!!python/object/apply:os.system ['touch code-was-run']",
    }


def spoiled_texts() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for kind in ("tome", "old"):
        path = models.saved("tome") if kind == "tome" else models.old("tome")
        for name, data in spoiled_bytes((path / RECIPE_FILE).read_text()).items():
            yield f"recipe of {kind}: {name}", partial(load_text, path, data)
    text = models.report_file().read_text()
    for name, data in spoiled_bytes(text).items():
        yield f"report: {name}", partial(open_text, data, models.open_report)
    for name, data in spoiled_bytes('{"kind": "constant", "r": 2}').items():
        yield f"schedule: {name}", partial(open_text, data, Schedule.load)
    folder = models.hf_folder()
    for file in ("config.json", "preprocessor_config.json"):
        for name, data in spoiled_bytes((folder / file).read_text()).items():
            yield f"{file}: {name}", partial(open_hf_file, file, data)


def load_text(source: Path, data: bytes, folder: Path) -> None:
    wanted, _ = models.saved_answers(source)
    path = models.copied(source, folder)
    (path / RECIPE_FILE).write_bytes(data)
    models.require_same(models.answers(patchslim.load(path)), wanted, "a spoiled text")


def open_text(data: bytes, read: Callable[[Path], object], folder: Path) -> None:
    (folder / "file.json").write_bytes(data)
    read(folder / "file.json")


def spoiled_places() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Links, pipes, folders and holes where files should be."""

    def link_to(target: str, file: str, path: Path) -> None:
        (path / file).unlink()
        (path / file).symlink_to(target)

    def make_pipe(file: str, path: Path) -> None:
        (path / file).unlink()
        os.mkfifo(path / file)

    def make_folder(file: str, path: Path) -> None:
        (path / file).unlink()
        (path / file).mkdir()

    def make_hole(file: str, path: Path) -> None:
        with (path / file).open("r+b") as opened:
            opened.truncate(1 << 42)

    for file in (RECIPE_FILE, "model.safetensors"):
        for target in ("/dev/zero", "/dev/stdin", file, "nothing", "/proc/self/mem", "."):
            yield f"{file} leads to {target}", partial(load_spoiled, partial(link_to, target, file))
        yield f"{file} is a pipe", partial(load_spoiled, partial(make_pipe, file))
        yield f"{file} is a folder", partial(load_spoiled, partial(make_folder, file))
        yield f"{file} ends in a hole", partial(load_spoiled, partial(make_hole, file))
    for name in (
        "",
        ".",
        "..",
        "\0",
        "x" * 5000,
        "hf-hub:",
        "hf-hub:../..",
        "/dev/zero",
        "~nobody/x",
    ):
        yield f"a model called {name[:20]!r}", partial(load_name, name)


def load_spoiled(spoil: Callable[[Path], None], folder: Path) -> None:
    source = models.saved("tome")
    wanted, _ = models.saved_answers(source)
    path = models.copied(source, folder)
    spoil(path)
    models.require_same(models.answers(patchslim.load(path)), wanted, "a spoiled folder")


def load_name(name: str, _: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    patchslim.load(name)
    raise SilentlyWrong(f"{name!r} was loaded")


# --- arguments that a host is built with


def building_arguments() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Arguments of the libraries' factories that name files, code or the network."""
    values: dict[str, list[Any]] = {
        "checkpoint_path": ["weights.pth", "weights.npz", "/dev/zero", "https://nowhere.invalid/x"],
        "pretrained_cfg": [{"file": "weights.pth"}, {"url": "https://nowhere.invalid/x"}, "augreg"],
        "pretrained_cfg_overlay": [{"file": "w.pth", "custom_load": True}, {"hf_hub_id": "a"}],
        "pretrained": [True, 1],
        "cache_dir": ["cache"],
        "pretrained_filter_fn": ["os.system"],
        "pretrained_strict": [False],
        "kwargs_filter": [["img_size"]],
        "model_cfg": [{"file": "weights.pth"}],
        "feature_cfg": [{"feature_cls": "fx"}],
        "features_only": [True],
        "scriptable": [True],
        "device": ["cuda", "meta"],
        "_target_": ["os.system"],
        "auto_map": [{"AutoModel": "code.Model"}],
        "embed_layer": ["os.system"],
        "block_fn": ["os.system"],
        "mlp_layer": ["os.system"],
        "norm_layer": ["os.system"],
        "act_layer": ["os.system"],
        "attn_layer": ["os.system"],
        "depth": [10**9, -1, 0, 2.5, "2", True],
        "num_heads": [0, -1, 10**9, 3],
        "embed_dim": [10**9, 0, -16, 2**62],
        "img_size": [10**9, 0, -1, [16], [16, 16, 16], "16", 17],
        "patch_size": [0, -1, 10**9],
        "num_classes": [-1, 10**12, 2.5],
        "in_chans": [0, 10**9],
        "mlp_ratio": [1e300, -1.0, 0.0],
        "drop_rate": [-1, 2, "x"],
        "reg_tokens": [10**9, -1],
        "init_values": [1e300],
        "weight_init": ["os.system"],
        "global_pool": ["os.system", 7],
        "unknown": [1],
    }  # fmt: skip
    path = models.saved("tome")
    recipe = models.read_json(path / RECIPE_FILE)
    for key, tried in values.items():
        for value in tried:
            host = {**recipe["host"], "args": {**recipe["host"]["args"], key: value}}
            name = f"{key}={str(value)[:30]}"
            changed = {**recipe, "host": host}
            yield f"forged argument {name}", partial(load_beside_pickle, path, changed)
            yield f"model argument {name}", partial(build_beside_pickle, key, value)
    for architecture in (
        "hf-hub:a/b",
        "local-dir:.",
        "../x",
        "resnet18",
        "",
        "vit_base_patch16_224",
    ):
        changed = {**recipe, "host": {**recipe["host"], "architecture": architecture}}
        yield f"forged architecture {architecture}", partial(load_beside_pickle, path, changed)
    for name in ("hf-hub:a/b", "local-dir:copy", "timm:hf-hub:a/b", "hf_hub:timm/x", "local-dir:."):
        yield f"a host called {name}", partial(build_name, name)


def write_pickle(folder: Path) -> None:
    """Files of weights that run code where they are opened carelessly."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(folder / models.MARKER).touch, ())

    for name in ("weights.pth", "pytorch_model.bin", "weights.npz"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))


def load_beside_pickle(source: Path, recipe: Any, folder: Path) -> None:
    write_pickle(folder)
    load_forged(source, recipe, folder)


def build_beside_pickle(key: str, value: Any, folder: Path) -> None:
    write_pickle(folder)
    settings = {**models.TINY, key: tuple(value) if isinstance(value, list) else value}
    host = find_host("vit_tiny_patch16_224", settings=settings)
    if key in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"):
        raise SilentlyWrong(f"{key} was taken")
    run_host(host)


def run_host(host: torch.nn.Module) -> None:
    """Slims a host and runs it, once it is known to be served."""
    model = patchslim.slim(host, "topk", keep=0.5)
    if not models.answers(model).isfinite().all():
        raise SilentlyWrong("answers that are no numbers")
    require_sense(find_preprocessing(model.host, model.plan.adapter))


def build_name(name: str, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    models.copied(models.hf_folder(), folder)
    write_pickle(folder)
    find_host(name)
    raise SilentlyWrong(f"{name} was opened")


# --- folders of transformers


def hf_configurations() -> Iterator[tuple[str, Callable[[Path], object]]]:
    path = models.hf_folder()
    for file in ("config.json", "preprocessor_config.json"):
        data = models.read_json(path / file)
        for name, _, changed in list_mutations(data, every=5):
            yield f"{file}: {name}", partial(open_hf_file, file, json.dumps(changed).encode())
    for key, value in {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "experts_implementation": "somebody/kernel",
        "dtype": "os.system",
        "torch_dtype": "int8",
        "hidden_act": "os.system",
        "num_labels": 10**9,
        "id2label": {"0": {"a": 1}},
        "problem_type": "__import__",
        "device_map": "cuda",
        "use_kernels": True,
        "_name_or_path": "/proc/self",
        "transformers_weights": "../pytorch_model.bin",
        "base_model_tp_plan": {"x": "y"},
        "output_attentions": True,
        "return_dict": False,
        "chunk_size_feed_forward": -1,
        "torchscript": True,
    }.items():
        config = {**models.read_json(path / "config.json"), key: value}
        yield (
            f"config.json with {key}",
            partial(open_hf_file, "config.json", json.dumps(config).encode()),
        )


def open_hf_file(file: str, data: bytes, folder: Path) -> None:
    """Opens the folder, counts it, slims it and prepares an image."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = models.copied(models.hf_folder(), folder)
    (path / file).write_bytes(data)
    host = find_host(str(path))
    run_host(host)
    build_without_weights(str(path))


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification
class Config(ViTConfig):
    model_type = "unheard_of"
class Model(ViTForImageClassification):
    config_class = Config
class Processor:
    pass
"""
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModel": "code.Model",
    "AutoModelForImageClassification": "code.Model",
    "AutoImageProcessor": "code.Processor",
}


def hf_code() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Folders that bring Python along, with all that may come from stdin."""
    for stdin in ("closed", "y"):
        for model_type in ("unheard_of", "vit", None, "", "../vit", 7):
            for counts in (False, True):
                what = "counted" if counts else "opened"
                yield (
                    f"auto_map of {model_type!r}, stdin {stdin}, {what}",
                    partial(open_hf_code, model_type, stdin, counts, None),
                )
    for places in (("AutoConfig",), ("AutoModelForImageClassification",), ("AutoImageProcessor",)):
        for repository in ("", "somebody/code--", "../copy--"):
            mapped = {place: repository + AUTO_MAP[place] for place in places}
            yield f"auto_map {mapped}", partial(open_hf_code, "vit", "y", False, mapped)
    yield "weights that are a pickle", open_hf_pickle


def open_hf_code(
    model_type: Any,
    stdin: str,
    counts: bool,  # noqa: FBT001 (partial gives it)
    mapped: dict[str, str] | None,
    folder: Path,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = models.copied(models.hf_folder(), folder)
    config = models.read_json(path / "config.json")
    config |= {"model_type": model_type, "auto_map": mapped or AUTO_MAP}
    if model_type is None:
        del config["model_type"]
    (path / "config.json").write_text(json.dumps(config))
    prepared = models.read_json(path / "preprocessor_config.json")
    prepared |= {"image_processor_type": "Processor", "auto_map": mapped or AUTO_MAP}
    (path / "preprocessor_config.json").write_text(json.dumps(prepared))
    (path / "code.py").write_text(CODE.format(marker=str(folder / models.MARKER)))
    feed_stdin(stdin)
    if counts:
        build_without_weights(str(path))
    else:
        run_host(find_host(str(path)))


def feed_stdin(what: str) -> None:
    """Closes stdin, or has it say yes."""
    if what == "closed":
        os.close(0)
    elif what != "nothing":
        reader, writer = os.pipe()
        os.write(writer, f"{what}\n".encode() * 10)
        os.dup2(reader, 0)


def open_hf_pickle(folder: Path) -> None:
    path = models.copied(models.hf_folder(), folder)
    (path / "model.safetensors").unlink()
    write_pickle(folder)
    (folder / "pytorch_model.bin").rename(path / "pytorch_model.bin")
    find_host(str(path))
    raise SilentlyWrong("a pickle was taken for weights")


# --- reports and schedules


# Of fields of a report that are alike, one stands for all.
KINDS_OF_FIELDS = (
    "rows ", "rows.3 ", "rows.3.name", "rows.3.tokens", "rows.3.macs", "rows.3.spent", "rows.3.ece",
    "rows.3.parameters", "rows.3.accuracy", "rows.3.latency", "birth", "title", "format",
    "prepared",
)  # fmt: skip


def reports() -> Iterator[tuple[str, Callable[[Path], object]]]:
    report = models.read_json(models.report_file())
    for name, _, changed in list_mutations(report, every=5):
        if name.startswith(KINDS_OF_FIELDS):
            data = json.dumps(changed).encode()
            yield f"report: {name}", partial(open_text, data, models.open_report)


def schedules() -> Iterator[tuple[str, Callable[[Path], object]]]:
    every: list[dict[str, Any]] = [
        {"kind": "constant", "r": 2, "inflect": 0.5},
        {"kind": "removed", "r": [2, 2]},
        {"kind": "rate", "rate": 0.5, "at": [1]},
        {"kind": "counts", "kept": [14, 10], "entering": 17, "prefix": 1},
    ]
    for schedule in every:
        for name, _, changed in list_mutations(schedule, every=2):
            data = json.dumps(changed).encode()
            yield f"schedule {schedule['kind']}: {name}", partial(open_text, data, slim_by_schedule)


def slim_by_schedule(path: Path) -> None:
    schedule = Schedule.load(path)
    model = patchslim.slim(models.timm_host(), "tome", schedule)
    if not models.answers(model).isfinite().all():
        raise SilentlyWrong("answers that are no numbers")
