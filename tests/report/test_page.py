"""The page as a whole."""

import re
from html.parser import HTMLParser

import pytest

from minitron.errors import MinitronError
from minitron.report import page
from tests.report.run_dirs import evaluation, score_directory, training_run, write_manifest

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects headings, text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.images, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "svg":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())
        self.text += data


@pytest.fixture
def run_dirs(tmp_path):
    parents = {"teacher": {"path": "models/teacher", "fingerprint": "abc123"}}
    width = training_run(tmp_path / "width", [5.0, 3.0], stage="distill", kl=0.5)
    write_manifest(width, "distill", recipe={"train": {"lr": 1e-4}}, parents=parents)
    return [
        score_directory(tmp_path / "scores"),
        width,
        training_run(tmp_path / "random", [6.0, 4.0], finished=False),
        evaluation(tmp_path / "eval", 2.5),
    ]


def test_page_holds_table_plots_and_provenance(run_dirs, tmp_path):
    table = page.write_report(run_dirs, tmp_path / "out" / "report.html")
    parsed = Page((tmp_path / "out" / "report.html").read_text())
    sections = ["Results", "Validation loss", "Training", "Importance", "Runs"]
    assert [heading for heading in parsed.headings if heading in sections] == sections
    assert len(parsed.images) == 4  # validation, two trainings, one score directory
    assert all(image["role"] == "img" and image["aria-label"] for image in parsed.images)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "models/teacher (abc123)" in parsed.text
    assert "torch 2.13.0" in parsed.text
    assert "ranks2" in parsed.text
    assert "lr: 0.0001" in parsed.text
    assert f"launch/script.py --out {run_dirs[1]}\n" in parsed.text
    assert (tmp_path / "out" / "report.md").read_text() == table.markdown()


def test_a_divergence_below_zero_is_explained(tmp_path):
    above = training_run(tmp_path / "above", [5.0, 3.0], kl=0.5)
    below = training_run(tmp_path / "below", [5.0, 3.0], kl=-0.1)
    page.write_report([above, below], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert text.count("a KL estimated from draws of the teacher may be below zero") == 1
    assert "below; a KL" in text


def test_page_needs_no_network(run_dirs, tmp_path):
    page.write_report(run_dirs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)", text)
    addresses = set(re.findall(r"\w+://[^\s\"'<>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names only


def test_older_report_is_replaced_whole_or_not_at_all(run_dirs, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("an earlier page")
    page.write_report(run_dirs[1:2], out)
    newer = out.read_text()
    assert "an earlier page" not in newer

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(RuntimeError, match="no"):
        page.write_report(run_dirs, out)
    assert out.read_text() == newer


def test_sections_without_content_are_left_out(tmp_path):
    page.write_report([score_directory(tmp_path / "scores")], tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text()).headings[:2] == ["Importance", "Runs"]


def test_markup_in_names_and_recipes_is_text(tmp_path):
    run = write_manifest(tmp_path / "<i>run", "train", recipe={"note": "</pre><script>alert(1)"})
    page.write_report([run], tmp_path / "report.html")
    parsed = Page((tmp_path / "report.html").read_text())
    assert "</pre><script>alert(1)" in parsed.text


@pytest.mark.parametrize(
    ("out", "message"), [("report.pdf", "must end in .html"), ("dir.html", "is a directory")]
)
def test_bad_out_is_refused(tmp_path, run_dirs, out, message):
    (tmp_path / "dir.html").mkdir()
    with pytest.raises(MinitronError, match=message):
        page.write_report(run_dirs, tmp_path / out)
