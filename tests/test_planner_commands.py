"""The verbs plan and inspect: what they write, print and refuse; costs and the heat map behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from attnspan.export.cli import main
from attnspan.planner.cost import CACHE_BYTES, allocated_bytes, cost_table, format_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.heatmap import BOTTOM, DPI, GAP, LEFT, RIGHT, STRIP, TOP, heat_map
from attnspan.planner.hf_config import with_sparse_attention
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import uniform

EXCERPT = Path(__file__).parent / "data" / "moa_llama_3.2_1b_two_layers.json"
SHAPE = ["--layers", "3", "--heads", "4", "--kv-heads", "2"]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert main(["plan", "uniform", "--density", "0.5", *SHAPE, "--head-dim", "64", "-o", str(path)]) == 0
    return path


def test_plan_uniform_writes_the_plan_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    assert main(["plan", "uniform", "--density", "0.5", *SHAPE, "--head-dim", "64", "-o", str(out)]) == 0
    plan = Plan.load(out)
    assert (plan.model.layers, plan.model.kv_heads, plan.n_max, plan.density()) == (3, 2, 8192, 0.5)
    # 3 layers x 2 heads x 4096 slots x (key and value) x 64 numbers x 2 bytes
    assert allocated_bytes(plan, "bf16") == 3 * 2 * 4096 * 2 * 64 * 2
    assert "6.00 MiB, dense 12.0 MiB" in capsys.readouterr().out


def test_plan_uniform_takes_the_shape_from_a_model(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "p.json"
    command = ["plan", "uniform", "--density", "0.4", "--spread", "0.2", "--n-max", "4096", "-o", str(out)]
    assert main([*command, "--model", str(tmp_path)]) == 0
    plan = Plan.load(out)
    assert plan.model == ModelShape.from_config(tmp_path)
    assert [rule.beta for rule in plan.rules[0]] == [0.2, 0.6]
    assert main([*command, "--model", str(tmp_path), "--kv-heads", "4"]) == 2


def test_plan_import_says_what_folding_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    assert main(["plan", "import", str(EXCERPT), "--heads", "32", "--kv-heads", "8", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fold 'max'" in printed
    assert re.search(r"8192 +0\.\d+ +0\.\d+ ", printed)
    assert Plan.load(out).model.kv_heads == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "uniform", "--density", "0", *SHAPE], "--density"),
        (["plan", "uniform", "--density", "1.5", *SHAPE], "--density"),
        (["plan", "uniform", "--density", "0.5"], "--model DIR, or --layers --heads --kv-heads"),
        (
            ["plan", "uniform", "--density", "0.5", "--layers", "2", "--heads", "3", "--kv-heads", "2"],
            "multiple",
        ),
        (["plan", "uniform", "--density", "0.5", *SHAPE, "--n-max", "100"], "--n-max"),
        (["plan", "uniform", "--density", "0.5", *SHAPE, "--spread", "0.6"], "--spread"),
        (["plan", "uniform", "--density", "0.5", "--model", "nowhere"], "nowhere"),
        (["plan", "uniform", "--density", "0.5", *SHAPE, "-o", "nowhere/plan.json"], "nowhere/plan.json"),
        (["plan", "import", str(EXCERPT), "--heads", "24", "--kv-heads", "8"], "--heads"),
        (["plan", "import", str(EXCERPT), "--heads", "32"], "--kv-heads"),
        (["plan", "import", str(EXCERPT), "--heads", "32", "--kv-heads", "8", "--fold", "sum"], "--fold"),
        (["plan", "import", "nowhere.json", "--heads", "32", "--kv-heads", "8"], "nowhere.json"),
        (["inspect", "nowhere.json"], "nowhere.json"),
        (["inspect", str(EXCERPT)], "attnspan plan import"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_inspect_prints_the_table_and_draws(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(plan_file)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n +0-2 +4096 +4096 +4096 +0\.500 +2\.00 MiB\n", printed)  # all layers alike
    assert re.search(r"\n +2048 +0\.500 +\[#{12}\.{12}\] +1\.50 MiB +3\.00 MiB\n", printed)
    assert plan_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_inspect_json(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    png = tmp_path / "map.png"
    options = ["--json", "--n", "1000", "8192", "--cache-dtype", "int8", "--png", str(png)]
    assert main(["inspect", str(plan_file.parent), *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["png"] == str(png)
    assert png.exists()
    assert not plan_file.with_suffix(".png").exists()
    assert [row["n"] for row in summary["lengths"]] == [1000, 8192]
    assert summary["lengths"][0]["kept_slots"] == 6 * 512
    assert summary["lengths"][0]["kept_bytes"] == 6 * 512 * 2 * 64
    assert summary["layers"][0]["kv_bytes"] == 2 * 4096 * 2 * 64


@pytest.mark.parametrize("options", [["--n", "9000"], ["--n", "0"], ["--cache-dtype", "fp8"]])
def test_inspect_refuses(options: list[str], plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(plan_file), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [file.name for file in plan_file.parent.iterdir()] == ["plan.json"]


def test_costs() -> None:
    plan = uniform(ModelShape("m", 4, 8, 2, 128), 0.25, 8192)
    for dtype, size in CACHE_BYTES.items():
        row = cost_table(plan, [8192], dtype, batch=3)[0]
        assert (row.kept_slots, row.dense_slots) == (8 * 2048, 8 * 8192)
        assert row.kept_bytes == 3 * 8 * 2048 * 2 * 128 * size == allocated_bytes(plan, dtype, 3)
        assert row.dense_bytes == 4 * row.kept_bytes
    # A short sequence is kept whole and does not count the slots that rounding leaves unused.
    assert cost_table(plan, [100])[0].density == 1
    unknown = uniform(ModelShape("m", 4, 8, 2), 0.25, 8192)
    assert allocated_bytes(unknown, "bf16") is None
    assert cost_table(unknown, [2048])[0].kept_bytes is None
    with pytest.raises(UserError, match="--cache-dtype"):
        allocated_bytes(plan, "fp8")


def test_format_bytes() -> None:
    values = [None, 0, 1023, 1024, 11 * 2**20, 300 * 2**20, 5 * 2**29]
    assert [format_bytes(v) for v in values] == [
        "-",
        "0 B",
        "1023 B",
        "1.00 KiB",
        "11.0 MiB",
        "300 MiB",
        "2.50 GiB",
    ]


@pytest.mark.parametrize(("layers", "kv_heads"), [(1, 1), (16, 8), (30, 3), (80, 8), (40, 40)])
def test_heat_map_of_any_shape_shows_each_head_in_its_place(tmp_path: Path, layers: int, kv_heads: int) -> None:
    """The one dense head, KV head 0 of the last layer, is the only bright cell: top right."""
    from matplotlib.image import imread

    rules = [[HeadRule("span", 0, 0.1)] * kv_heads for _ in range(layers)]
    rules[-1][0] = HeadRule("dense")
    path = tmp_path / "map.png"
    heat_map(Plan(ModelShape("organisation/model", layers, kv_heads, kv_heads), 8192, rules), path)
    pixels = imread(path)
    height, width, _ = pixels.shape
    assert 400 <= height <= 3000
    assert 800 <= width <= 3000
    left, right, top, bottom = LEFT * DPI, width - RIGHT * DPI, (TOP + STRIP + GAP) * DPI, height - BOTTOM * DPI
    # The brightest colour of viridis; the colour bar has it too, so only the map is searched.
    bright = (np.abs(pixels[:, : int(right), :3] - [0.993, 0.906, 0.144]) < 0.02).all(axis=-1)
    rows, columns = np.nonzero(bright)
    cell_w, cell_h = (right - left) / layers, (bottom - top) / kv_heads
    assert len(rows) > 0.5 * cell_w * cell_h
    assert right - cell_w - 2 <= columns.min()
    assert columns.max() <= right + 2
    assert top - 2 <= rows.min()
    assert rows.max() <= top + cell_h + 2


def test_heat_map_marks_sampled_heads_and_survives_odd_names(tmp_path: Path) -> None:
    sampled = HeadRule("lsh", lsh=LshParams("signature", 256, signature_bits=128, max_hamming=40))
    plans = [
        Plan(ModelShape("$x_{$" * 40, 2, 2, 2), 8192, [[HeadRule("dense"), rule]] * 2) for rule in (HeadRule("dense"), sampled)
    ]
    for i, plan in enumerate(plans):
        heat_map(plan, tmp_path / f"{i}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_hf_config_entry() -> None:
    config = {"model_type": "llama", "sparse_attention_config": {"old": 1}}
    assert with_sparse_attention(config) == {
        "model_type": "llama",
        "sparse_attention_config": {"config_groups": {"group_0": {"algorithm": "moa", "plan": "plan.json"}}},
    }
    assert config["sparse_attention_config"] == {"old": 1}
