"""Python calls with wrong arguments and strange images, over every method that is found on disk.

What is accepted must be what was given, and the answer must be right: finite, of the host's shape,
and equal to the answer for the same images written plainly.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import patchslim
from attacks._values import EVERY, NUMBERS, TEXTS
from attacks.attack import Attack, Lost, SilentlyWrong
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import PatchslimError
from patchslim.methods._method import method_settings
from patchslim.methods._registry import find_method, method_names
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import Constant, Counts, Rate, Removed, Schedule
from patchslim.testing.trial import noise_images, tiny_host, uneven_images
from patchslim.training.config import TrainConfig

DEPTH, CLASSES, ROWS = 3, 5, 17
LONGEST = 3000  # characters of a message
BUDGET: dict[str, Any] = {"keep_rate": 0.7, "at": (1,)}
# What makes images keep different numbers of patches.
ADAPTIVE = {
    "ats": {"floor": 1},
    "duplicates": {"tolerance": 0.5},
    "similarity": {"threshold": 0.1, "floor": 0.0},
    "tome": {"threshold": 0.5},
}
SUBJECTS = [(name, {}) for name in method_names()] + [*ADAPTIVE.items()]


def attacks() -> Iterator[Attack]:
    """All of them."""
    _ = host(), images()  # once, before any process is forked
    for calls, every in SHARES.items():
        for name, call in itertools.islice(calls(), 0, None, every):
            yield Attack(f"{calls.__name__}: {name}", functools.partial(run, call))


Call = tuple[str, Callable[[Path], object]]


def run(call: Callable[[Path], object], folder: Path) -> None:
    """Runs a call; the message of a refusal must be one that somebody can read."""
    try:
        call(folder)
    except PatchslimError as error:
        if len(str(error)) > LONGEST:
            raise SilentlyWrong(f"a message of {len(str(error))} characters") from error
        raise


@functools.cache
def host() -> nn.Module:
    """The tiny host: 16 patches, three blocks, five classes."""
    return tiny_host()


@functools.cache
def images() -> Tensor:
    """Images of which adaptive methods keep different numbers of patches."""
    return uneven_images(3)


def slimmed(method: str, settings: dict[str, Any] | None = None) -> SlimModel:
    return patchslim.slim(host(), method, **(settings or {}), **BUDGET)


def check_answer(model: SlimModel, given: Tensor | None = None) -> None:
    """The answer is finite and of the right shape, and the counts never rise."""
    counts = model.counts()
    if sorted(counts, reverse=True) != list(counts) or not 1 < counts[-1] <= ROWS:
        raise SilentlyWrong(f"tokens after each block: {counts}")
    some = images() if given is None else given
    with torch.no_grad():
        answer = model(some)
    if answer.shape != (len(some), CLASSES) or not answer.isfinite().all():
        raise SilentlyWrong(f"an answer {tuple(answer.shape)}, finite: {answer.isfinite().all()}")


# Settings of methods.


def settings() -> Iterator[Call]:
    """Every setting of every method, with every value, named in `slim` and made by hand."""
    for method in method_names():
        for name, parameter in inspect.signature(find_method(method)).parameters.items():
            for label, value in EVERY.items():
                if label in ("list of text", "nested list", "tuple of nan", "true tuple", "pair"):
                    continue
                kind = type(parameter.default)
                yield (
                    f"{method} {name}={label}",
                    functools.partial(set_one, method, name, value, kind),
                )
        for label, value in (TEXTS | {"dict": {}, "none": None}).items():
            yield f"{method} without a name={label}", functools.partial(set_unnamed, method, value)


def set_one(method: str, name: str, value: Any, kind: type, _: Path) -> None:
    """What is accepted is what was given; both ways to give it end alike."""
    try:
        made = find_method(method)(**{name: value})
    except PatchslimError:
        made = None
    if made is not None:
        check_setting(made, name, value, kind)
        check_answer(patchslim.slim(host(), made, **BUDGET))
    try:
        named = slimmed(method, {name: value})
    except PatchslimError:
        if made is None:
            raise
        raise SilentlyWrong("refused by name, and accepted from the class") from None
    check_setting(named.method, name, value, kind)
    if made is None:
        raise SilentlyWrong("refused from the class, and accepted by name")


def check_setting(method: Any, name: str, value: Any, kind: type) -> None:
    kept = method_settings(method)[name]
    filled_in = value == "" and kind is str  # a preset fills in settings that are empty
    if not filled_in and (kept != value or isinstance(value, bool) != (kind is bool)):
        raise SilentlyWrong(f"{name}={value!r} became {kept!r}")
    if isinstance(kept, int | float) and not math.isfinite(kept):
        raise SilentlyWrong(f"{name}={value!r} is accepted")


def set_unnamed(method: str, value: Any, _: Path) -> None:
    settings: Any = {value: 1} if isinstance(value, str) else {"settings": value}
    patchslim.slim(host(), method, **settings, **BUDGET)
    raise SilentlyWrong("a setting that no method has is accepted")


# Budgets and schedules.


def budgets() -> Iterator[Call]:
    """Every argument of `slim` and `macs`, with every value."""
    names = ["macs", "keep", "r", "keep_rate", "at", "tail", "schedule", "adapter", "method"]
    for verb in (patchslim.slim, patchslim.macs):
        for name in names:
            for label, value in EVERY.items():
                call = functools.partial(ask, verb, name, value)
                yield f"{verb.__name__} {name}={label}", call
        for label, value in (EVERY | {"none": None, "slimmed": None}).items():
            call = functools.partial(slim_what, verb, label, value)
            yield f"{verb.__name__} model={label}", call
    for method, given in SUBJECTS:
        for name, value in EDGES.items():
            call = functools.partial(ask_method, method, given, dict(value))
            yield f"{method} {'adaptive' if given else ''} {name}", call


EDGES: dict[str, dict[str, Any]] = {
    "all": {"keep": 1.0},
    "hardly any": {"keep": 1e-9},
    "one a block": {"keep": [2, 2, 2]},
    "first block": {"keep_rate": 0.5, "at": (0,)},
    "last block": {"keep_rate": 0.5, "at": (2,)},
    "every block": {"keep_rate": 0.01, "at": (0, 1, 2)},
    "more than there are": {"r": 1000},
    "nothing": {"r": 0},
    "macs of all": {"macs": 1.0},
    "no macs": {"macs": 1e-9},
}


def ask(verb: Callable[..., Any], name: str, value: Any, _: Path) -> None:
    """A budget that is no budget is refused; from a good one comes a model that works."""
    asked: dict[str, Any] = {"method": "tome", name: value}
    if name == "at":
        asked["keep_rate"] = 0.7
    elif name not in ("macs", "keep", "r", "keep_rate", "schedule"):
        asked["r"] = 2
    answer = verb(host(), **asked)
    if name in ("macs", "keep", "keep_rate", "r") and isinstance(value, str | bool | complex):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    if isinstance(answer, SlimModel):
        check_answer(answer)
        plain = [*map(type, method_settings(answer.method).values())]
        if not set(plain) <= {bool, int, float, str}:
            raise SilentlyWrong(f"settings of {plain}")
        Schedule.from_json(answer.schedule.to_json())
    elif not 0 < answer.total <= patchslim.macs(host()).total:
        raise SilentlyWrong(f"operations: {answer.total}")


def ask_method(method: str, given: dict[str, Any], asked: dict[str, Any], _: Path) -> None:
    check_answer(patchslim.slim(host(), method, **given, **asked))


def slim_what(verb: Callable[..., Any], label: str, value: Any, _: Path) -> None:
    verb(slimmed("tome") if label == "slimmed" else value, "tome", r=2)
    raise SilentlyWrong("no host, and it is accepted")


def schedules() -> Iterator[Call]:
    """Rules made by hand, and read from JSON."""
    for label, value in EVERY.items():
        rules: dict[str, Callable[[Any], Schedule]] = {
            "Constant r": Constant,
            "Constant inflect": lambda value: Constant(1, value),
            "Removed r": Removed,
            "Rate rate": lambda value: Rate(value, (1,)),
            "Rate at": lambda value: Rate(0.5, value),
            "Counts kept": lambda value: Counts(value, ROWS, 1),
            "Counts entering": lambda value: Counts((9, 9, 9), value, 1),
            "Counts prefix": lambda value: Counts((9, 9, 9), ROWS, value),
            "from_json": lambda value: Schedule.from_json({"kind": "constant", "r": value}),
            "from_json kind": lambda value: Schedule.from_json({"kind": value, "r": 1}),
            "load": Schedule.load,
        }
        for rule, make in rules.items():
            yield f"{rule}={label}", functools.partial(use_schedule, make, value)


def use_schedule(make: Callable[[Any], Schedule], value: Any, _: Path) -> None:
    schedule = make(value)
    if Schedule.from_json(schedule.to_json()) != schedule:
        raise SilentlyWrong("it does not come back from JSON")
    check_answer(patchslim.slim(host(), "tome", schedule))


# Images.


def plain(t: Tensor) -> Tensor:
    """The same values as an ordinary tensor, in float32."""
    return t.detach().clone().resolve_conj().to_dense().float().contiguous()


INPUTS: dict[str, Callable[[], Any]] = {
    "float64": lambda: images().double(),
    "float16": lambda: images().half(),
    "bfloat16": lambda: images().bfloat16(),
    "int64": lambda: images().long(),
    "uint8": lambda: images().byte(),
    "bool": lambda: images() > 0,
    "complex": lambda: images().to(torch.complex64),
    "meta": lambda: images().to("meta"),
    "sparse": lambda: images().to_sparse(),
    "sparse csr": lambda: torch.zeros(16, 16).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([*images()]),
    "mkldnn": lambda: images().to_mkldnn(),
    "requires grad": lambda: images().clone().requires_grad_(),
    "parameter": lambda: nn.Parameter(images().clone()),
    "channels last": lambda: images().to(memory_format=torch.channels_last),
    "transposed twice": lambda: images().transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda: torch.stack([images()] * 2, dim=4)[..., 0],
    "expanded": lambda: images()[:1].expand(3, -1, -1, -1),
    "flipped": lambda: images().flip(3),
    "empty batch": lambda: images()[:0],
    "one image": lambda: images()[:1],
    "three dimensions": lambda: images()[0],
    "five dimensions": lambda: images().unsqueeze(0),
    "no dimension": lambda: torch.tensor(1.0),
    "one channel": lambda: images()[:, :1],
    "four channels": lambda: torch.cat([images(), images()[:, :1]], dim=1),
    "no channel": lambda: images()[:, :0],
    "channels at the end": lambda: images().permute(0, 2, 3, 1),
    "too large": lambda: noise_images(2, size=32),
    "too small": lambda: noise_images(2, size=8),
    "one pixel off": lambda: noise_images(2, size=17),
    "no height": lambda: images()[:, :, :0],
    "no pixels": lambda: images()[:, :, :0, :0],
    "nan in one": lambda: poisoned(math.nan),
    "infinite in one": lambda: poisoned(math.inf),
    "all nan": lambda: torch.full((2, 3, 16, 16), math.nan),
    "all zero": lambda: torch.zeros(2, 3, 16, 16),
    "all the same": lambda: torch.ones(2, 3, 16, 16),
    "very large values": lambda: images() * 1e30,
    "very small values": lambda: images() * 1e-40,
    "numpy": lambda: images().numpy(),
    "none": lambda: None,
    "text": lambda: "cat.jpg",
    "long text": lambda: "x" * 100_000,
    "list": lambda: [*images()],
    "tuple": lambda: (images(),),
    "dict": lambda: {"pixel_values": images()},
    "number": lambda: 3,
}


def poisoned(value: float) -> Tensor:
    bad = images().clone()
    bad[1, 0, 0, 0] = value
    return bad


def inputs() -> Iterator[Call]:
    """Every strange batch, for every method, to every public call that takes images."""
    for method, given in SUBJECTS:
        for label, make in INPUTS.items():
            name = f"{method} {'adaptive' if given else ''} {label}"
            yield name, functools.partial(show_images, method, given, make)
    calls = ("trace", "macs_of", "forward_features", "forward_intermediates", "forward_with_costs")
    for call in calls:
        for method, given in (("evit", {}), ("tome", ADAPTIVE["tome"])):
            for label, make in INPUTS.items():
                name = f"{call} of {method}: {label}"
                yield name, functools.partial(call_with, call, method, given, make)
    for dtype in (torch.float64, torch.bfloat16):
        for method, given in SUBJECTS:
            name = f"{method} {'adaptive' if given else ''} of {dtype}"
            yield name, functools.partial(show_to_other_type, method, given, dtype)
    for label, value in EVERY.items():
        yield f"an option={label}", functools.partial(give_option, value)


def show_images(method: str, given: dict[str, Any], make: Callable[[], Any], _: Path) -> None:
    """What is taken is answered as the same values in a plain tensor are."""
    model, some = slimmed(method, given), make()
    with torch.no_grad():
        answer = model(some)
    if some.dtype != torch.float32:
        raise SilentlyWrong(f"{some.dtype} is taken by a host of float32")
    if answer.shape != (len(some), CLASSES):
        raise SilentlyWrong(f"an answer of shape {tuple(answer.shape)}")
    with torch.no_grad():
        wanted = model(plain(some))
    finite = plain(some).flatten(1).isfinite().all(dim=1)
    if not len(some):
        return
    if not torch.allclose(answer[finite], wanted[finite], atol=1e-4, rtol=1e-4, equal_nan=True):
        raise SilentlyWrong("another answer than for the plain tensor")
    if not finite.all() and finite.any():
        with torch.no_grad():
            alone = model(plain(some)[finite])
        if not torch.allclose(answer[finite], alone, atol=1e-4, rtol=1e-4, equal_nan=True):
            raise SilentlyWrong("a bad image changes the answer for a good one")
    if (~finite).any() and answer[~finite].isfinite().all():
        raise SilentlyWrong("an image with NaN gets a finite answer")


def call_with(
    call: str, method: str, given: dict[str, Any], make: Callable[[], Any], _: Path
) -> None:
    """The calls beside `model(images)` take and refuse the same."""
    model, some = slimmed(method, given), make()
    with torch.no_grad():
        answer = getattr(model, call)(some)
        model(some)
    if call == "forward_features" and answer.shape[:2] != (len(some), ROWS):
        raise SilentlyWrong(f"features of shape {tuple(answer.shape)}")
    if call == "macs_of" and len(answer) != len(some):
        raise SilentlyWrong(f"{len(answer)} costs")
    if call == "trace" and any(len(each.x) != len(some) for each in answer if not each.borders):
        raise SilentlyWrong("tokens of another batch")


def show_to_other_type(method: str, given: dict[str, Any], dtype: torch.dtype, _: Path) -> None:
    """A host of another type takes images of its type, none of them too, and refuses others."""
    model = patchslim.slim(tiny_host().to(dtype), method, **given, **BUDGET)
    with torch.no_grad():
        for some in (images().to(dtype), images()[:0].to(dtype)):
            answer = model(some)
            if answer.shape != (len(some), CLASSES) or answer.dtype != dtype:
                raise SilentlyWrong(f"{answer.dtype} {tuple(answer.shape)}")
    model(images())
    raise SilentlyWrong("images of another type are taken")


def give_option(value: Any, _: Path) -> None:
    options: Any = {value: 1} if isinstance(value, str) else {"options": value}
    slimmed("tome")(images(), **options)
    if value is False:
        return  # to ask for nothing is no request
    raise SilentlyWrong("an option that the host does not have is ignored")


def sizes() -> Iterator[Call]:
    """Image sizes, indices of blocks and the like, of a slimmed model's other calls."""
    for label, value in EVERY.items():
        for call in ("counts", "macs", "dense_macs"):
            yield f"{call} size={label}", functools.partial(ask_size, call, value)
            pair = functools.partial(ask_size, call, (value, 16))
            yield f"{call} height={label}", pair
        yield f"trace blocks={label}", functools.partial(trace_blocks, value)
        for name in ("indices", "output_fmt"):
            yield f"features {name}={label}", functools.partial(ask_features, name, value)


