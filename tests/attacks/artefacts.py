"""Exported models that were edited, damaged or made to do harm, and wrong calls of them.

What is loaded has to answer as the slimmed model does. Where an author could have written the whole
artefact so, checksums included, it has to do no harm.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper

import patchslim
from attacks import _artefacts as artefacts
from attacks import _run_folders as runs
from attacks import _saved_models as models
from attacks._mutations import list_mutations
from attacks._values import EVERY
from attacks.attack import Attack, Lost, SilentlyWrong
from attacks.calls import INPUTS, plain
from attacks.commands import check_command
from patchslim.deployment.onnx_file import CARD_KEY, SEAL_KEY
from patchslim.deployment.targets.openvino import DIGESTS_FILE, MODEL_FILE, WEIGHTS_FILE

Run = Callable[[Path], object]
SECRET = "secret.bin"  # a file of the user's beside the artefact's folder
USUAL = 1e6  # pixels beyond overflow in float32, each runtime in its own place
# Entries of a card that anything reads after it is loaded.
READ = ("artefact", "target", "package", "method", "images", "input", "batch", "outputs", "labels")


def attacks() -> Iterator[Attack]:
    for name, run in list_all():
        yield Attack(name, models.forbid_code(run))


def list_all() -> Iterator[tuple[str, Run]]:
    artefacts.exported()
    yield from spoiled_files()
    yield from edited_cards()
    yield from forged_graphs()
    yield from forged_folders()
    yield from places()
    yield from command_lines()
    yield from calls()
    yield from exports()


# --- damage


def spoil(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file, cut short and with flipped bits in places that are always the same."""
    size = len(data)
    for share in (0, 0.01, 0.1, 0.5, 0.9, 0.999):
        yield f"cut to {share:.1%}", data[: int(size * share)]
    for less in (1, 60, 93, 94, 95):
        yield f"cut by {less} bytes", data[:-less]
    for number in range(24):
        place = (number * 7919 * 31 + 11) % size
        flipped = bytes([data[place] ^ (1 << number % 8)])
        yield f"bit flipped at {place}", data[:place] + flipped + data[place + 1 :]
    yield "zeros", bytes(size)
    yield "zeros within", data[: size // 2] + bytes(1000) + data[size // 2 + 1000 :]
    yield "twice", data + data
    yield "a byte more", data + b"\0"
    yield "an archive", b"PK\x03\x04" + data
    yield "a pickle", pickle.dumps(runs.Bomb())
    yield "text", b"not a model\n"


def spoiled_files() -> Iterator[tuple[str, Run]]:
    """Damage, which nobody wrote: what is loaded all the same has to be the model."""
    for name, made in spoil(artefacts.onnx_bytes()):
        yield f"onnx: {name}", partial(load_bytes, made)
    source = artefacts.exported() / artefacts.NAMES["openvino"]
    for file in (MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE):
        for name, made in itertools.islice(spoil((source / file).read_bytes()), 0, None, 3):
            yield f"openvino {file}: {name}", partial(load_folder, {file: made})


def load_bytes(data: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(data)
    artefacts.require_right(path)


def load_folder(files: dict[str, bytes], folder: Path, *, forge: bool = False) -> None:
    """Opens a folder with other files, and with digests that fit where they are forged."""
    path = artefacts.copy_openvino(folder)
    for name, data in files.items():
        (path / name).write_bytes(data)
    if forge:
        artefacts.reseal_openvino(path)
    artefacts.require_right(path, is_forged=forge)


# --- cards


def edited_cards() -> Iterator[tuple[str, Run]]:
    """Cards changed by hand, without and with a checksum that fits."""
    card = artefacts.onnx_card()
    for name, _, changed in list_mutations(card, *READ, every=2):
        yield f"card, edited: {name}", partial(load_card, json.dumps(changed), seal=False)
    for name, place, changed in list_mutations(card, every=3):
        if place[0] in READ or len(place) == 1:
            yield f"card, forged: {name}", partial(load_card, json.dumps(changed))
    whole = json.dumps(card)
    for name, text in {
        "nothing": "",
        "deep": '{"artefact": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "deep within": json.dumps({**card, "x": json.loads("[" * 60 + "]" * 60)}),
        "17 MB": json.dumps({**card, "x": "y" * (17 << 20)}),
        "a name twice": whole[:-1] + ', "target": "onnx"}',
        "NaN": whole[:-1] + ', "x": NaN}',
        "a list": "[]",
        "a number": "1",
        "cut": whole[:-5],
        "version 1e400": whole.replace('"artefact": 1', '"artefact": 1e400'),
        "version true": whole.replace('"artefact": 1', '"artefact": true'),
        "a newer version": whole.replace('"artefact": 1', '"artefact": 2'),
        "an input of all memory": json.dumps({**card, "input": [3, 2**31, 2**31]}),
        "a batch of all memory": json.dumps({**card, "batch": 10**9}),
        "escape sequences": json.dumps({**card, "labels": ["\x1b[2J", "\nerror: x", "\u202e"]}),
    }.items():
        yield f"card: {name}", partial(load_card, text)
    shell = json.dumps({**card, "artefact": 9, "package": "1'; touch code-was-run; '"})
    yield "card: a version that is a command", partial(refuse_quietly, shell)


def load_card(text: str, folder: Path, *, seal: bool = True) -> None:
    path = artefacts.write_onnx(folder, lambda model: artefacts.set_card(model, text), seal=seal)
    if not seal and text != json.dumps(artefacts.onnx_card()):
        patchslim.load(path)
        raise SilentlyWrong("an edited card is accepted")
    artefacts.require_right(path, is_forged=True)


def refuse_quietly(text: str, folder: Path) -> None:
    """What an error says to type must not be what somebody wrote into a file."""
    try:
        load_card(text, folder)
    except patchslim.PatchslimError as error:
        if "touch" in str(error).partition("pip install")[2]:
            raise SilentlyWrong(str(error)) from error
        raise


# --- ONNX graphs


def forged_graphs() -> Iterator[tuple[str, Run]]:
    """Files with our card and a seal that fits, around a graph that is not ours."""
    for name, change in GRAPHS.items():
        yield f"onnx, forged: {name}", partial(load_forged, change)
    for name in ("in the folder", "above", "absolute", "a device"):
        for spot in ("weight", "attribute", "inner graph"):
            yield f"onnx, forged: {spot} {name}", partial(load_external, name, spot)
    yield "onnx: without a card", partial(load_foreign, lambda model: None)
    yield "onnx: without a card, huge", partial(load_foreign, huge_weight)


def load_forged(change: Callable[[Any], object], folder: Path) -> None:
    artefacts.require_right(artefacts.write_onnx(folder, change), is_forged=True)


def load_foreign(change: Callable[[Any], object], folder: Path) -> None:
    def without_card(model: Any) -> None:
        del model.metadata_props[:]
        change(model)

    patchslim.load(artefacts.write_onnx(folder, without_card, seal=False))
    raise SilentlyWrong("a model of somebody else's is loaded")


def load_external(name: str, spot: str, folder: Path) -> None:
    """Weights that stand in another file, wherever a tensor may be."""
    here = folder / "inner"
    here.mkdir()
    secret = (here if name == "in the folder" else folder) / SECRET
    secret.write_bytes(bytes(1 << 16))
    where = {
        "in the folder": SECRET,
        "above": f"../{SECRET}",
        "absolute": str(secret),
        "a device": "/dev/zero",
    }[name]

    def change(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if each.raw_data)
        if spot != "weight":
            made = TensorProto()
            made.CopyFrom(tensor)
            made.name = "other"
            node = helper.make_node("Constant", [], ["constant"], value=made)
            if spot == "inner graph":
                output = helper.make_tensor_value_info("constant", tensor.data_type, None)
                graph = helper.make_graph([node], "inner", [], [output])
                true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
                model.graph.initializer.append(true)
                node = helper.make_node("If", ["true"], ["x"], then_branch=graph, else_branch=graph)
            model.graph.node.insert(0, node)
            tensor = (
                model.graph.node[0].attribute[0].t
                if spot == "attribute"
                else model.graph.node[0].attribute[0].g.node[0].attribute[0].t
            )
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=where)

    patchslim.load(artefacts.write_onnx(here, change))
    raise SilentlyWrong("it reads a file beside it")


def huge_weight(model: Any) -> None:
    model.graph.initializer.add(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 40])


