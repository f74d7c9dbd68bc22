"""The page about a run: complete, safe, drawn from what was recorded."""

import json
import math
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlx_trainer.monitoring import JsonLines, MonitoringError, write_atomic, write_report
from mlx_trainer.monitoring.charts import line_chart, nice_ticks

HOSTILE = "<script>alert('x')</script> & \"more\""


class Tags(HTMLParser):
    """Collect tags, attributes and the balance of what was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that has to be closed, except HTML's `meta`."""
        self.names.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        """Refuse a tag that does not close the last one opened."""
        assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A small run: loss with a NaN, a metric named by somebody hostile, two samples of one prompt."""
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        for step, loss in [(1, 3.0), (2, math.nan), (3, 2.0), (4, 2.5)]:
            lines.write({"step": step, "train/loss": loss, "train/lr": 1e-4 * step, HOSTILE: 1.0})
        lines.write({"step": 4, "val/loss": 2.75})
    with JsonLines(tmp_path / "samples.jsonl") as lines:
        for step, text in [(0, "before"), (2, "midway"), (4, HOSTILE)]:
            lines.write({"step": step, "prompt": HOSTILE, "generated_text": text, "reference": "the truth"})
    write_atomic(tmp_path / "config.yaml", f"name: {HOSTILE}\n")
    write_atomic(tmp_path / "environment.json", '{"device": "a <b>", "packages": {"mlx": "1.2", "none": null}}')
    return tmp_path


def test_everything_recorded_is_on_the_page_and_nothing_of_it_is_markup(run_dir: Path) -> None:
    """Tags are balanced, hostile text is escaped wherever it stands, and no script or address is on the page."""
    page = write_report(run_dir).read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "b"} & set(tags.names)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in tags.attributes}
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "a &lt;b&gt;" in page
    assert "mlx 1.2\nnone –" in page


SPANS = [
    {"text": f"\n{HOSTILE}\x1b[2J\r\x00 ", "trained": False},
    {"text": f"{HOSTILE} \t\u202e</pre>", "trained": True},
    {"text": " [… 5 characters left out …] ", "trained": None},
]
DATA = {
    "rows": 12345,
    "bad_rows": 1,
    "leaked_rows": 3,
    "trained_share": 0.25,
    "padding_share": 0.031,
    "positions_per_token": 1.0321,
    "shapes": 2,
    "used_shapes": [{"rows": 4, "length": 1024, "positions": 4096, "batches": 7}],
    "layout": "padded",
    "warnings": [f"1 of 12,345 rows cannot be used: {HOSTILE}"],
    "examples": [{"source": f"{HOSTILE}.jsonl:1", "spans": SPANS}],
}


def test_the_data_has_a_section_of_its_own(tmp_path: Path) -> None:
    """Figures, warnings and rows with their trained text marked; whatever a row holds stays text."""
    write_atomic(tmp_path / "environment.json", json.dumps({"device": "cpu", "data": DATA}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in tags.names
    figures = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))
    assert figures == {
        "read": "12,345",
        "bad": "1",
        "held out and trained too": "3",
        "share that is trained": "25.0%",
        "padding": "3.1%",
        "positions computed per token": "1.03",
        "distinct shapes": "2",
        "layout": "padded",
        "device": "cpu",
    }
    assert "<td>4</td><td>1,024</td><td>4,096</td><td>7</td>" in page
    hostile = escape(HOSTILE)
    assert f"<li>1 of 12,345 rows cannot be used: {hostile}</li>" in page
    assert f'<h3>{hostile}.jsonl:1, <mark class="trained">trained text</mark> marked</h3>' in page
    assert (
        f"<pre><mark>\n{hostile}\\x1b[2J\\r\\x00 </mark>"
        f'<mark class="trained">{hostile} \t\\u202e&lt;/pre&gt;</mark>'
        '<mark class="remark"> [… 5 characters left out …] </mark></pre>'
    ) in page
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page) is None


@pytest.mark.parametrize(
    "data", ["sha256:12", {}, {"rows": None}, {"examples": [1, {"spans": 2}, {"spans": [3]}], "used_shapes": ["x", {}]}]
)
def test_other_data_in_the_environment_is_no_error(data: object, tmp_path: Path) -> None:
    """A program may write what it likes there; a page is made all the same."""
    write_atomic(tmp_path / "environment.json", json.dumps({"device": "cpu", "data": data}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert Tags(page).open == []
    assert ("sha256:12" in page) == (data == "sha256:12")


def test_figures_and_samples_are_the_recorded_ones(run_dir: Path) -> None:
    """The table has first, last, extremes with their steps and the median; samples show before, after and reference."""
    page = write_report(run_dir).read_text(encoding="utf-8")
    cells = re.search(r"<tr><td>train/loss</td>(.*?)</tr>", page)
    assert cells is not None
    assert re.findall(r"<td>(.*?)</td>", cells[1]) == ["3", "2.5", "2", "3", "3", "1", "2.5"]
    assert "before" in page
    assert "the truth" in page
    assert "midway" not in page
    assert "<h4>step 0</h4>" in page
    assert "<h4>step 4</h4>" in page


def test_a_run_without_files_has_a_page_too_and_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The page says that nothing was recorded; a folder that is not there is an error."""
    assert "Nothing was recorded." in write_report(tmp_path).read_text()
    with pytest.raises(MonitoringError, match=r"there is no run folder .*absent"):
        write_report(tmp_path / "absent")


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    """A NaN in the middle makes two lines; the points sit where their values belong."""
    chart = line_chart("Loss", {"a": ([0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 1.0, 0.0]), "b": ([4], [0.5])})
    lines = re.findall(r'<polyline class="line s0" points="([^"]*)"', chart)
    points = [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]
    assert [len(line) for line in points] == [2, 2]
    (left, bottom), (_, top) = points[0]
    (_, top_again), (right, bottom_again) = points[1]
    assert (top, bottom) == (top_again, bottom_again)
    assert top < bottom
    assert left < right
    assert chart.count('class="mark s1"') == 1


def test_many_points_are_thinned_to_means_of_neighbours() -> None:
    """Ten thousand points become at most 600, and a constant stays the constant that it is."""
    chart = line_chart("Loss", {"a": (range(10_000), [2.0] * 10_000)})
    (line,) = re.findall(r'<polyline class="line s0" points="([^"]*)"', chart)
    pairs = [pair.split(",") for pair in line.split()]
    assert 500 < len(pairs) <= 600
    assert len({y for _, y in pairs}) == 1


def test_a_metric_that_was_never_finite_is_told() -> None:
    """Where nothing can be drawn the chart says why."""
    assert "no finite value" in line_chart("Loss", {"a": ([1, 2], [math.nan, math.inf])})


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 500], [0, 100, 200, 300, 400, 500]),
        ([0.13, 0.47], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([-3, 4], [-4, -2, 0, 2, 4]),
        ([7, 7], [6, 8]),
        ([0, 0], [0, 0.2]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values: list[float], ticks: list[float]) -> None:
    """The ticks are 1, 2 or 5 times a power of ten apart and reach around the data, a single value included."""
    assert nice_ticks(values) == ticks