def ask_size(call: str, size: Any, _: Path) -> None:
    answer = getattr(slimmed("tome"), call)(size)
    whole = all(isinstance(each, int) for each in size)
    if not whole or any(isinstance(each, bool) for each in size):
        raise SilentlyWrong(f"a size of {size!r} is taken: {answer}")


def trace_blocks(value: Any, _: Path) -> None:
    traced = slimmed("tome").trace(images(), value)
    if isinstance(value, bool) or len(traced) != value:
        raise SilentlyWrong(f"{value!r} blocks give {len(traced)}")


def ask_features(name: str, value: Any, _: Path) -> None:
    maps = slimmed("tome").forward_intermediates(
        images(), **{name: value, "intermediates_only": True}
    )
    if name == "output_fmt" or isinstance(value, bool):
        raise SilentlyWrong(f"{name}={value!r} is taken")
    if any(each.shape[2:] != (4, 4) for each in maps):
        raise SilentlyWrong("features of another shape")


# Settings of training and of calibration, and the verbs that take them.


def configs() -> Iterator[Call]:
    """Every field of both settings classes, with every value."""
    for config in (TrainConfig, PatchSlimmingConfig):
        for each in fields(config):
            for label, value in (NUMBERS | TEXTS | {"list": [1], "none": None}).items():
                name = f"{config.__name__} {each.name}={label}"
                yield name, functools.partial(make_config, config, each.name, value)


