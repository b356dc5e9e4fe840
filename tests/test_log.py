"""The log of an interrupted and resumed run is the log of an uninterrupted run."""

from __future__ import annotations

import builtins
import math

import pytest

from patchslim.errors import BadFile, MissingExtra
from patchslim.runs.log import LOG_FILE, Log, read_log

COLUMNS = ("loss", "lr", "val_loss")


def numbers(step):
    values = {"loss": 1 / step, "lr": 0.1 * step}
    return values | {"val_loss": 2 / step} if step % 3 == 0 else values


def write_log(folder, steps, *, after=0, tensorboard=False):
    with Log(folder, COLUMNS, tensorboard=tensorboard, after=after) as log:
        for step in steps:
            log.write(step, numbers(step))


def test_rows_come_back_as_they_were_given(tmp_path):
    write_log(tmp_path / "new", range(1, 4))
    rows = read_log(tmp_path / "new" / LOG_FILE)
    assert rows == [{"step": step, "val_loss": None, **numbers(step)} for step in (1, 2, 3)]


def test_a_row_is_in_the_file_at_once_and_need_not_be_finite(tmp_path):
    log = Log(tmp_path, COLUMNS, tensorboard=False, after=0)
    log.write(1, {"loss": math.nan, "lr": math.inf})
    (row,) = read_log(tmp_path / LOG_FILE)
    log.close()
    assert math.isnan(row["loss"])
    assert row["lr"] == math.inf


@pytest.mark.parametrize("after", [0, 3, 4, 6])
@pytest.mark.parametrize("torn", [0, 1, 5, 17])
def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path, after, torn):
    write_log(tmp_path / "whole", range(1, 9))
    whole = (tmp_path / "whole" / LOG_FILE).read_bytes()
    write_log(tmp_path / "cut", range(1, 8))
    cut = tmp_path / "cut" / LOG_FILE
    cut.write_bytes(cut.read_bytes()[: -torn or None])
    write_log(tmp_path / "cut", range(after + 1, 9), after=after)
    assert cut.read_bytes() == whole
    assert [entry.name for entry in (tmp_path / "cut").iterdir()] == [LOG_FILE]


def test_a_half_written_row_is_no_row(tmp_path):
    write_log(tmp_path, range(1, 4))
    path = tmp_path / LOG_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert [row["step"] for row in read_log(path)] == [1, 2]


def test_resuming_where_there_is_no_log_begins_one(tmp_path):
    write_log(tmp_path, [5], after=4)
    assert [row["step"] for row in read_log(tmp_path / LOG_FILE)] == [5]


def test_names_are_known_from_the_start(tmp_path):
    with Log(tmp_path, COLUMNS, tensorboard=False, after=0) as log:
        with pytest.raises(ValueError, match="no column 'accuracy'"):
            log.write(1, {"accuracy": 1.0})
        log.write(1, numbers(1))
    with pytest.raises(BadFile, match=r"columns step, loss, lr, val_loss; this run logs step, kl"):
        Log(tmp_path, ("kl",), tensorboard=False, after=1)
    assert len(read_log(tmp_path / LOG_FILE)) == 1


def test_files_that_are_no_log(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(BadFile, match="cannot be read"):
        read_log(path)
    for text in ("step,loss\n1,2,3\n", "step,loss\none,2\n", "step\n\x00\n"):
        path.write_text(text)
        with pytest.raises(BadFile, match="not a log"):
            read_log(path)
    with pytest.raises(BadFile, match="Could not write the log"):
        Log(path, COLUMNS, tensorboard=False, after=0)


@pytest.mark.parametrize("small_disk", ["16k"], indirect=True)
def test_a_full_disk_raises_at_the_row_that_does_not_fit(small_disk):
    with pytest.raises(BadFile, match=r"(?i)no space left.*from the last checkpoint"):
        write_log(small_disk, range(1, 10_000))
    rows = [row["step"] for row in read_log(small_disk / LOG_FILE)]
    assert len(rows) > 100
    assert rows == list(range(1, len(rows) + 1))


# --- TensorBoard


def test_missing_tensorboard_is_reported_before_training(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'patchslim\[train\]'"):
        Log(tmp_path / "new", COLUMNS, tensorboard=True, after=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_tensorboard_shows_the_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_log(tmp_path, range(1, 6), tensorboard=True)
    write_log(tmp_path, range(4, 8), after=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr"):
        rows = {each.step: each.value for each in events.Scalars(name)}
        assert rows == pytest.approx({step: numbers(step)[name] for step in range(1, 8)})
        assert [each.step for each in events.Scalars(name)] == list(range(1, 8))