def set_input(model: Any, kind: int, shape: list[Any]) -> None:
    made = helper.make_tensor_value_info("images", kind, shape)
    model.graph.input[0].CopyFrom(made)


def rename_input(model: Any) -> None:
    for node in model.graph.node:
        node.input[:] = ["other" if each == "images" else each for each in node.input]
    model.graph.input[0].name = "other"


def replace_graph(model: Any, nodes: list[Any], outputs: list[str]) -> None:
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "other", [model.graph.input[0]], made)
    model.graph.CopyFrom(graph)


GRAPHS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: model.ClearField("graph"),
    "no nodes": lambda model: model.graph.ClearField("node"),
    "no inputs": lambda model: model.graph.ClearField("input"),
    "no outputs": lambda model: model.graph.ClearField("output"),
    "no weights": lambda model: model.graph.ClearField("initializer"),
    "whole numbers in": lambda model: set_input(model, TensorProto.INT64, ["b", 3, 16, 16]),
    "another size in": lambda model: set_input(model, TensorProto.FLOAT, ["b", 3, 32, 32]),
    "another name in": rename_input,
    "a second input": lambda model: model.graph.input.append(
        helper.make_tensor_value_info("second", TensorProto.FLOAT, [1])
    ),
    "a loop of nodes": lambda model: model.graph.node.extend(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["x"])]
    ),
    "an output too many": lambda model: model.graph.output.append(model.graph.output[0]),
    "one number out": lambda model: replace_graph(
        model, [helper.make_node("ReduceSum", ["images"], ["output"], keepdims=0)], ["output"]
    ),
    "two outputs": lambda model: replace_graph(
        model,
        [helper.make_node("Relu", ["images"], [each]) for each in ("output", "more")],
        ["output", "more"],
    ),
    "text out": lambda model: replace_graph(
        model, [helper.make_node("Cast", ["images"], ["output"], to=TensorProto.STRING)], ["output"]
    ),
    "an unknown operation": lambda model: replace_graph(
        model, [helper.make_node("RunCode", ["images"], ["output"], domain="evil")], ["output"]
    ),
    "a huge weight": huge_weight,
    "a weight of fewer numbers": lambda model: model.graph.initializer[0].dims.append(3),
    "a weight of other numbers": lambda model: setattr(
        model.graph.initializer[0], "data_type", TensorProto.STRING
    ),
    "dimensions below zero": lambda model: model.graph.initializer[0].dims.insert(0, -1),
    "opset 9999": lambda model: setattr(model.opset_import[0], "version", 9999),
    "a format of the future": lambda model: setattr(model, "ir_version", 10**6),
    "a card twice": lambda model: model.metadata_props.add(key=CARD_KEY, value="{}"),
    "a seal twice": lambda model: model.metadata_props.add(key=SEAL_KEY, value="0" * 64),
    "a card for another target": lambda model: artefacts.set_card(
        model, json.dumps({**artefacts.onnx_card(), "target": "openvino"})
    ),
}


