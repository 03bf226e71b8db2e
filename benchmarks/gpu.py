"""Are the Triton kernels right on this GPU, and how fast are they? One command, under 8 minutes:

    python3 benchmarks/gpu.py [--minutes 7.5] [--only linear,timing] [--interpret] [--out DIR]

Needs torch, triton and numpy; nothing of this repository need be installed. Correctness first: every kernel on fresh random inputs
against float64, its result poisoned with NaN beforehand, and decoded weights to the bit; then timings (``gpu_timing.py``). Every stage is
a process of its own with a time limit, so that a fault of one does not take the others along. ``--interpret`` runs all of it on a CPU in
Triton's interpreter with tiny shapes, which is how the tests run it; its times mean nothing. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton's decorators when it is first imported
else:
    os.environ.pop("TRITON_INTERPRET", None)

import gpu_checks  # noqa: E402
import gpu_grouped  # noqa: E402
import gpu_timing  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_checks import DEVICE, HALF, INTERPRET  # noqa: E402

from minilora_kernels.launch import arch_of  # noqa: E402

STAGES = gpu_checks.STAGES | {"grouped": gpu_grouped.check_grouped}


def run_checks(name: str) -> bool:
    """Prints every check of a stage; whether all passed."""
    good, seed = True, int(time.time()) % 100_000
    torch.manual_seed(seed)
    print(f"--- {name} (inputs of seed {seed})", flush=True)
    try:
        for what, found, most in STAGES[name]():
            passed = found <= most  # False for NaN
            good &= passed
            print(f"{'PASS' if passed else 'FAIL'}  {what}  {found:.3g} <= {most:g}", flush=True)
    except Exception:
        print(f"FAIL  {name}: {traceback.format_exc(limit=-4)}", flush=True)
        return False
    return good


def run_stage(name: str, out: Path, minutes: float) -> bool:
    """One stage in this process."""
    if name != "timing":
        return run_checks(name)
    return gpu_timing.run(out, minutes, DEVICE, HALF, gpu_checks.weight, gpu_grouped.cells)


def describe() -> None:
    card = "no GPU (interpreter)" if INTERPRET else torch.cuda.get_device_name()
    print(
        f"{card}, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}",
        flush=True,
    )
    if not INTERPRET:
        arch = arch_of(torch.device("cuda", 0))
        print(f"compute capability {torch.cuda.get_device_capability()}, tiles of {arch}", flush=True)
        if arch is None:
            raise SystemExit("the kernels have no tiles for this card: wanted Ampere or newer, or MI300")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=7.5, help="stop starting new timings after this")
    parser.add_argument("--only", default="", help=f"stages, with commas between: {', '.join(STAGES)}, timing")
    parser.add_argument("--interpret", action="store_true", help="all of it on a CPU, tiny, in Triton's interpreter")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default benchmarks/results (with --interpret a temporary one)"
    )
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one stage, in this process
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp()) if INTERPRET else ROOT / "benchmarks" / "results")
    if options.here:
        return not run_stage(options.here, out, options.minutes)
    if not INTERPRET and not torch.cuda.is_available():
        raise SystemExit("no CUDA device found; --interpret tries the command without one")
    describe()
    wanted = options.only.split(",") if options.only else [*STAGES, "timing"]
    if unknown := set(wanted) - {*STAGES, "timing"}:
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; wanted some of {', '.join(STAGES)}, timing")
    start, failed = time.time(), []
    for name in wanted:
        left = options.minutes - (time.time() - start) / 60
        if left < 0.2:
            print(f"SKIP  {name}: no time left of {options.minutes:g} minutes")
            failed.append(name)
        elif not (run_stage(name, out, left) if INTERPRET else in_a_process(name, out, left)):
            failed.append(name)
    print(
        f"{(time.time() - start) / 60:.1f} minutes; "
        + (f"FAILED: {', '.join(failed)}" if failed else "every stage passed")
    )
    return bool(failed)


def in_a_process(name: str, out: Path, minutes: float) -> bool:
    """One stage in a process of its own, ended after its time: a fault of the device takes a process along."""
    command = [sys.executable, "-u", __file__, "--here", name, "--out", str(out), "--minutes", f"{minutes:.3f}"]
    limit = 60 * minutes + 20 if name == "timing" else min(150.0, 60 * minutes)
    try:
        return subprocess.run(command, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"FAIL  {name}: ended after {limit:.0f} s", flush=True)
        return False


if __name__ == "__main__":
    sys.exit(main())