# Above these, training does something that nobody can want.
NONSENSE = {
    "epochs": 1e6,
    "lr": 1e6,
    "weight_decay": 1e3,
    "host_lr": 1e6,
    "clip": 1e30,
    "temperature": 1e6,
    "labels": 1e9,
    "distil_weight": 1e9,
    "tokens": 1e9,
    "mixup": 1e6,
    "cutmix": 1e6,
    "jitter": 1e3,
    "cover": 1e9,
    "slack": 1e9,
}


def make_config(config: type, name: str, value: Any, _: Path) -> None:
    made = config(**{name: value})
    kept = getattr(made, name)
    usual = getattr(config(), name)
    if value is None:
        if kept != usual:
            raise SilentlyWrong(f"{name}=None became {kept!r}")
        return
    kinds = (int, float) if type(usual) is float else (type(usual),)  # as everywhere in Python
    if kept != value or type(kept) not in kinds:
        raise SilentlyWrong(f"{name}={value!r} became {kept!r}")
    if isinstance(kept, float) and not abs(kept) <= NONSENSE.get(name, 1.0):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    if isinstance(kept, int) and kept > 2**53:
        raise SilentlyWrong(f"{name}={value!r} is accepted")


def verbs() -> Iterator[Call]:
    """Arguments of `measure`, `calibrate`, `train` and `bench`, and batches that are none."""
    for label, value in EVERY.items():
        for verb, names in ARGUMENTS.items():
            for name in names.split():
                if name not in CALLED[verb] or label not in OF_THEIR_OWN:
                    yield f"{verb.__name__} {name}={label}", functools.partial(verb, name, value)
        yield f"method_names {label}", functools.partial(find_by_name, value)
    for label, make in INPUTS.items():
        for verb in ARGUMENTS:
            yield (
                f"{verb.__name__} batches of {label}",
                functools.partial(give_batches, verb, make),
            )


