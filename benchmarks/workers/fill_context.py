"""Fills a model's context to the last token in a process of its own; prints one JSON line.

python fill_context.py MODEL CONTEXT [--threads N]
"""

import argparse
import json

from localr1.cli.memory import peak_memory_bytes
from localr1.engine.events import GenerationParams
from localr1.load import load_engine
from localr1.sampler import SamplingParams

DECODED = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("context", type=int)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    started = peak_memory_bytes()
    engine = load_engine(arguments.model, context=arguments.context, threads=arguments.threads)
    loaded = peak_memory_bytes()
    # Ids all over the vocabulary, so that every expert and row is touched.
    vocabulary = engine.tokenizer.vocab_size
    prompt = [(i * 7919) % vocabulary for i in range(max(arguments.context - DECODED, 1))]
    # The flattest distribution there is: sampling sorts the whole vocabulary.
    params = GenerationParams(
        SamplingParams(temperature=100.0, top_p=0.999, seed=1), ignore_eos=True, max_tokens=None
    )
    for _ in engine.generate(prompt, params):
        pass
    result = {"started": started, "loaded": loaded, "peak": peak_memory_bytes()}
    print(json.dumps(result | {"threads": engine.threads}))


if __name__ == "__main__":
    main()
