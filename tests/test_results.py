"""Result files of measurements: the format of the JSON, the pictures, and the committed files."""

import json
import math
import re

import numpy as np
import pytest

from benchmarks import report, show
from cotolora.results import rounded, save_picture, text, write_json
from tests.support.repository import ROOT, pages

COMMITTED = ROOT / "benchmarks" / "results"
CONTENT = {
    "schema": 1,
    "results": [
        {
            "machine": {"device": "a, b"},
            "settings": {"rows": [1, 2]},
            "rows": [{"n": 1, "s": 0.5}, {"n": 2, "s": None}],
        },
        {"machine": {}, "settings": {}, "rows": []},
    ],
}


def test_a_record_is_one_line_and_so_is_an_object_without_records(tmp_path):
    write_json(tmp_path / "r.json", CONTENT)
    assert (tmp_path / "r.json").read_text().splitlines() == [
        "{",
        ' "schema":1,',
        ' "results":[',
        "  {",
        '   "machine":{"device":"a, b"},',
        '   "settings":{"rows":[1,2]},',
        '   "rows":[',
        '    {"n":1,"s":0.5},',
        '    {"n":2,"s":null}',
        "   ]",
        "  },",
        '  {"machine":{},"settings":{},"rows":[]}',
        " ]",
        "}",
    ]
    assert json.loads((tmp_path / "r.json").read_text()) == CONTENT


def test_changing_one_figure_changes_one_line():
    rows = [{"contender": name, "seconds": seconds} for name, seconds in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3))]
    before = text({"rows": rows}).splitlines()
    rows[1]["seconds"] = 2.5e-3
    after = text({"rows": rows}).splitlines()
    assert [line for line in after if line not in before] == ['  {"contender":"b","seconds":0.0025},']
    assert len(before) == len(after)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.000233993722, "0.00023399"),
        (-99999.6, "-100000.0"),
        (1.0, "1.0"),
        (np.float64(2 / 3), "0.66667"),
        (3e-30, "3e-30"),
        (1234567, "1234567"),
        (True, "true"),
        (None, "null"),
        ((1 / 3, 2), "[0.33333,2]"),
    ],
)
def test_floats_have_five_digits_and_integers_all(value, written):
    assert text(value) == written
    assert json.loads(text(value)) == rounded(value)
    assert rounded(rounded(value)) == rounded(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_json_cannot_represent_leaves_the_old_file(value, tmp_path):
    write_json(tmp_path / "r.json", CONTENT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "r.json", {"rows": [{"seconds": value}]})
    assert json.loads((tmp_path / "r.json").read_text()) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_result_with_the_same_rounded_settings_is_replaced(tmp_path):
    path = tmp_path / "r.json"
    machine = dict.fromkeys(("device", "torch", "triton", "cotolora"), "x")
    for seconds in (1.0, 2.0):
        rows = [{"contender": "ours", "seconds": seconds}]
        report.write(path, report.Result("linear", machine, {"dropout": 0.123456789, "rows": (1, 2)}, rows))
    (found,) = report.read(path)
    assert found.settings == {"dropout": 0.12346, "rows": [1, 2]}
    assert found.rows == [{"contender": "ours", "seconds": 2.0}]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_picture_shows_what_was_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    figure, (axis,) = report.figure(1)
    axis.fill_between([0, 1], [1, 1], color="red")
    path = tmp_path / f"p.{suffix}"
    save_picture(figure, path, dpi=50)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "png":
        picture = matplotlib.image.imread(path)
        assert picture.shape[:2] == (180, 200)
        assert (picture[..., :3] == (1, 0, 0)).all(axis=-1).mean() > 0.5
        assert path.read_bytes()[25] == 3  # a palette's colour type in the header of a PNG
    import matplotlib.pyplot as plt

    plt.close(figure)


@pytest.mark.parametrize("path", sorted(COMMITTED.rglob("*.json")), ids=lambda p: str(p.relative_to(COMMITTED)))
def test_committed_results_have_the_format_of_the_writer(path):
    assert path.read_text() == text(json.loads(path.read_text())) + "\n"


def test_committed_results_are_small():
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= 1.5e6


def test_the_pictures_committed_are_those_that_a_page_shows():
    shown = {
        (page.parent / name).resolve() for page in pages() for name in re.findall(r"\]\((\S+\.png)\)", page.read_text())
    }
    assert shown == {path.resolve() for path in COMMITTED.rglob("*.png")}


def test_the_committed_tables_match_the_raw_results(capsys):
    assert show.main([str(COMMITTED / "cpu.json")]) == 0
    assert capsys.readouterr().out == (COMMITTED / "cpu.md").read_text()