def bench(name: str, value: Any, folder: Path) -> None:
    given: dict[str, Any] = {
        "models": host(),
        "images": batches(),
        "methods": ["topk"],
        "budgets": [0.7],
        "rounds": 0,
        "out": folder / "run",
    }
    found = patchslim.bench(**given | {name: value})
    if not found.rows:
        raise SilentlyWrong(f"bench accepted {name}, and has {len(found.rows)} rows")
    if any(row.kl is None or not math.isfinite(row.kl.value) for row in found.rows):
        raise SilentlyWrong("a KL that is no number")


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.tensor([0, 1, 2]))]


def measure(name: str, value: Any, _: Path) -> None:
    given: dict[str, Any] = {
        "model": slimmed("topk"),
        "images": batches(),
        "repeats": 0,
        "batch": 2,
        "baseline": False,
    }
    if name == "repeats" and value == 3:
        return
    report = patchslim.measure(**given | {name: value})
    whole = isinstance(value, Integral)
    if isinstance(value, bool) or (name in ("batch", "repeats") and not whole):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    for row in report.rows:
        if row.accuracy is not None and not 0 <= row.accuracy.value <= 1:
            raise SilentlyWrong(f"accuracy {row.accuracy}")


def calibrate(name: str, value: Any, folder: Path) -> None:
    given: dict[str, Any] = {"host": host(), "images": batches(), "method": "tome", "macs": 0.9}
    if name == "agreement":
        del given["macs"]
    result = patchslim.calibrate(**given | {name: value})
    if isinstance(value, bool | str) and name not in ("method", "out"):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    check_answer(result.model)
    if name == "out" and not list(folder.rglob("recipe.json")):
        raise Lost("nothing was written")