# --- folders for OpenVINO


def forged_folders() -> Iterator[tuple[str, Run]]:
    """Folders whose digests fit, and files in them that are no files."""
    for name, text in spoiled_xml(artefacts.openvino_xml()).items():
        forge = partial(load_folder, {MODEL_FILE: text.encode()}, forge=True)
        yield f"openvino, forged: {name}", forge
    size = len((artefacts.exported() / "openvino" / WEIGHTS_FILE).read_bytes())
    yield "openvino, forged: no weights", partial(load_spoiled_weights, 0)
    yield "openvino, forged: half of the weights", partial(load_spoiled_weights, size // 2)
    digests = models.read_json(artefacts.exported() / "openvino" / DIGESTS_FILE)
    for name, _, changed in list_mutations(digests):
        data = {DIGESTS_FILE: json.dumps(changed).encode()}
        yield f"openvino digests: {name}", partial(load_folder, data)
    for name, text in {"a list": b"[]", "deep": b"[" * 10**5, "null": b"null"}.items():
        yield f"openvino digests: {name}", partial(load_folder, {DIGESTS_FILE: text})
    for file in (MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE):
        for name, make in NO_FILES.items():
            yield f"openvino {file} is {name}", partial(load_without, file, make)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to another file": lambda path: path.symlink_to("/etc/passwd"),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
}


