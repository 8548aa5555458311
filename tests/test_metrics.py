import io
import logging
import os
import sys

import pytest

from minitron import metrics
from minitron.errors import MinitronError
from minitron.metrics import (
    BYTES,
    MetricsWriter,
    format_markdown,
    format_table,
    progress,
    read_metrics,
)


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


# metrics.jsonl


@pytest.mark.usefixtures("no_tensorboard")
def test_a_record_is_one_line_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, enabled=True)
    writer.write({"step": 1, "loss": 2.5, "tokens": 10**12})
    writer.write({"step": 2, "loss": float("nan"), "lr": float("-inf"), "note": "x"})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 2.5, "tokens": 1000000000000}\n'
        '{"step": 2, "loss": null, "lr": null, "note": "x"}\n'
    )
    writer.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_disabled_writer_touches_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "absent", enabled=False)
    writer.write({"step": 1})
    writer.truncate_after(0)
    writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_tensorboard")
@pytest.mark.parametrize(("append", "steps"), [(True, [1, 2]), (False, [2])])
def test_append_keeps_earlier_records_without_a_cut_line(tmp_path, append, steps):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 7, "lo')
    writer = MetricsWriter(tmp_path, enabled=True, append=append)
    writer.write({"step": 2})
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == steps


@pytest.mark.usefixtures("no_tensorboard")
def test_truncate_after_drops_what_a_resumed_run_repeats(tmp_path):
    writer = MetricsWriter(tmp_path, enabled=True)
    for record in ({"step": 0, "val_loss": 9.0}, {"note": 1}, {"step": 1}, {"step": 2}):
        writer.write(record)
    writer.write({"step": 2, "val_loss": 8.0})
    writer.truncate_after(1)
    writer.write({"step": 2, "loss": 7.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "val_loss": 9.0},
        {"note": 1},
        {"step": 1},
        {"step": 2, "loss": 7.0},
    ]


@pytest.mark.usefixtures("no_tensorboard")
def test_truncate_after_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, enabled=True)
    writer.write({"step": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.truncate_after(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_read_metrics_tolerates_only_a_cut_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(MinitronError, match=f"^{file} line 2 is not a JSON object; delete"):
        read_metrics(file)
    file.write_text("")
    assert read_metrics(file) == []
    with pytest.raises(MinitronError, match=r"nope cannot be read \(No such file or directory\)"):
        read_metrics(tmp_path / "nope")


def test_tensorboard_shows_the_same_numbers_and_forgets_repeated_steps(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    writer = MetricsWriter(tmp_path, enabled=True)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.5)):
        writer.write({"step": step, "loss": loss, "note": "text is left out"})
    writer.truncate_after(1)
    writer.write({"step": 2, "loss": 1.0})
    writer.close()
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 1.0)]


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands for the monotonic clock."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "monotonic", clock)
    return clock