def train(name: str, value: Any, folder: Path) -> None:
    """Short of a real training, which a broken argument must not get to."""
    usual = TrainConfig(steps=1, batch=2, workers=0, validate=1)
    given: dict[str, Any] = {
        "slimmed": slimmed("topk"),
        "images": batches(),
        "config": usual,
        "out": folder / "run",
    }
    result = patchslim.train(**given | {name: value})
    if name in ("slimmed", "config", "teacher"):
        raise SilentlyWrong(f"{name}={value!r} is accepted")
    check_answer(result.model)


# Which arguments are tried, and which of those are called, so that what they raise is theirs.
ARGUMENTS: dict[Callable[[str, Any, Path], None], str] = {
    measure: "model images dense batch repeats seed progress",
    calibrate: "host images method macs agreement cap schedule config out progress",
    train: "slimmed images config out validation teacher progress",
    bench: "models images methods budgets runtimes precisions batches calibration corruptions "
    "rounds threads seed out progress",
}
CALLED = dict.fromkeys(ARGUMENTS, ("progress",)) | {bench: ("progress", "images", "calibration")}
OF_THEIR_OWN = ("class", "module", "function")


def give_batches(verb: Callable[..., None], make: Callable[[], Any], folder: Path) -> None:
    some = make()
    counted = isinstance(some, Tensor) and not some.is_nested and some.ndim
    labels = torch.arange(len(some)) % CLASSES if counted else None
    verb("images", [(some, labels)], folder)


