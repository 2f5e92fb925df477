"""The tables of a run in Markdown, and what it says about the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]
DECODE_SHARE, PLAN_LOSS, SPEEDUP, PREFILL_SHARE = 0.85, 1.05, 0.85, 0.60


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(record: Record, prefix: str) -> str:
    found = [value for name, value in record.get("speedup", {}).items() if name.startswith(prefix)]
    return f"{found[0]:.2f}x" if found else "-"


def _shape(record: Record) -> list[str]:
    extra = " ragged" if record["ragged"] else f" (last {record['chunk']})" if record["chunk"] else ""
    return [
        f"{record['context']}{extra}",
        str(record["batch"]),
        f"{record['heads']}/{record['kv_heads']}",
        str(record["dim"]),
        record["dtype"],
        record["kernel"],
        record["plan"],
        f"{record['density']:.3g}",
        f"{record['seconds'] * 1e3:.3f}",
    ]


def _section(title: str, records: list[Record], columns: list[str], cells: Callable[[Record], list[str]]) -> list[str]:
    if not records:
        return []
    head = ["context", "batch", "heads", "dim", "type", "kernel", "plan", "density", "ms", *columns]
    return [f"\n{title}\n", table(head, [_shape(r) + cells(r) for r in records])]


def targets(records: list[Record]) -> list[Record]:
    """The worst case of each target that this run can judge: {"target", "limit", "worst", "met", "case"}."""
    ours = [r for r in records if r.get("kernel") == "attnspan" and r["phase"] in ("decode", "prefill")]
    large = [r for r in ours if r["phase"] == "decode" and r["batch"] >= 8 and r["context"] >= 32768 and not r["ragged"]]
    found: list[Record] = []

    def judge(name: str, limit: float, values: list[tuple[float, Record]], at_least: bool = True) -> None:
        if not values:
            return
        pick = min if at_least else max
        worst, record = pick(values, key=lambda pair: pair[0])
        met = worst >= limit if at_least else worst <= limit
        found.append({"target": name, "limit": limit, "worst": worst, "met": met, "case": " ".join(_shape(record)[:8])})

    judge("decode, share of copy bandwidth, batch >= 8, 32k and more", DECODE_SHARE, [(r["share_of_copy"], r) for r in large])
    same = [(1 / v, r) for r in large for name, v in r["speedup"].items() if name.endswith("of as many bytes")]
    judge("decode, time over a uniform plan of as many bytes", PLAN_LOSS, same, at_least=False)
    dense = [
        (v * r["density"], r)
        for r in large
        for name, v in r["speedup"].items()
        if name.startswith("sdpa") and (r["batch"], r["context"]) == (8, 32768)
    ]
    judge("decode, speed-up over dense SDPA times density, batch 8, 32k", SPEEDUP, dense)
    prompts = [r for r in ours if r["phase"] == "prefill"]
    rates = []
    for record in prompts:
        rate = next(
            (
                d["tile_flops_per_second"]
                for d in records
                if d.get("plan") == "dense"
                and d["kernel"].startswith("sdpa")
                and all(d[k] == record[k] for k in ("phase", "context", "batch", "heads", "kv_heads", "dim", "dtype"))
            ),
            None,
        )
        if rate:
            rates.append((record["tile_flops_per_second"] / rate, record))
    judge("prefill, share of dense SDPA's rate, kept tiles", PREFILL_SHARE, rates)
    flex = [(v, r) for r in prompts for name, v in r["speedup"].items() if name.startswith("flex")]
    judge("prefill, speed-up over compiled flex_attention", 1.0, flex)
    return found


def markdown(result: Record) -> str:
    """The whole report."""
    records = result["records"]
    machine = result["machine"]
    versions = ", ".join(
        f"{k} {machine[k]}" for k in ("python", "torch", "triton", "numpy", "cuda", "driver_version") if machine.get(k)
    )
    out = [f"{machine['gpu']}; {versions}; {result['seconds']:.0f} s"]
    if result["copy_bytes_per_second"]:
        out.append(f"copy bandwidth {result['copy_bytes_per_second'] / 1e9:.0f} GB/s (read and written)")
    bad = [c for c in result["checks"] if not c["ok"]]
    worst: dict[str, Record] = {}
    for check in result["checks"]:
        key = check["kernel"]
        if key not in worst or check["error"] / (check["limit"] or 1) > worst[key]["error"] / (worst[key]["limit"] or 1):
            worst[key] = check
    out.append(f"\n{len(result['checks'])} checks against the fp32 reference, {len(bad)} failed\n")
    out.append(
        table(
            ["kernel", "worst case", "error", "limit", ""],
            [
                [c["kernel"], c["case"], f"{c['error']:.3g}", f"{c['limit']:g}", "ok" if c["ok"] else "FAILED"]
                for c in [*worst.values(), *(b for b in bad if b not in worst.values())]
            ],
        )
    )
    if hybrid := result.get("hybrid"):
        out.append(f"\n{hybrid['case']}: {hybrid['tokens_equal']} of {hybrid['tokens']} tokens equal\n")
        out += ["```", *hybrid["table"], "```"]
    decode = [r for r in records if r["phase"] == "decode"]
    out += _section(
        "Decode: bytes of kept keys and values",
        decode,
        ["GB/s", "of copy", "over SDPA", "over flex", "over FlashInfer"],
        lambda r: [
            f"{r['bytes_per_second'] / 1e9:.0f}",
            f"{r['share_of_copy']:.0%}",
            _ratio(r, "sdpa"),
            _ratio(r, "flex"),
            _ratio(r, "flashinfer"),
        ],
    )
    prefill = [r for r in records if r["phase"] in ("prefill", "chunk")]
    out += _section(
        "Prefill: flops of kept tiles of 128 x 128",
        prefill,
        ["TFLOP/s", "over SDPA", "over flex", "over FlashInfer"],
        lambda r: [f"{r['tile_flops_per_second'] / 1e12:.3g}", _ratio(r, "sdpa"), _ratio(r, "flex"), _ratio(r, "flashinfer")],
    )
    small = [r for r in records if r["phase"] == "small"]
    if small:
        out += [
            "\nThe other kernels\n",
            table(
                ["kernel", "ms", "GB/s", "of copy"],
                [
                    [r["kernel"], f"{r['seconds'] * 1e3:.3f}", f"{r['bytes_per_second'] / 1e9:.0f}", f"{r['share_of_copy']:.0%}"]
                    for r in small
                ],
            ),
        ]
    if result["targets"]:
        out += [
            "\nTargets\n",
            table(
                ["target", "limit", "worst", "met", "where"],
                [
                    [t["target"], f"{t['limit']:g}", f"{t['worst']:.3f}", "yes" if t["met"] else "no", t["case"]]
                    for t in result["targets"]
                ],
            ),
        ]
    out += [f"\n{note}" for note in result["notes"]]
    out += [f"\nFAILED: {line}" for line in result["failed"]]
    if result["not_run"]:
        out.append(f"\nNot run, for want of time (--budget {result['budget_seconds']:g}): " + "; ".join(result["not_run"]))
    return "\n".join(out) + "\n"
