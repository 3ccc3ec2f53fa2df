"""llama.cpp opens what `localr1 export` writes and computes the same, where xllamacpp is installed
(pip install xllamacpp: a build of llama.cpp's server; no part of the test environment)."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import MIXTURES, save_source
from test_gguf_export import CASES, known_tokenizer
from tiny_models import prompt, transformer_logits
from torch import Tensor

from localr1.quant.gguf_export import export_gguf

xllamacpp = pytest.importorskip("xllamacpp")

CLOSE = 0.25
"""Of log probabilities of the five most probable tokens. llama.cpp rounds activations, and the
cache to float16: measured 0.02 to 0.15 on these peaked tiny models. q and k without their
permutation give 16."""
COUNT = 5
SMALL = ["v2-lite"]
"""llama.cpp takes a model for V2-Lite by its 27 layers alone."""


class Server:
    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 64
        params.cpuparams.n_threads = 1
        params.n_parallel = 1
        params.warmup = False
        self._server = xllamacpp.Server(params)

    def next_token(self, ids: Tensor) -> dict[int, float] | None:
        """Log probabilities of the COUNT best; None where the best is half of a character, of which
        the server tells nothing."""
        body = {"prompt": ids.tolist(), "n_predict": 1, "temperature": 0.0, "n_probs": COUNT}
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            document: dict[str, Any] = json.loads(answer.read())
        if "completion_probabilities" not in document:
            return None
        best = document["completion_probabilities"][0]["top_logprobs"]
        return {each["id"]: each["logprob"] for each in best}


@pytest.mark.parametrize("case", [case for case in CASES if case not in SMALL])
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    model = save_source(tmp_path / "source", model_type, **changes)
    known_tokenizer(tmp_path / "source")
    export_gguf(tmp_path / "source", tmp_path / "a.gguf")
    server = Server(tmp_path / "a.gguf")
    differences = []
    for length in (24, 20, 16, 12, 8):
        ids = prompt(0, length)
        expected = torch.log_softmax(transformer_logits(model, ids)[-1], 0)
        found = server.next_token(ids)
        if found is not None:
            errors = [abs(float(expected[token]) - each) for token, each in found.items()]
            differences.append(max(errors))
    assert differences
    if model_type in MIXTURES:  # Where an expert's choice is nearly tied, rounding decides it.
        assert sorted(differences)[len(differences) // 2] < CLOSE
    else:
        assert max(differences) < CLOSE
