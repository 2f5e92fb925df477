"""`attnspan report`: what the page says, that it stands alone, and what users get wrong."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnspan.calibration.folder import Calibration
from attnspan.calibration.item_profile import ItemProfile
from attnspan.calibration.items import Item, save_items
from attnspan.calibration.report_figures import Point, counts, scatter
from attnspan.calibration.report_svg import Scale, ramp, text_width, ticks
from attnspan.export.cli import main
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import uniform

SHAPE = ModelShape("tiny/model", layers=2, heads=4, kv_heads=2, head_dim=16, config_hash="0123456789abcdef")
LENGTHS = (1024, 2048)
N_MAX = 4096
VOID = {"meta", "br", "hr", "img"}
SETS = ("density=0.5_grid=fine_estimator=joint_absolute_rules=2", "kv_bytes=200KiB@4096_estimator=joint_absolute_rules=none")
SECTIONS = ["spans", "distribution", "front", "measured", "memory", "influence", "provenance"]


class Page(HTMLParser):
    """Tags, texts by section, tables by caption; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.stack, self.tags = text, [], []  # type: ignore[var-annotated]
        self.sections: dict[str, str] = {"": ""}
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.section = self.caption = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "section":
            self.section = str(dict(attrs)["id"])
            self.sections[self.section] = ""
        elif tag == "tr":
            self.tables[self.caption].append([])
        elif tag in ("th", "td"):
            self.tables[self.caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        where = self.stack[-1] if self.stack else ""
        if where == "caption":
            self.caption = data
            self.tables[data] = []
        elif where in ("th", "td"):
            self.tables[self.caption][-1][-1] += data
        elif where == "title" and "svg" in self.stack:
            self.titles.append(data)
        if where != "style":
            self.sections[self.section] += data


def made(betas: list[list[float]], **loss: float) -> Plan:
    rules = [[HeadRule("span", 0.0, beta) for beta in layer] for layer in betas]
    return Plan(SHAPE, N_MAX, rules, predicted_loss={int(k[1:]): v for k, v in loss.items()}, solver_gap=0.001)


PLANS = {
    "dense profile": made([[0.5, 0.5], [0.5, 0.5]], n1024=0.2, n2048=0.4),
    "round 1": made([[0.25, 1.0], [0.125, 0.625]], n1024=0.3, n2048=0.3),
    "front 1": made([[1.0, 0.25], [0.5, 0.25]], n1024=0.5, n2048=0.5),
}
LOSSES = {"dense profile": 0.9, "round 1": 0.7125, "front 1": 0.8}


def candidates(scored: bool = True) -> list[dict[str, Any]]:
    """As `attnspan plan` writes them."""
    rows: list[dict[str, Any]] = []
    for name, plan in PLANS.items():
        rows.append({"name": name, "predicted_loss": {str(n): x for n, x in plan.predicted_loss.items()}, "gap": plan.solver_gap})
        if scored:
            rows[-1] |= {"loss": LOSSES[name], "dense_loss": 0.6, "kl": LOSSES[name] / 4, "top1": 0.875}
    return rows


def add_plans(folder: Path, name: str, scored: bool = True) -> None:
    where = folder / "plans" / name
    where.mkdir(parents=True)
    (where / "candidates.json").write_text(json.dumps(candidates(scored)))
    for each, plan in PLANS.items():
        plan.save(where / f"{each.replace(' ', '-')}.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A calibration folder without its model. Cut at 1024 tokens, layer 1 loses 0.75 nats and layer 0 half of that."""
    where = tmp_path / "calib"
    (where / "profile").mkdir(parents=True)
    items = [Item(np.arange(20) + i, np.array([18, 19]), "facts", n) for n in LENGTHS for i in range(6)]
    for item in items:
        rise = np.zeros((2, 2, item.length // 64 + 1))
        rise[..., :-1] = np.array([[0.125, 0.25], [0.25, 0.5]])[..., None] * item.length / 1024
        ItemProfile(item.id, item.length, 0.5, rise).save(where / "profile" / f"{item.id}.npz")
    save_items(items, where / "items.jsonl")
    save_items([Item(np.arange(30), np.array([29]), "facts", 3072)], where / "held_out.jsonl")
    Calibration(
        where, "some/tiny", SHAPE, N_MAX, LENGTHS, 6, 3072, 1, 7, "bf16", "model", None, False, False, {"attnspan": "9.9"}
    ).save()
    add_plans(where, SETS[0])
    return where


def report(tmp_path: Path, *words: str | Path) -> Page:
    out = tmp_path / "page.html"
    assert main(["report", *map(str, words), "-o", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    stands_alone(page)
    return page


def stands_alone(page: Page) -> None:
    """Nothing is loaded, nothing runs, every figure and table says what it is, every figure is well-formed."""
    for word in ("http://", "https://", "<script", "<link", "<img", "url(", "@import", "href", "src="):
        assert word not in page.source, word
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert ("html", {"lang": "en"}) in page.tags
    figures = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(figures) == sum(tag == "svg" for tag, _ in page.tags) > 0
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        width, height = (float(root.attrib[name]) for name in ("width", "height"))
        for text in root.iter("text"):
            assert 0 <= float(text.attrib["x"]) <= width
            assert 0 <= float(text.attrib["y"]) <= height
        for rect in root.iter("rect"):
            x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert x >= 0 <= y
            assert w >= 0 <= h
            assert x + w <= width + 0.5
            assert y + h <= height + 0.5
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)


def test_calibration_folder(folder: Path, tmp_path: Path) -> None:
    page = report(tmp_path, folder)
    assert [name for name in page.sections if name] == SECTIONS
    head = page.sections[""]
    # The candidate with the least measured loss; its density is (1/4 + 1 + 1/8 + 5/8) / 4.
    assert "The plan is the candidate round 1, one of 3." in head
    assert "Budget: density 0.5." in head
    assert "share of the KV cache kept at 4096 tokens0.500" in head
    assert "Held out: 1 documents of 3072 tokens" in head
    for figure in ("0.7125", "dense 0.6000", "0.1781", "87.5%"):
        assert figure in head
    # A token of a head is a key and a value of 16 numbers of 2 bytes; 4 heads keep half of the text on average.
    assert f"{4 * 4096 // 2 * 2 * 16 * 2 // 1024} KiB" in head
    assert page.tables["KV cache of one sequence"] == [
        ["length, tokens", "plan", "dense", "density", "times smaller"],
        ["1024", "128 KiB", "256 KiB", "0.500", "2.00"],
        ["2048", "256 KiB", "512 KiB", "0.500", "2.00"],
        ["4096", "512 KiB", "1.00 MiB", "0.500", "2.00"],
    ]
    assert page.tables["KV heads by the share of the text they keep"][-1] == ["4096", "0", "1", "1", "0", "1", "1", "0.500"]
    assert {"layer 0, head 0: 1024 tokens (25%)", "layer 1, head 1: 2560 tokens (62%)"} <= set(page.titles)
    rows = page.tables["Candidates; losses of the answers in nats"]
    assert rows[0][1:3] == ["predicted at 1024", "predicted at 2048"]
    assert rows[1] == ["dense profile", "0.2", "0.4", "0.10%", "0.9000", "+0.3000", "0.2250", "87.5%"]
    assert rows[2][0] == "round 1 (this plan)"
    for layer, rise in ((0, 0.375), (1, 0.75)):
        assert f"layer {layer}: {rise} nats" in page.titles
        assert f"layer {layer}: {2 * rise:g} nats" in page.titles
    assert page.source.count("round 1: 0.3, 0.3</title>") == 1
    assert page.source.count("round 1: 0.3, 0.1125</title>") == 1
    said = {row[0]: row[1] for row in page.tables["What the plan was made from, and how"]}
    assert said["model"] == "some/tiny"
    assert said["corpus"] == "generated"
    assert said["lengths"] == "1024, 2048"
    assert said["seed"] == "7"
    assert said["versions"] == "attnspan 9.9"
    assert said["items"] == "12, listed below"
    assert said["options"] == "density 0.5, grid fine, estimator joint_absolute, rules 2"
    for item in Calibration.load(folder).calibration_items():
        assert item.id in page.sections["provenance"]


def test_newest_candidates_or_those_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_plans(folder, SETS[1])
    times = dict(zip(SETS, (1_000_000_000, 2_000_000_000), strict=True))
    for name, when in times.items():
        os.utime(folder / "plans" / name / "candidates.json", (when, when))
    assert "Budget: KV cache of 200KiB@4096." in report(tmp_path, folder).sections[""]
    assert "Budget: density 0.5." in report(tmp_path, folder, "--plan", SETS[0]).sections[""]
    assert main(["report", str(folder), "--plan", "other"]) == 2
    assert f"has no candidates 'other': must be one of {SETS[0]}, {SETS[1]}; change --plan" in capsys.readouterr().err


def test_what_attnspan_plan_writes_is_understood(folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    command = ["plan", str(folder), "--density", "0.375", "--grid", "proportional", "--rounds", "0", "--no-validate"]
    assert main([*command, "-o", str(plan)]) == 0
    page = report(tmp_path, folder)
    density = Plan.load(plan).density()
    for each in (page, report(tmp_path, plan)):
        assert f"share of the KV cache kept at 4096 tokens{density:.3f}" in each.sections[""]
        assert "Budget: density 0.375." in each.sections[""]
        assert "What the plan does to answers was not measured." in each.sections[""]
    assert "front" not in page.sections  # one candidate is no front
    assert "These candidates were not measured" in page.sections["measured"]
    assert "influence" in page.sections


def test_folder_without_profiles_and_one_length(folder: Path, tmp_path: Path) -> None:
    """Without profiles there is no influence; with one length the front is over density."""
    for file in (folder / "profile").iterdir():
        file.unlink()
    where = folder / "plans" / SETS[0]
    rows = candidates(scored=False)
    for row in rows:
        del row["predicted_loss"]["1024"]
    (where / "candidates.json").write_text(json.dumps(rows))
    page = report(tmp_path, folder)
    assert [name for name in page.sections if name] == [name for name in SECTIONS if name != "influence"]
    assert "The plan is the candidate front 1" in page.sections[""]
    assert page.source.count("dense profile: 0.5, 0.4</title>") == 1
    assert "density at 4096 tokens" in page.sections["front"]


def test_plan_alone(tmp_path: Path) -> None:
    uniform(SHAPE, 0.25, 16384).save(tmp_path / "plan.json")
    for source in (tmp_path / "plan.json", tmp_path):
        page = report(tmp_path, source)
        assert [name for name in page.sections if name] == ["spans", "distribution", "memory", "provenance"]
        assert "kept at 16384 tokens0.250" in page.sections[""]
        assert page.tables["KV cache of one sequence"][-1][:3] == ["16384", "1.00 MiB", "4.00 MiB"]


def test_plan_with_its_validation(tmp_path: Path) -> None:
    validation = {"length": 3072, "items": 5, "chosen": "front 1", "candidates": candidates()}
    provenance = {"items": [f"id{i:02d}" for i in range(9)], "options": {"milliseconds": "3@4096", "seed": 0}}
    replace(PLANS["front 1"], validation=validation, provenance=provenance).save(tmp_path / "p.json")
    page = report(tmp_path, tmp_path / "p.json")
    assert [name for name in page.sections if name] == [name for name in SECTIONS if name != "influence"]
    assert "The plan is the candidate front 1" in page.sections[""]
    assert "Budget: 3@4096 ms of attention a token." in page.sections[""]
    assert "Held out: 5 documents of 3072 tokens" in page.sections[""]
    assert "id08" in page.sections["provenance"]


def test_sampled_heads_unknown_sizes_and_many_heads(tmp_path: Path) -> None:
    rules = [[HeadRule("span", 0.0, 0.25) for _ in range(8)] for _ in range(90)]
    rules[3][2] = HeadRule("lsh", lsh=LshParams("exact", 64))
    Plan(ModelShape("m", 90, 32, 8), 2**17, rules).save(tmp_path / "plan.json")
    page = report(tmp_path, tmp_path)
    assert "a diagonal marks a head that keeps all of it and samples" in page.sections["spans"]
    assert "layer 3, head 2: 131072 tokens (100%), sampled" in page.titles
    assert page.tables["KV cache of one sequence"][-1][2] == str(90 * 8 * 2**17)
    assert "-" in {row[-1] for row in page.tables["Spans in tokens, by layer"]}


def test_names_are_text(folder: Path, tmp_path: Path) -> None:
    """What a name or an option holds never becomes markup."""
    evil = '<script>alert("1")</script>&'
    where = folder / "plans" / SETS[0]
    plan = replace(
        PLANS["round 1"], model=replace(SHAPE, id=evil), provenance={"corpus": evil, "options": {"density": evil}, evil: evil}
    )
    rows = [row | {"name": evil} for row in candidates() if row["name"] == "round 1"] + candidates()
    plan = replace(plan, validation={"length": 3072, "items": 1, "chosen": evil, "candidates": rows})
    plan.save(where / "evil.json")
    page = report(tmp_path, where / "evil.json")
    assert page.sections[""].count(evil) == 4  # title, heading, candidate, budget
    assert any(row[0] == f"{evil} (this plan)" for row in page.tables["Candidates; losses of the answers in nats"])


def results(path: Path, **change: Any) -> Path:
    """As `attnspan eval` writes them."""
    totals = [
        {"task": task, "length": n, "method": method, "n": 40, "accuracy": right, "low": low, "high": high, "ppl": ppl}
        for task, n in (("needle", 1024), ("needle", 2048), ("perplexity", 1024))
        for method, right, low, high, ppl in (("dense", 1.0, 0.912, 1.0, 1.5), ("plan", 0.625, 0.47, 0.758, 2.25))
    ]
    for x in totals[4:]:
        x |= {"accuracy": None, "low": None, "high": None}
    densities = {"dense": {"1024": 1.0, "2048": 1.0}, "plan": {"1024": 0.5, "2048": 0.4375}}
    path.write_text(json.dumps({"schema": 1, "settings": {}, "totals": totals, "densities": densities} | change))
    return path


def test_evaluation(folder: Path, tmp_path: Path) -> None:
    file = results(tmp_path / "results.json")
    for source in (file, tmp_path):
        page = report(tmp_path, folder, "--eval", source)
        assert [name for name in page.sections if name] == [*SECTIONS[:-1], "evaluation", SECTIONS[-1]]
        assert page.tables["Exact answers, with 95% intervals"] == [
            ["task", "length, tokens", "items", "dense", "plan"],
            ["needle", "1024", "40", "100% (91-100)", "62% (47-76)"],
            ["needle", "2048", "40", "100% (91-100)", "62% (47-76)"],
        ]
        assert page.tables["Perplexity of the answers"][1:] == [["perplexity", "1024", "40", "1.500", "2.250"]]
        assert page.tables["Density: share of the KV cache that a method keeps"][-1] == ["2048", "1.000", "0.438"]


@pytest.mark.parametrize(
    ("break_it", "words", "message"),
    [
        (lambda f: None, ["DIR/none"], "none does not exist: must be a calibration folder, an artefact folder or a plan file"),
        (lambda f: None, ["DIR/profile"], "profile holds neither calibration.json nor plan.json: must be"),
        (lambda f: None, ["DIR/calibration.json"], "calibration.json"),
        (lambda f: (f / "plans" / SETS[0] / "candidates.json").unlink(), ["DIR"], "make some with attnspan plan"),
        (lambda f: (f / "plans" / SETS[0] / "candidates.json").write_text("[{"), ["DIR"], "run attnspan plan again"),
        (lambda f: (f / "plans" / SETS[0] / "candidates.json").write_text("[]"), ["DIR"], "must be a list of candidates"),
        (lambda f: (f / "plans" / SETS[0] / "candidates.json").write_text('[{"name": "a"}]'), ["DIR"], "cannot read"),
        (lambda f: (f / "plans" / SETS[0] / "round-1.json").unlink(), ["DIR"], "round-1.json: No such file"),
        (lambda f: None, ["DIR/plans/" + SETS[0] + "/round-1.json", "--plan", "x"], "is no calibration folder: --plan x"),
        (lambda f: None, ["DIR", "--eval", "DIR/none.json"], "cannot read"),
        (lambda f: None, ["DIR", "--eval", "DIR/calibration.json"], "holds no results of attnspan eval; change --eval"),
        (lambda f: results(f / "results.json", totals=[{"task": "needle"}]), ["DIR", "--eval", "DIR"], "holds no results"),
        (lambda f: None, ["DIR", "-o", "DIR/none/page.html"], "must be in a writable folder"),
    ],
)
def test_errors(
    folder: Path, tmp_path: Path, break_it: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(folder)
    words = [word.replace("DIR", str(folder)) for word in words]
    out = [] if "-o" in words else ["-o", str(tmp_path / "page.html")]
    assert main(["report", *words, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"chosen": "a"}, "validation of the plan holds None: must be a list of candidates"),
        ({"chosen": "a", "candidates": [{"name": "a"}]}, "must have a name and a predicted_loss"),
        ({"chosen": "a", "candidates": [{"name": "a", "predicted_loss": {"x": 1}}]}, "must have a name and a predicted_loss"),
        ({"chosen": "b", "candidates": [{"name": "a", "predicted_loss": {}}]}, "has chosen 'b', which is none of its candidates"),
        ({"chosen": "a", "candidates": [{"name": "a", "predicted_loss": {"1024": "low"}}]}, "predicted_loss of a is 'low'"),
        ({"chosen": "a", "candidates": [{"name": "a", "predicted_loss": {}, "kl": "x"}]}, "kl of a is 'x'"),
        ({"chosen": "a", "candidates": [{"name": "a", "predicted_loss": {}}]}, "validation: length is None"),
    ],
)
def test_foreign_validation(tmp_path: Path, validation: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    replace(PLANS["round 1"], validation=validation).save(tmp_path / "p.json")
    assert main(["report", str(tmp_path / "p.json"), "-o", str(tmp_path / "page.html")]) == 2
    assert message in capsys.readouterr().err


@given(st.integers(1, 6), st.integers(1, 5), st.integers(128, 70000), st.randoms(use_true_random=False))
def test_every_head_is_in_one_class(layers: int, heads: int, n: int, random: Any) -> None:
    rules = [
        [HeadRule("span", float(random.randint(-512, 4096)), random.randint(0, 16) / 16) for _ in range(heads)]
        for _ in range(layers)
    ]
    plan = Plan(ModelShape("m", layers, heads, heads), n, rules)
    shares = [min(rule.span(n), n) / n for layer in rules for rule in layer]
    wanted = [sum(low < x <= high and x < 1 for x in shares) for low, high in
              ((0, 1 / 16), (1 / 16, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 1))]  # fmt: skip
    assert counts(plan, n) == [*wanted, sum(x == 1 for x in shares)]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_and_within(low: float, width: float, count: int) -> None:
    high = low + width
    if width < 1e-9 * max(abs(low), 1.0):
        return
    marks = ticks(low, high, count)
    step = width / count
    assert all(low - 1e-6 * width <= mark <= high + 1e-6 * width for mark in marks)
    assert np.diff(marks) == pytest.approx(np.full(len(marks) - 1, marks[1] - marks[0]) if len(marks) > 1 else [], rel=1e-6)
    assert count / 4 <= len(marks) + 1
    assert len(marks) <= 4 / 3 * count + 1
    assert step > 0


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=6))
def test_scales_hold_their_values(values: list[float]) -> None:
    scale = Scale.around(values, 300.0, 20.0)
    assert all(20 <= scale(value) <= 300 for value in values)
    assert all(19.9 <= scale(mark) <= 300.1 for mark in scale.ticks())
    assert scale.log == (max(values) / min(values) > 30)
    assert scale.ticks()


def test_labels_of_crowded_candidates_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [Point(f"candidate {i}", 1 + 0.1 * rng.random(), 1 + 0.1 * rng.random(), i == 3) for i in range(7)]
        root = ElementTree.fromstring(scatter([*points, Point("far", 2, 2, False)], "x", "y"))
        boxes = []
        for text in root.iter("text"):
            if "label" in text.get("class", ""):
                x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), text_width(text.text or "")
                boxes.append((x, y - 10, x + wide, y + 2))
        assert len(boxes) == 8
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                wide, high = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
                assert min(wide, high) <= 1  # a pixel


def test_front_joins_what_no_other_beats() -> None:
    values = [(1, 5), (2, 3), (3, 3), (4, 1), (5, 2)]
    points = [Point(f"p{i}", x, y, i == 0) for i, (x, y) in enumerate(values)]
    root = ElementTree.fromstring(scatter(points, "x", "y", front=True))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter("circle")]
    by_name = {dot[0].text.split(":")[0]: at for dot, at in zip(root.iter("circle"), dots, strict=True)}  # type: ignore[union-attr]
    line = next(x.attrib["points"] for x in root.iter("polyline") if x.get("class") == "front")
    corners = {tuple(map(float, pair.split(","))) for pair in line.split()}
    assert {name for name, at in by_name.items() if at in corners} == {"p0", "p1", "p3"}


def test_colours_are_those_of_viridis() -> None:
    from matplotlib import colormaps

    assert (ramp(0), ramp(1), ramp(1.5)) == ("#440154", "#fde725", "#fde725")
    for share in np.linspace(0, 1, 101):
        ours = [int(ramp(share)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert ours == pytest.approx(colormaps["viridis"](share)[:3], abs=0.07)
