"""How fast is minilora on this processor, beside the installed peft and bitsandbytes? Every figure of both comes from one run.

    python benchmarks/cpu.py [--quick] [--rows quantize "lora step fp32"] [--threads 1 2]

Variants take turns in one process, so that a busy machine slows all alike; each is measured in processor time and in wall time, median,
minimum and maximum of five rounds or more. Steps start from the same weights (through one adapter file) and their losses are compared
before anything is timed. Each ``cpu_*.py`` asks one question; ``comparison.py`` is how one is measured.
``ONEDNN_MAX_CPU_ISA=AVX2`` in the environment makes torch take a processor for one without bf16 products.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from comparison import Row, Setting, csv_line
from cpu_formats import rows_dequantize, rows_linear, rows_quantize
from cpu_latency import rows_import, rows_latency
from cpu_memory import rows_memory, rows_saved
from cpu_steps import rows_step
from record import RESULTS, stamp, write_csv

ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "quantize": rows_quantize,
    "dequantize": rows_dequantize,
    "linear": rows_linear,
    "import": rows_import,
    "latency": rows_latency,
    "saved": rows_saved,
    "memory": rows_memory,
    "lora step fp32": lambda s: rows_step(s, torch.float32, False, 30, {"overhead": ">= 2"}),
    "qlora step fp32": lambda s: rows_step(s, torch.float32, True, 12, {"time": ">= 1", "overhead": ">= 2"}),
    "lora step bf16": lambda s: rows_step(s, torch.bfloat16, False, 2, {"time": ">= 10"}),
    "qlora step bf16": lambda s: rows_step(s, torch.bfloat16, True, 2, {"time": ">= 4"}),
}
ONE_PROCESS = ("import",)  # measured in processes of their own: the number of threads here means nothing to them


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, small sizes: a smoke run, no figures")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS / "cpu.csv"))
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    setting, lines = Setting(1 if arguments.quick else arguments.rounds, arguments.quick), []
    marks = stamp("peft", "bitsandbytes", "transformers")
    for threads in arguments.threads[: 1 if arguments.quick else None]:
        torch.set_num_threads(threads)
        for name in arguments.rows:
            if name in ONE_PROCESS and threads != arguments.threads[0]:
                continue
            began = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):  # PEFT and minilora greet
                rows = list(ROWS[name](setting))
            for row in rows:
                lines.append(csv_line(row, threads))
                said = lines[-1]
                print(f"{row.name:48s} {threads} threads  ours {said['ours cpu median']:>8s} peer {said['peer cpu median']:>8s} "
                      f"{said['unit']}  ratio {said['ratio cpu']} (wall {said['ratio wall']}), goal {row.goal}"
                      f"{'' if row.reached() else ' MISSED'}  {row.note}", flush=True)  # fmt: skip
            print(f"  {name}: {time.monotonic() - began:.0f} s", flush=True)
    write_csv(arguments.out, lines, marks)
    print(f"{', '.join(f'{key} {value}' for key, value in marks.items())}\n{arguments.out}")


if __name__ == "__main__":
    main()