def load_without(file: str, make: Callable[[Path], object], folder: Path) -> None:
    path = artefacts.copy_openvino(folder)
    (path / file).unlink()
    make(path / file)
    patchslim.load(path)
    raise SilentlyWrong("an incomplete folder is loaded")


def load_spoiled_weights(size: int, folder: Path) -> None:
    """Weights cut short: constants lie beyond the end of the file."""
    data = (artefacts.exported() / "openvino" / WEIGHTS_FILE).read_bytes()[:size]
    load_folder({WEIGHTS_FILE: data}, folder, forge=True)


def spoiled_xml(xml: str) -> dict[str, str]:
    lol = "".join(
        f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12)
    )  # ten to the eleventh
    bomb = f'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY l0 "lol">{lol}]>'
    outside = '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    body = xml.partition("?>")[2]
    card = re.search(r'<card value="[^"]*" />', xml)
    assert card is not None
    return {
        "entities that grow": bomb + body.replace('name="patchslim"', 'name="&l11;"'),
        "an entity from a file": outside + body.replace('name="patchslim"', 'name="&x;"'),
        "nothing": "",
        "half": xml[: len(xml) // 2],
        "deep": '<net name="x" version="11">' + "<a>" * 100_000 + "</a>" * 100_000 + "</net>",
        "no layers": '<net name="x" version="11"><layers/><edges/></net>',
        "another version": xml.replace('version="11"', 'version="99"'),
        "no edges": re.sub(r"<edges>.*</edges>", "<edges/>", xml, flags=re.DOTALL),
        "an unknown layer": xml.replace('type="MatMul"', 'type="RunCode"'),
        "no card": xml.replace(card.group(), ""),
        "a card with parts": xml.replace(card.group(), '<card><a value="1" /></card>'),
        "an empty card": xml.replace(card.group(), '<card value="" />'),
        "a card of a number": xml.replace(card.group(), '<card value="7" />'),
        "offsets beyond the end": re.sub(r'offset="\d+"', f'offset="{1 << 40}"', xml),
        "offsets below zero": re.sub(r'offset="\d+"', 'offset="-64"', xml),
        "huge offsets": re.sub(r'offset="\d+"', f'offset="{(1 << 64) - 8}"', xml),
        "huge sizes": re.sub(r'size="\d+"', f'size="{1 << 60}"', xml),
        "huge shapes": re.sub(r'shape="1, 1, 16"', f'shape="{1 << 30}, {1 << 30}"', xml),
        "shapes of text": re.sub(r'shape="1, 1, 16"', 'shape="a"', xml),
        "images of whole numbers": xml.replace(
            '<data shape="?,3,?,?" element_type="f32"', '<data shape="?,3,?,?" element_type="i64"'
        ),
        "images of another size": xml.replace('shape="?,3,?,?"', 'shape="?,3,32,32"'),
        "edges to nowhere": re.sub(r'to-layer="\d+"', 'to-layer="99999"', xml),
        "edges to themselves": re.sub(r'from-layer="\d+"', 'from-layer="5"', xml),
        "numbers of layers that are text": re.sub(r'layer id="\d+"', 'layer id="x"', xml),
        "an ONNX file": artefacts.onnx_bytes().decode("latin-1"),
    }


# --- places


def places() -> Iterator[tuple[str, Run]]:
    """What is at a path, where a file or folder of ours could be."""
    for name, make in NO_FILES.items():
        for path in ("model.onnx", "model.pt2", "model"):
            yield f"{path} is {name}", partial(load_place, path, make)
    yield "a link to an ONNX file", load_link
    yield "a folder that was being replaced", load_interrupted
    yield "a .pt2 file", load_program
    yield "a .pt2 file that is a pickle", partial(load_place, "x.pt2", runs_code)
    yield "an ONNX file named .ONNX", partial(load_renamed, "onnx", "MODEL.ONNX")
    yield "an ONNX file named .pt2", partial(load_renamed, "onnx", "model.pt2")
    yield "a program named .onnx", partial(load_renamed, "pt2", "model.onnx")
    for label, value in EVERY.items():
        for name in ("model", "method", "adapter"):
            yield f"load {name}={label}", partial(load_with, name, value)


def runs_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(runs.Bomb()))


