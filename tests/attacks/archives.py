"""Zips, tars, shards and data sets: sound ones, which must be read right, and hostile ones.

Where sound images lie in an archive beside one bad member, they are read and it is named; where the
index itself is bad, the archive is refused. Nothing is ever written outside of it.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from archive_judge import PIXELS, PNGS, SOUND, SPECIAL, Make, Run, Runs
from attacks.attack import Attack, Lost, SilentlyWrong
from hostile_tars import Members, member, tar_of, tars
from hostile_zips import zips
from patchslim.cli.main import main
from patchslim.data.hf_dataset import Dataset
from patchslim.data.images import Images
from patchslim.data.source import Source
from patchslim.data.webdataset import Shards, is_shards
from patchslim.errors import PatchslimError
from patchslim.hosts._preprocessing import Preprocessing
from picture_judge import EXACT, PLAIN, as_floats, check_reason, compare, watch_memory

PREPARED = Preprocessing(**PLAIN)
CELLS: list[Any] = [{"bytes": data, "path": None} for data in PNGS]


def attacks() -> Iterator[Attack]:
    PREPARED.transform()  # imports timm here, and not in each child
    for runs in (zips(), tars(), shards(), data_sets(), commands()):
        for name, run in runs:
            yield Attack(name, run)


def make_shard(members: dict[str, bytes], more: Members = ()) -> bytes:
    """A tar of exactly these members."""
    sound = (member(name, data) for name, data in members.items())
    return tar_of([*sound, *more], tarfile.GNU_FORMAT)


def check_source(source: Source, labels: list[int], bad: int = 0) -> None:
    """The source gives the sound images in order, with these labels, and names the bad ones."""
    batches = list(source)
    if len(source.unreadable) != bad:
        raise Lost(f"named: {source.unreadable}")
    for line in source.unreadable:
        check_reason(line, line)
    got = [label for _, some in batches for label in ([] if some is None else some.tolist())]
    pixels = [one for some, _ in batches for one in some]
    if got != labels:
        raise SilentlyWrong(f"labels {got} instead of {labels}")
    for number, (one, wanted) in enumerate(zip(pixels, PIXELS, strict=False)):
        compare(str(number), one, as_floats(wanted), EXACT)


def _shard(folder: Path, data: bytes, wanted: list[int] | None, bad: int = 0) -> None:
    """Reads one shard; with `wanted` None it has to be refused."""
    (folder / "a.tar").write_bytes(data)
    with watch_memory("a.tar"):
        is_shards(folder)
        check_source(Shards(folder, prepared=PREPARED), wanted or [], bad)
    if wanted is None:
        raise SilentlyWrong("it was read")


LABELS = {f"{number}.cls": str(number).encode() for number in range(4)}
LABELLED = {**{f"{number}.png": data for number, data in enumerate(PNGS)}, **LABELS}
UNLABELLED = {name: data for name, data in LABELLED.items() if name not in LABELS}
BAD_NUMBERS = {
    "huge": b"1" + b"0" * 30, "digits": b"1" * 5000, "underscore": b"1_0", "negative": b"-1",
    "float": b"1.5", "empty": b"", "text": b"ant", "nan": b"nan", "binary": b"\xff\xfe",
    "plus": b"+1", "two": b"1 2", "2**31": str(2**31).encode(), "2**63": str(2**63).encode(),
    "large": b"1" + b" " * (1 << 20),
}  # fmt: skip
BAD_JSON = {
    "deep": b"[" * 100_000, "list": b"[1]", "number": b"1", "bool": b'{"label": true}',
    "float": b'{"label": 1.0}', "text": b'{"label": "1"}', "null": b'{"label": null}',
    "huge": b'{"label": 1e400}', "nan": b'{"label": NaN}', "none": b"{}", "cut": b'{"lab',
    "large": b'{"label": 1' + b"0" * 40 + b"}",
}  # fmt: skip
PATTERNS = {
    "billion": "{0..999999999}", "10**30": "{0..1" + "0" * 30 + "}", "many": "{0..9}" * 12,
    "product": "{0..99999}{0..99999}", "down": "{9..0}", "empty": "{..}", "letters": "{a..z}",
    "digits": "{0..9" + "9" * 5000 + "}", "width": "{" + "0" * 5000 + "..1}", "comma": "{a,b}",
    "nested": "{{0..1}..{0..9}}", "stars": "**x*.tar", "bracket": "[.tar", "null": "\0{0..1}",
    "long": "x" * 5000 + "{0..1}", "other": "{0..3}", "unicode": "{\u0660..\u0663}",
}  # fmt: skip
ADDRESSES = ("pipe:touch ran", "http://x/{0..9}.tar", "s3://x", "file:a.tar", "~nouser/a.tar",
    "~nouser/{0..9}.tar", "\0", "x" * 5000, "")  # fmt: skip


def shards() -> Runs:
    """Attacks by WebDataset shards, their labels and their patterns."""

    def shard(
        members: dict[str, bytes], wanted: list[int] | None, bad: int = 0, more: Members = ()
    ) -> Run:
        return partial(_shard, data=make_shard(members, more), wanted=wanted, bad=bad)

    right = [0, 1, 2, 3]
    in_json = {f"{number}.json": b'{"label": 1}' for number in range(4)}
    yield "shard/sound", shard(LABELLED, right)
    yield "shard/json", shard({**UNLABELLED, **in_json}, [1, 1, 1, 1])
    yield "shard/no-labels", shard(UNLABELLED, [])
    for kind, text in BAD_NUMBERS.items():
        yield f"shard/cls-{kind}", shard({**LABELLED, "1.cls": text}, None)
    for kind, text in BAD_JSON.items():
        yield f"shard/json-{kind}", shard({**UNLABELLED, **in_json, "1.json": text}, None)
    yield "shard/only-labels", shard(LABELS, None)
    ninth = {**LABELLED, "9.cls": b"9"}
    yield "shard/no-image", shard(ninth, right, 1)
    yield "shard/bad-image", shard({**ninth, "9.png": b"x"}, right, 1)
    link = member("9.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd")
    yield "shard/link", shard(ninth, right, 1, [link])
    yield "shard/twice", shard(LABELLED, None, 0, [member("0.png", PNGS[1])])
    yield "shard/size", shard(ninth, None, 0, [member("9.png", size=1 << 40)])
    for kind, pattern in PATTERNS.items():
        yield f"pattern/{kind}", partial(_pattern, pattern=pattern)
    for address in ADDRESSES:
        yield f"address/{address[:20]!r}", partial(_address, address=address)
    for kind, make in SPECIAL.items():
        yield f"shard/special-{kind}", partial(_special_shard, make=make)


def _pattern(folder: Path, pattern: str) -> None:
    for number in range(4):
        members = {"0.png": PNGS[number], "0.cls": b"%d" % number}
        (folder / f"{number}.tar").write_bytes(make_shard(members))
    path = f"{folder}/{pattern}" + ("" if pattern.endswith(".tar") else ".tar")
    is_shards(path)
    check_source(Shards(path, prepared=PREPARED), [0, 1, 2, 3])
    if pattern not in ("{0..3}", "{\u0660..\u0663}"):
        raise SilentlyWrong("it was read")


def _address(folder: Path, address: str) -> None:
    with suppress(PatchslimError):
        is_shards(address)
    for kind in (lambda: Shards(address, prepared=PREPARED), lambda: Images(address, **PLAIN)):
        try:
            check_source(kind(), [])
        except PatchslimError:
            continue
        raise SilentlyWrong("it was read")
    if any(folder.iterdir()):
        raise SilentlyWrong("something was written")


def _special_shard(folder: Path, make: Make) -> None:
    make(folder / "a.tar")
    with watch_memory("a.tar"):
        is_shards(folder)
        Shards(folder, prepared=PREPARED)
    raise SilentlyWrong("it was read")


def _rows(cells: list[dict[str, Any]], labels: list[int]) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def _saved(folder: Path, cells: list[dict[str, Any]], labels: list[int]) -> Path:
    _rows(cells, labels).save_to_disk(str(folder / "saved"))
    return folder / "saved"


CELLS = [{"bytes": data, "path": None} for data in PNGS]


def _row(folder: Path, cell: Callable[[Path], dict[str, Any]]) -> None:
    rows = _rows([*CELLS, cell(folder / "x")], [0, 1, 2, 3, 4])
    with watch_memory("x"):
        check_source(Dataset(rows, prepared=PREPARED), [0, 1, 2, 3], 1)


def _damaged_set(folder: Path, file: str, spoil: Make) -> None:
    path = _saved(folder, CELLS, [0, 1, 2, 3])
    (target,) = path.glob(file)
    spoil(target)
    with watch_memory(file):
        check_source(Dataset(path, prepared=PREPARED), [0, 1, 2, 3])
    raise SilentlyWrong("it was read")


def _replace(path: Path, make: Make) -> None:
    path.unlink()
    make(path)


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


BAD_CELLS: dict[str, Any] = {
    "none": None, "empty": {"bytes": b"", "path": None}, "text": {"bytes": b"x", "path": None},
    "outside": {"bytes": None, "path": "/etc/passwd"}, "null": {"bytes": None, "path": "a\0b"},
}  # fmt: skip
BAD_FILES = {"deep": b"[" * 100_000, "empty": b"", "list": b"[]", "binary": b"\xff",
    "number": b"1", "null": b"null"}  # fmt: skip
BAD_STATES: tuple[dict[str, Any], ...] = (
    {"_data_files": [{"filename": "../../../etc/passwd"}]}, {"_data_files": 7},
    {"_data_files": []}, {"_data_files": [{}]}, {"_data_files": None},
)  # fmt: skip


def _cell_of_path(path: Path, make: Make) -> dict[str, Any]:
    make(path)
    return {"bytes": None, "path": str(path)}


def data_sets() -> Runs:
    """Attacks by Hugging Face data sets, where that library is installed."""
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
    for kind, make in SPECIAL.items():
        yield f"hf/row-{kind}", partial(_row, cell=partial(_cell_of_path, make=make))
        spoil = partial(_replace, make=make)
        yield f"hf/arrow-{kind}", partial(_damaged_set, file="*.arrow", spoil=spoil)
    for kind, cell in BAD_CELLS.items():
        yield f"hf/row-{kind}", partial(_row, cell=lambda _, cell=cell: cell)
    for file in ("state.json", "dataset_info.json"):
        for kind, text in BAD_FILES.items():
            spoil = partial(Path.write_bytes, data=text)
            yield f"hf/{file}-{kind}", partial(_damaged_set, file=file, spoil=spoil)
    for number, fields in enumerate(BAD_STATES):
        spoil = partial(_edit, **fields)
        yield f"hf/state-{number}", partial(_damaged_set, file="state.json", spoil=spoil)
    for number, features in enumerate(({"image": {"_type": "os.system"}}, {"image": 7}, 7, {})):
        spoil = partial(_edit, features=features)
        yield f"hf/features-{number}", partial(_damaged_set, file="dataset_info.json", spoil=spoil)
    spoil = partial(os.truncate, length=900)
    yield "hf/arrow-cut", partial(_damaged_set, file="*.arrow", spoil=spoil)


def _classes(folder: Path, make: Make, code: int = 2, data: str = "data") -> None:
    """`--classes`: a list of class folders, or an error with exit code 2."""
    for name, image in SOUND.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(image)
    make(folder / "classes")
    place = data if data == "digits" else str(folder / data)
    ended = main(["measure", "digits", "--method", "evit", "--keep", "0.5", "--repeats", "0",
        "--data", place, "--classes", str(folder / "classes"), "--limit", "2"])  # fmt: skip
    if ended != code:
        raise SilentlyWrong(f"exit code {ended}")


def commands() -> Runs:
    """Attacks by the list of classes, on the command line."""
    for kind, make in SPECIAL.items():
        yield f"classes/{kind}", partial(_classes, make=make)
    yield "classes/missing", partial(_classes, make=Path.exists)
    yield "classes/folder", partial(_classes, make=Path.mkdir)
    for kind, data in {"empty": b"", "binary": b"\xff\xfe\0", "others": b"dog\n",
                       "twice": b"ant\nbee\ncat\nant\n"}.items():  # fmt: skip
        yield f"classes/{kind}", partial(_classes, make=partial(Path.write_bytes, data=data))
    for kind, data in {"sound": b"cat\nbee\nant\n",
                       "bom": b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n"}.items():  # fmt: skip
        make = partial(Path.write_bytes, data=data)
        yield f"classes/{kind}", partial(_classes, make=make, code=0)
    good = partial(Path.write_bytes, data=b"cat\nbee\nant\n")
    yield "classes/digits", partial(_classes, make=good, data="digits")
    yield "classes/digits-missing", partial(_classes, make=Path.exists, data="digits")
