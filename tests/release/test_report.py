from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from scripts.release import report as module
from scripts.release.report import report

VOID = {"meta", "input", "img", "br", "link", "hr"}
SCRIPT_NAME = "<script>alert(\"1\")</script> & 'more'"


class Page(HTMLParser):
    """A page's elements (tag, attributes, text), after a check that every element is closed in its turn."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute is there twice: {attrs}"
        element = {"tag": tag, "inside": [outer["tag"] for outer in self.open], **dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):  # as in SVG
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in attributes.items())]

    def rows(self):
        """Texts of the cells of every row of the cases, by heading."""
        start = self.elements.index(self.all("table", id="cases")[0])
        rows = []
        for element in self.elements[start + 1 :]:
            if element["tag"] == "table":
                break
            if element["tag"] == "tr":
                rows.append([])
            if element["tag"] in ("th", "td"):
                rows[-1].append(element["text"])
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]

    def facts(self):
        return dict(zip((e["text"] for e in self.all("dt")), (e["text"] for e in self.all("dd")), strict=True))


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def result(case, finding_ml=12.5, ill=0.9, called="probability", **others):
    made = {"case": case, "finding_ml": f"{finding_ml:.3f}", "score": "0.04577", called: f"{ill:.4f}", "seconds": "6.9"}
    return {**made, "bundle": "organ_what", "version": "0.1.0", "weights": "20b1ebaa756b", **others}


def add_picture(folder, case, size=(120, 142)):
    path = folder / case / f"{case}_overview.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), np.uint8)).save(path)
    return path


@pytest.fixture
def results(tmp_path):
    """Results of four cases, two of them with pictures; one name is hostile, two look healthy, and of these one is empty."""
    cases = [("b10", 294.1, 0.9659), ("b9", 3, 0.4999), (SCRIPT_NAME, 20, 0.5), ("no # picture %41", 0, 0.01)]
    write_table(tmp_path / "results.csv", [result(*case) for case in cases])
    add_picture(tmp_path, "b10")
    add_picture(tmp_path, "b9")
    return tmp_path


def test_the_page_is_well_formed_and_has_a_row_for_each_case_in_their_order(results):
    assert report(results) == results / "report.html"
    page = Page(results / "report.html")
    assert [row["case"] for row in page.rows()] == ["b10", "b9", SCRIPT_NAME, "no # picture %41"]
    assert page.rows()[0]["finding (ml)"] == "294.100" and page.rows()[0]["probability of disease"] == "0.9659"
    facts = page.facts()
    assert facts["version"] == "0.1.0" and facts["weights"] == "20b1ebaa756b" and facts["cases"] == "4"
    assert page.all("h1")[0]["text"] == "organ_what" and "weights" not in page.rows()[0]


def test_the_page_loads_nothing_and_obeys_no_script_but_its_own(results):
    page = Page(report(results))
    assert not re.search(r"https?:|[\"'(]//|@import|url\(", page.text)
    assert not page.all("link") and not page.all("iframe") and len(page.all("script")) == 1
    assert all(e["src"].startswith("data:image/webp;base64,") for e in page.elements if e.get("src"))
    assert not [name for e in page.elements for name in e if name.startswith("on") or name == "style"]
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'") and "unsafe" not in policy["content"]


def test_two_runs_give_the_same_bytes(results):
    first = report(results).read_bytes()
    assert report(results).read_bytes() == first
    assert sorted(path.name for path in results.iterdir()) == [
        *("b10", "b9", "report.html", "results.csv", f"{results.name}_files.csv"),
    ]


def test_a_scan_unlike_the_trainings_is_marked_and_counted(tmp_path):
    unlike = [("a", "1.40", "size, grey levels"), ("b", "0.99", ""), ("c", "", "")]
    write_table(tmp_path / "results.csv", [result(c, unlike_training=ratio, unlike_in=names) for c, ratio, names in unlike])
    page = Page(report(tmp_path))
    assert page.facts()["unlike the training"] == "1"
    heading = next(name for name in page.rows()[0] if name.startswith("unlike the training"))
    assert [row["case"] for row in page.rows() if row[heading].endswith("unlike the training")] == ["a"]
    assert page.rows()[0]["unlike in"] == "size, grey levels"


@pytest.mark.parametrize("called", ["probability", "abnormality"])
def test_a_finding_in_a_case_that_looks_healthy_is_marked_and_a_healthy_case_is_not(results, called):
    cases = [("b10", 294.1, 0.9659), ("b9", 3, 0.4999), (SCRIPT_NAME, 20, 0.5), ("no # picture %41", 0, 0.01)]
    write_table(results / "results.csv", [result(*case, called=called) for case in cases])
    page = Page(report(results))
    heading = {"probability": "probability of disease"}.get(called, called)
    assert [row["case"] for row in page.rows() if "doubtful finding" in row[heading]] == ["b9"]
    assert len(page.all("tr", **{"class": "doubtful"})) == 1 and page.facts()["doubtful findings"] == "1"
    assert f"doubtful where the {heading} is below 0.5" in page.text and "believed" not in page.text


def test_pictures_are_embedded_and_their_absence_is_tolerated(results):
    broken = add_picture(results, "no # picture %41")
    broken.write_bytes(broken.read_bytes()[:500])
    page = Page(report(results))
    images = [image for image in page.all("img") if "src" in image]
    assert [unquote(image["data-original"]) for image in images] == ["b10/b10_overview.png", "b9/b9_overview.png"]
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as decoded:
            assert decoded.size == (120, 142) == (int(image["width"]), int(image["height"]))
    assert [row["picture"] for row in page.rows()] == ["", "", "–", "–"]
    labels = [button["aria-label"] for button in page.all("button") if "aria-label" in button]
    assert labels == ["Open the picture of b10", "Open the picture of b9"]


def test_the_more_cases_the_smaller_their_pictures(results, monkeypatch):
    monkeypatch.setattr(module, "PIXELS", 40_000)
    monkeypatch.setattr(module, "MIN_PIXELS", 5_000)
    sizes = [int(e["width"]) * int(e["height"]) for e in Page(report(results)).all("img") if "src" in e]
    assert all(9_000 < size < 11_000 for size in sizes)  # a quarter each
    monkeypatch.setattr(module, "PIXELS", 400)
    sizes = [int(e["width"]) * int(e["height"]) for e in Page(report(results)).all("img") if "src" in e]
    assert all(4_500 < size < 5_500 for size in sizes)


def test_a_page_elsewhere_finds_the_original_pictures(results, tmp_path):
    path = report(results, tmp_path / "pages" / "my page.html")
    original = unquote(Page(path).all("img")[0]["data-original"])
    assert (path.parent / original).resolve() == results / "b10" / "b10_overview.png"


def test_columns_of_numbers_sort_as_numbers_and_every_heading_is_a_button(results):
    page = Page(report(results))
    headings = [e for e in page.all("th", scope="col") if e["text"] != "picture"]
    assert [e["text"] for e in headings if "data-number" in e] == [
        "finding (ml)",
        "score",
        "probability of disease",
        "seconds",
    ]
    assert len([e for e in page.all("button") if "th" in e["inside"]]) == len(headings) == 5
    assert [e["text"] for e in page.all("th", scope="row")] == [row["case"] for row in page.rows()]
    (label,) = page.all("label")
    assert page.all("input", id=label["for"])


def test_metrics_are_joined_by_case_without_their_last_two_rows(results):
    metrics = [("b9", "0.51234"), ("b10", "nan"), ("mean", "0.9"), ("mean", "0.512"), ("std", "0")]  # a case called mean
    write_table(
        results / "metrics.csv",
        [{"case": case, "dice": dice, "predicted_ml": "3", "num_slices": "20"} for case, dice in metrics],
    )
    (results / "metrics_summary.json").write_text('{"dice_mean": 0.66543, "num_cases": 3, "slice_auroc": null}')
    write_table(results / "results.csv", [result(case) for case in ("b10", "b9", "mean", "unlabelled")])
    page = Page(report(results))
    assert [(row["Dice"], row["slices"]) for row in page.rows()] == [
        ("–", "20"),
        ("0.512", "20"),
        ("0.900", "20"),
        ("–", "–"),
    ]
    assert "predicted ml" not in page.rows()[0]  # the finding's volume stands there already
    assert [e for e in page.all("th", scope="col") if e["text"] == "Dice" and "data-number" in e]
    assert page.facts()["Dice, mean"] == "0.665" and page.facts()["AUROC of slices"] == "–"


def test_failed_cases_are_listed_with_their_reasons(results):
    write_table(results / "failures.csv", [{"case": "<b>bad", "reason": "bad.nii.gz: NaN <i> voxels"}])
    page = Page(report(results))
    assert page.facts()["failed"] == "1" and page.all("a", href="#failures") and page.all("h2", id="failures")
    assert page.all("td", **{"class": "reason"})[0]["text"] == "bad.nii.gz: NaN <i> voxels"
    assert not page.all("b", inside=["html", "body", "div", "table", "tbody", "tr", "th"]) and not page.all("i")


def test_a_cohort_of_failures_alone_has_a_page(tmp_path):
    write_table(tmp_path / "failures.csv", [{"case": "bad", "reason": "empty"}])
    page = Page(report(tmp_path))
    assert page.facts()["failed"] == "1" and page.facts()["cases"] == "0" and not page.all("dialog")


def test_histograms_count_every_case(results):
    page = Page(report(results))
    volumes, probabilities = page.all("figure")
    assert "median 11.5 ml" in volumes["text"] and "from 0.01 to 0.9659" in probabilities["text"]
    assert "Probability of disease" in probabilities["text"]
    texts = [e["text"] for e in page.all("title") if "rect" in e["inside"]]
    counts = [int(text.rpartition(": ")[2]) for text in texts]
    assert sum(counts) == 8 and sum(counts[-20:]) == 4
    assert all(svg["role"] == "img" and "median" in svg["aria-label"] for svg in page.all("svg"))


@pytest.mark.parametrize("rows", [[result("a", 0, 0)], [result("a", ill=1.0), result("b", float("nan"), float("nan"))]])
def test_extreme_and_missing_figures_are_drawn(tmp_path, rows):
    write_table(tmp_path / "results.csv", rows)
    page = Page(report(tmp_path))
    assert len(page.rows()) == len(rows) and len(page.all("figure")) == 2 and "nan" not in page.text.partition("</head>")[2]


def test_results_without_findings_and_probabilities_have_a_table_of_what_there_is(tmp_path):
    write_table(tmp_path / "results.csv", [{"case": "a", "frames": "12", "quality": "good"}])
    page = Page(report(tmp_path))
    assert page.rows() == [{"picture": "–", "case": "a", "frames": "12", "quality": "good"}]
    assert not page.all("figure") and "doubtful findings" not in page.facts()


def test_results_of_several_versions_name_them_all_in_the_header_and_in_the_rows(tmp_path):
    write_table(tmp_path / "results.csv", [result("a"), result("b", version="0.2.0"), result("c", version="0.2.0")])
    page = Page(report(tmp_path))
    versions = [e["text"] for e in page.all("dd") if "cases)" in e["text"]]
    assert versions == ["0.1.0 (1 of 3 cases)", "0.2.0 (2 of 3 cases)"]
    assert [row["version"] for row in page.rows()] == ["0.1.0", "0.2.0", "0.2.0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.csv", b"", "no results.csv there"),
        ("results.csv", b"", "has no column 'case'"),
        ("results.csv", b"name,score\na,1\n", "has no column 'case'"),
        ("results.csv", b"case,score\na\n", "too few or too many columns"),
        ("results.csv", b"case,score\na,1,2\n", "too few or too many columns"),
        ("results.csv", b'case,score\n"a,1\n', "can't be read"),
        ("results.csv", b"case,score\n\xff\xfe,1\n", "can't be read"),
        ("metrics_summary.json", b"{", "can't be read"),
        ("metrics_summary.json", b"[1]", "can't be read"),
    ],
)
def test_bad_tables_end_the_program_with_one_line(tmp_path, name, content, message):
    if name.endswith("json"):
        write_table(tmp_path / "results.csv", [result("a")])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        report(tmp_path)
    assert message in error.value.code and "\n" not in error.value.code and str(tmp_path) in error.value.code
    assert not (tmp_path / "report.html").exists()


def test_places_that_can_not_be_written_end_the_program_with_one_line(results):
    with pytest.raises(SystemExit, match="can't be written"):
        report(results, results / "results.csv" / "report.html")
    with pytest.raises(SystemExit, match="is a folder"):
        report(results, results / "b9")
    assert (results / "b9" / "b9_overview.png").is_file()


def test_a_results_table_that_is_a_folder_ends_the_program_with_one_line(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(SystemExit, match="results.csv"):
        report(tmp_path)