def find_by_name(value: Any, _: Path) -> None:
    find_method(value)
    raise SilentlyWrong(f"{value!r} is a method")


# Places to write to.


def saves() -> Iterator[Call]:
    """Folders that cannot be written to, for all that writes."""
    places: dict[str, Any] = TEXTS | {
        "none": None,
        "number": 3,
        "root": "/",
        "under a file": "file/model",
        "a file": "file",
        "not a folder of ours": "full",
        "in proc": "/proc/nothing/model",
        "nobody's home": "~nobody-at-all/model",
        "long name": "n" * 300,
        "long path": "/".join("n" * 200 for _ in range(100)),
        "dots": "..",
        "dev null": "/dev/null",
    }
    for label, place in places.items():
        for verb in ("save", "save_pretrained", "report", "csv", "schedule", "load", "train"):
            if verb == "train" and label in ("root", "dots"):
                continue  # good places, and not in the attack's own folder
            yield f"{verb} at {label}", functools.partial(save, verb, place)


def save(verb: str, place: Any, folder: Path) -> None:
    """What was there stays, and nothing half written is left."""
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    try:
        write(verb, place)
    finally:
        if (folder / "file").read_text() != "mine" and place != "file":
            raise Lost("file")
        if not (folder / "full" / "thesis.txt").is_file():
            raise Lost("full/thesis.txt")
        left = [path.name for path in folder.rglob(".*")]
        if left:
            raise Lost(f"left behind: {left}")


def write(verb: str, place: Any) -> None:
    if verb == "load":
        patchslim.load(place)
        raise SilentlyWrong("it is loaded")
    model = slimmed("topk")
    if verb in ("save", "save_pretrained"):
        getattr(model, verb)(place)
        check_answer(patchslim.load(place))
    elif verb == "schedule":
        model.schedule.save(place)
        if Schedule.load(place) != model.schedule:
            raise SilentlyWrong("another schedule")
    elif verb == "train":
        # Where nothing can be written, no step is taken.
        good = place in (".", "..", "full", "0.6") or place in TEXTS.values()
        config = TrainConfig(steps=1 if good else 10**6, batch=2, workers=0)
        patchslim.train(model, batches(), config, out=place)
    else:
        report = patchslim.measure(model, repeats=0, batch=2, baseline=False)
        (report.save if verb == "report" else report.save_csv)(place)
        if not Path(place).read_text():
            raise Lost("an empty file")


# Of some 8,000 calls every so-manieth is tried. None of these numbers divides the number of values,
# so every argument meets some values, and every value some arguments.
SHARES: dict[Callable[[], Iterator[Call]], int] = {
    settings: 5,
    budgets: 7,
    schedules: 5,
    inputs: 5,
    sizes: 5,
    configs: 11,
    verbs: 9,
    saves: 2,
}
