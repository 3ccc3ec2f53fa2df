"""A child process that runs llama.cpp on command, for an interpreter that has llama-cpp-python.

It times `llama_decode` alone (no sampling, no tokenizer, no server), as llama-bench does. Requests
are one JSON object a line on standard input, and so are the answers:

    {"prefix": [ids], "batches": [[ids], ...]}   ->  {"seconds": ...}, of the batches alone

The first line of the answers is about the peer; see compare_llama_cpp.py.
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp


def quantize(source: Path, target: Path, threads: int) -> None:
    """Requantize a GGUF with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.nthread = threads
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantize {source}: code {code}")


class Peer:
    def __init__(self, path: Path, threads: int, context: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = context
        params.n_ubatch = 512  # llama-bench's default
        params.n_threads = threads
        params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp could not open {path}")

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        self._run(llama_cpp.llama_batch_get_one(tokens, len(ids)))

    def _run(self, batch: object) -> None:
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)


def serve_times(peer: Peer) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        peer.clear()
        if request["prefix"]:
            peer.decode(request["prefix"])
        begin = time.perf_counter()
        for ids in request["batches"]:
            peer.decode(ids)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    if not options.quantized.exists():
        quantize(options.source, options.quantized, options.threads)
    peer = Peer(options.quantized, options.threads, options.context)
    info = llama_cpp.llama_print_system_info().decode()
    ready = {"version": llama_cpp.__version__, "system": info}
    print(json.dumps(ready), flush=True)
    serve_times(peer)


if __name__ == "__main__":
    main()
