"""A child process of quality.py that quantizes with llama.cpp and hands over its logits, for an
interpreter that has `llama-cpp-py-sync` (a wheel with llama.cpp built in; no compiler is needed).

--library: another build of llama.cpp's, its backends in the same folder, such as that of the npm
package @node-llama-cpp/linux-x64 where the wheel's wants a newer C library: version 3.22.1 has the
structs of llama-cpp-py-sync 0.11413.

Requests are one JSON object a line on standard input, answers raw bytes:

    {"ids": [ids], "start": n}   ->   float32 [ids, vocabulary], of tokens behind n decoded ones

The first line of the answers is a JSON object about the peer and the file it made.
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_py_sync import _cffi_bindings as bindings

TYPES = {
    "f32": "LLAMA_FTYPE_ALL_F32",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
}
F32 = 0  # GGML_TYPE_F32

ffi: Any = bindings.get_ffi()


def load_library(path: Path | None) -> Any:
    if path is None:
        return bindings.get_lib()
    library = ffi.dlopen(str(path))
    (ggml,) = path.parent.glob("libggml.*")
    ctypes.CDLL(str(ggml)).ggml_backend_load_all_from_path(str(path.parent).encode())
    return library


def quantize(lib: Any, options: argparse.Namespace) -> None:
    """Requantize a GGUF with llama.cpp's own quantizer; float32 where `f32` is asked for."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, TYPES[options.type])
    params.allow_requantize = True
    params.nthread = options.threads
    alive = []  # C structs do not keep what they point to.
    if options.importance:
        values = dict(np.load(options.importance))
        entries = ffi.new("struct llama_model_imatrix_data[]", len(values) + 1)
        for entry, (name, value) in zip(entries, values.items(), strict=False):
            alive += [ffi.new("char[]", name.encode()), np.ascontiguousarray(value, np.float32)]
            entry.name = alive[-2]
            entry.data = ffi.cast("float *", ffi.from_buffer(alive[-1]))
            entry.size = alive[-1].size
        params.imatrix = entries
    holder = ffi.new("llama_model_quantize_params *", params)
    code = lib.llama_model_quantize(
        str(options.source).encode(), str(options.quantized).encode(), holder
    )
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantize {options.source}: code {code}")


class Peer:
    def __init__(self, lib: Any, path: Path, threads: int, context: int, *, exact: bool) -> None:
        """exact: keys and values in float32, attention without its float16 shortcuts."""
        self.lib = lib
        self.model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp could not open {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def logits(self, ids: list[int], start: int) -> bytes:
        lib = self.lib
        if start == 0:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        if lib.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        lib.llama_synchronize(self.context)
        lib.llama_batch_free(batch)
        values = lib.llama_get_logits(self.context)
        return bytes(ffi.buffer(values, len(ids) * self.vocabulary * 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, required=True)
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--importance", type=Path, help=".npz: mean square of each column's input")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--library", type=Path, help="libllama to use instead of the wheel's")
    options = parser.parse_args()
    lib = load_library(options.library)
    lib.llama_backend_init()
    quantize(lib, options)
    exact = options.type == "f32"
    peer = Peer(lib, options.quantized, options.threads, options.context, exact=exact)
    system = ffi.string(lib.llama_print_system_info()).decode()
    about = {"system": system, "tensor_bytes": lib.llama_model_size(peer.model)}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.buffer.write(peer.logits(request["ids"], request["start"]))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
