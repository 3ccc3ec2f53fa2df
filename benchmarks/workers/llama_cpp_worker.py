"""A child process that runs llama.cpp on command, for an interpreter that has llama-cpp-python.

It times `llama_decode` alone (no sampling, no tokenizer, no server), as llama-bench does, or with
--logits hands over what it computes. Requests are one JSON object a line on standard input:

    {"prefix": [ids], "batches": [[ids], ...]}   ->  {"seconds": ...}, of the batches alone
    {"ids": [ids], "start": n}                   ->  the bytes of float32 [ids, vocabulary]

The first line of the answers is a JSON object about the peer; see compare_llama_cpp.py, quality.py.
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp

TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Requantize a GGUF with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.allow_requantize = True
    params.nthread = threads
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantize {source}: code {code}")


class Peer:
    def __init__(self, path: Path, threads: int, context: int, exact: bool) -> None:
        """exact: keys and values in float32, attention without its float16 shortcuts."""
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = context
        params.n_ubatch = 512  # llama-bench's default
        params.n_threads = threads
        params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp could not open {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        self._run(llama_cpp.llama_batch_get_one(tokens, len(ids)))

    def logits(self, ids: list[int], start: int) -> bytes:
        """float32 [ids, vocabulary] of tokens that follow `start` decoded ones."""
        if start == 0:
            self.clear()
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        self._run(batch)
        llama_cpp.llama_batch_free(batch)
        values = llama_cpp.llama_get_logits(self.context)
        return ctypes.string_at(values, len(ids) * self.vocabulary * 4)

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


def serve_logits(peer: Peer) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.buffer.write(peer.logits(request["ids"], request["start"]))
        sys.stdout.buffer.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, required=True)
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--logits", action="store_true", help="hand over logits, do not time")
    options = parser.parse_args()
    if not options.quantized.exists():
        quantize(options.source, options.quantized, options.type, options.threads)
    peer = Peer(options.quantized, options.threads, options.context, options.type == "f32")
    info = llama_cpp.llama_print_system_info().decode()
    ready = {"version": llama_cpp.__version__, "system": info}
    print(json.dumps(ready), flush=True)
    (serve_logits if options.logits else serve_times)(peer)


if __name__ == "__main__":
    main()