@pytest.fixture
def lines(monkeypatch, caplog):
    """The progress lines that a run without a terminal logs."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, logger="minitron")
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_come_every_ten_seconds_and_at_the_end(clock, lines):
    with progress(total=2_000_000, desc="train", unit="tokens") as bar:
        for second in range(1, 26):
            clock.now = 100.0 + second
            bar.update(12_345, loss=2.34567, stage="warm")
    assert lines() == [
        "train: 6%, 123k/2.00M tokens, 12.3k tokens/s, ETA 02:32, loss 2.346, stage warm",
        "train: 12%, 247k/2.00M tokens, 12.3k tokens/s, ETA 02:22, loss 2.346, stage warm",
        "train: 15%, 309k/2.00M tokens, 12.3k tokens/s, ETA 02:17, loss 2.346, stage warm",
    ]


def test_bytes_take_prefixes(clock, lines):
    with progress(total=40_000_000, desc="write", unit=BYTES) as bar:
        clock.now += 10
        bar.update(39_200_000)
        bar.update(800_000)
    assert lines() == [
        "write: 98%, 39.2M/40.0 MB, 3.92 MB/s, ETA 00:00",
        "write: 100%, 40.0M/40.0 MB, 4.00 MB/s, in 00:10",
    ]


def test_the_rate_leaves_out_what_an_earlier_run_did(clock, lines):
    with progress(total=1000, desc="train", unit="steps", initial=900) as bar:
        clock.now += 20
        bar.update(40)
        clock.now += 30
        bar.update(60)
    assert lines() == [
        "train: 94%, 940/1000 steps, 2 steps/s, ETA 00:30",
        "train: 100%, 1000/1000 steps, 2 steps/s, in 00:50",  # once, although the loop ends here
    ]


def test_one_of_many_leaves_nothing_behind(clock, lines, monkeypatch):
    def short_and_long():
        for seconds in (4, 25):
            for _ in progress(range(5), desc="tasks", unit="requests", transient=True):
                clock.now += seconds / 5

    short_and_long()
    assert lines() == [
        "tasks: 40%, 2/5 requests, 0.20 requests/s, ETA 00:15",
        "tasks: 80%, 4/5 requests, 0.20 requests/s, ETA 00:05",
    ]
    monkeypatch.setattr(sys, "stderr", Terminal())
    short_and_long()
    assert "tasks: 100%" not in sys.stderr.getvalue().rpartition("\r")[2]


def test_an_iterable_brings_its_own_total(clock, lines):
    seen = []
    for item in progress(["a", "b", "c", "d"], desc="read", unit="files"):
        seen.append(item)
        clock.now += 0.5
    assert seen == ["a", "b", "c", "d"]
    assert lines() == ["read: 100%, 4/4 files, 2 files/s, in 00:02"]


def test_an_unknown_total_shows_no_share(clock, lines):
    for _ in progress(iter("abc"), desc="read", unit="files"):
        clock.now += 2
    assert lines() == ["read: 3 files, 0.50 files/s, in 00:06"]


@pytest.mark.parametrize(("enabled", "rank"), [(False, "0"), (None, "1")])
def test_silent_where_disabled(monkeypatch, lines, enabled, rank):
    monkeypatch.setenv("RANK", rank)
    for stderr in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(progress([1, 2], desc="read", enabled=enabled)) == [1, 2]
        assert stderr.getvalue() == ""
    assert lines() == []


def test_a_bar_on_a_terminal(monkeypatch, lines):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(total=2000, desc="train", unit="tokens") as bar:
        bar.update(2000, loss=2.34567)
    text = sys.stderr.getvalue()
    assert "train: 100%" in text
    assert "2.00k/2.00k" in text
    assert " tokens/s" in text
    assert "loss=2.346" in text
    assert lines() == []


# Tables


def test_format_table_aligns_numbers_right():
    rows = [["teacher", 1_234_567, 2.5, None], ["s", 12, None, "5 %"]]
    assert format_table(["model", "parameters", "loss", "note"], rows) == (
        "model    parameters    loss  note\n"
        "-------  ----------  ------  ----\n"
        "teacher   1,234,567  2.5000  -\n"
        "s                12       -  5 %"
    )


def test_format_markdown_holds_the_same_cells():
    rows = [["a", 12345, 2.5], ["b", None, 0.25]]
    assert format_markdown(["model", "parameters", "loss"], rows) == (
        "| model | parameters | loss |\n| :-- | --: | --: |\n"
        "| a | 12,345 | 2.5000 |\n| b | - | 0.2500 |"
    )


def test_format_table_without_rows():
    assert format_table(["a", "bc"], []) == "a  bc\n-  --"


def test_format_table_refuses_a_ragged_row():
    with pytest.raises(ValueError, match="shorter"):
        format_table(["a", "b"], [[1]])


def test_log_is_an_info_line(caplog):
    caplog.set_level(logging.INFO, logger="minitron")
    metrics.log("hello")
    assert caplog.record_tuples == [("minitron", logging.INFO, "hello")]
