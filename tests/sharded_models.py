"""r1-nano as large models are released: in numbered shards, with an index."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from localr1.embedded import R1_NANO


def write_sharded(directory: Path, num_shards: int = 6) -> Path:
    """The embedded model, its tensors in the order of its layers, some in each shard."""
    shutil.copytree(R1_NANO, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(R1_NANO / "model.safetensors", "pt") as stored:
        names = sorted(stored.keys(), key=_by_layer)
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(num_shards):
            part = names[
                len(names) * number // num_shards : len(names) * (number + 1) // num_shards
            ]
            tensors = {name: stored.get_tensor(name) for name in part}
            file_name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
            save_file(tensors, directory / file_name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _by_layer(name: str) -> tuple[int, str]:
    """As real checkpoints: the embedding, the layers, the norm and the head."""
    pieces = name.split(".")
    if "layers" in pieces:
        return int(pieces[pieces.index("layers") + 1]) + 1, name
    return (0 if "embed" in name else 10**6), name