def load_place(name: str, make: Callable[[Path], object], folder: Path) -> None:
    make(folder / name)
    patchslim.load(folder / name)
    raise SilentlyWrong("it is loaded")


def load_link(folder: Path) -> None:
    """As a cache of downloads keeps it: the name is a link to a file without an ending."""
    shutil.copy(artefacts.exported() / "model.onnx", folder / "0a1b2c")
    (folder / "model.onnx").symlink_to("0a1b2c")
    artefacts.require_right(folder / "model.onnx")


def load_interrupted(folder: Path) -> None:
    """Export was killed between its two renames; the older artefact is hidden beside."""
    artefacts.copy_openvino(folder).rename(folder / ".made.old")
    artefacts.require_right(folder / "made")


def load_program(_: Path) -> None:
    patchslim.load(artefacts.exported() / "model.pt2")
    raise SilentlyWrong("a file in which PyTorch runs code is opened")


def load_renamed(target: str, name: str, folder: Path) -> None:
    shutil.copy(artefacts.exported() / artefacts.NAMES[target], folder / name)
    patchslim.load(folder / name)
    raise SilentlyWrong("it is loaded")


def load_with(name: str, value: Any, _: Path) -> None:
    patchslim.load(artefacts.exported() / "model.onnx", **{name: value})
    raise SilentlyWrong(f"{name} is ignored")


# --- command lines


def command_lines() -> Iterator[tuple[str, Run]]:
    """Artefacts where a command wants a model, and places where export is to write."""
    for command in ("measure", "macs", "train", "export", "show", "slim", "calibrate"):
        for name in ("model.onnx", "openvino", "model.pt2", "pipe.onnx", "loop.onnx"):
            yield f"{command} {name}", partial(run_command, command, name)
    for name in ("pipe.onnx", "loop.onnx", "full", "file", "file/x.onnx", "/dev/null"):
        for target in ("onnx", "openvino", "pt2"):
            yield f"export --to {target} --out {name}", partial(run_export, target, name)


def run_command(command: str, name: str, folder: Path) -> None:
    path = lay_out(folder, name)
    more = {"show": ["image.png"], "export": ["--out=x.onnx"]}.get(command, [])
    check_command((command, str(path), *more), folder)


def run_export(target: str, name: str, folder: Path) -> None:
    """A place that cannot be written is refused before anything takes long."""
    lay_out(folder, name)
    check_command(("export", "digits", "--macs=0.6", "--to", target, "--out", name), folder)
    path = folder / name
    if path.is_file() and not path.is_symlink() and path.read_bytes() != b"mine":
        raise SilentlyWrong("it is written")


def lay_out(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "pipe.onnx":
        os.mkfifo(path)
    elif name == "loop.onnx":
        path.symlink_to(name)
    elif (artefacts.exported() / name).exists():
        return artefacts.exported() / name
    return path


# --- calls


def calls() -> Iterator[tuple[str, Run]]:
    """Strange images for each runtime."""
    for name in ("model.onnx", "openvino", "batch.onnx"):
        for label, make in INPUTS.items():
            yield f"{name} on {label}", partial(show_images, name, make)
        for label in ("dict", "list", "text", "none"):
            yield f"{name} with an option {label}", partial(give_option, name, EVERY.get(label))


def show_images(name: str, make: Callable[[], Any], _: Path) -> None:
    """What is taken is answered as the slimmed model answers the same values in float32."""
    artefact, some = patchslim.load(artefacts.exported() / name), make()
    answer = artefact(some)
    if answer.shape != (len(some), 3) or answer.dtype != torch.float32:
        raise SilentlyWrong(f"{answer.dtype} {tuple(answer.shape)}")
    given = plain(some)
    finite = given.flatten(1).isfinite().all(dim=1)
    if not torch.equal(artefact(given)[finite], answer[finite]):
        raise SilentlyWrong("another answer than for the plain tensor")
    if (~finite).any() and answer[~finite].isfinite().all():
        raise SilentlyWrong("an image with NaN gets a finite answer")
    usual = given.flatten(1).abs().amax(dim=1) < USUAL if len(some) else finite
    if usual.any():
        with torch.no_grad():
            wanted = models.SLIMMED["tome"]()(given[usual])
        if not torch.allclose(answer[usual], wanted, atol=1e-3, rtol=1e-3, equal_nan=True):
            raise SilentlyWrong("another answer than the slimmed model's")


def give_option(name: str, value: Any, _: Path) -> None:
    patchslim.load(artefacts.exported() / name)(value)
    raise SilentlyWrong("it is taken for images")


def exports() -> Iterator[tuple[str, Run]]:
    """Every argument of `export`, with every value."""
    for number, (label, value) in enumerate(EVERY.items()):
        for place, name in enumerate(("model", "path", "to", "images", "batch", "labels")):
            if (number + place) % 2:
                yield f"export {name}={label}", partial(export, name, value)
    for label, make in itertools.islice(INPUTS.items(), 0, None, 2):  # each good one takes seconds
        yield f"export images: {label}", partial(export_images, make)
    endless = {"no images for ever": 0, "one image for ever": 1}
    for label, count in endless.items():
        batches = partial(itertools.repeat, torch.zeros(count, 3, 16, 16))
        yield f"export {label}", partial(export_images, batches)


def export(name: str, value: Any, folder: Path) -> None:
    """What is accepted is what was given, and nothing of the user's is lost."""
    (folder / "file").write_text("mine")
    given: dict[str, Any] = {
        "model": models.SLIMMED["tome"](),
        "path": folder / "model.pt2",
        "images": None,
        "batch": 1,
    }
    made = patchslim.export(**given | {name: value})
    if name in ("model", "path", "to") or isinstance(value, bool | str):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    if name == "batch" and made.card["batch"] != value:
        raise SilentlyWrong(f"batch={value!r} became {made.card['batch']}")
    if name == "labels" and made.labels != [*value]:
        raise SilentlyWrong(f"labels={value!r} became {made.labels}")
    if (folder / "file").read_text() != "mine" or [*folder.glob(".*")]:
        raise Lost("a file is lost, or something is left behind")


def export_images(make: Callable[[], Any], folder: Path) -> None:
    """Images to check with: none are left out, and none are changed in silence."""
    some = make()
    made = patchslim.export(models.SLIMMED["tome"](), folder / "model.pt2", images=some)
    if isinstance(some, torch.Tensor) and made.check.images != 4 + len(some):
        raise SilentlyWrong(f"{made.check.images} images are compared")
    if isinstance(some, torch.Tensor) and not plain(some).isfinite().all():
        raise SilentlyWrong("images with NaN are compared")
