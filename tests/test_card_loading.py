"""A dense model on a card, through the same door as chat and bench."""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import VOCAB_SIZE, tokenizer_document
from driver_model import Machine, ModelDriver
from gpu_model import skip_where_there_is_no_model
from packed_models import SHAPE, packed_checkpoint
from safetensors.torch import save_file
from test_load import TEMPLATE, answer
from tiny_models import tiny_transformer
from typer.testing import CliRunner

from localr1.cli.conversation import Conversation
from localr1.cli.keeper import SessionKeeper
from localr1.cli.main import app
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, GenerationParams
from localr1.errors import DeviceError, KernelError, LocalR1Error, MemoryLimitError, UsageError
from localr1.experts.options import ExpertOptions
from localr1.kernels.gpu_driver import DENSE_PROGRAMS
from localr1.load import load_engine
from localr1.sampler import SamplingParams
from localr1.sessions.archive import SessionArchive

CARD = 1 << 30
PROMPT = tuple(range(40, 70))
TOLD = "model computes 2 of 2 layers and the head; 0.0 GiB of its memory are taken"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny-qwen2"), 4)


def written(path: Path, bits: int) -> Path:
    """A quantized tiny qwen2 as a directory."""
    sizes = {**SHAPE, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 192}
    checkpoint = packed_checkpoint(tiny_transformer("qwen2", 0, **sizes), bits)
    tensors = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, path / "model.safetensors")
    documents: dict[str, Any] = {
        "config.json": dict(checkpoint.config),
        "tokenizer.json": tokenizer_document(),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
        },
    }
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document), encoding="utf-8")
    return path


class Cards:
    """Models of cards in the place of this machine's. drivers: those that were opened. missing: the
    number of one that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch, total: int = CARD) -> None:
        skip_where_there_is_no_model()
        self.drivers: list[ModelDriver] = []
        self.total = total
        self.missing: int | None = None
        self._machine = Machine()
        patch.setattr("localr1.load.open_card", self.open)

    def open(
        self, programs: object, rows_per_block: int, files: Sequence[str], number: int
    ) -> ModelDriver:
        assert tuple(files) == DENSE_PROGRAMS
        if number == self.missing:
            raise UsageError(f"card {number}", expected="0", found=number)
        name = f"model {number}" if number else "model"
        self.drivers.append(
            ModelDriver(rows_per_block, total=self.total, machine=self._machine, name=name)
        )
        return self.drivers[-1]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


def chat_on(engine: Engine, folder: Path) -> tuple[ChatSession, SessionKeeper]:
    """Of a few tokens, which are drawn."""
    conversation = Conversation(engine, {"max_tokens": 6})
    archive = SessionArchive(folder / "sessions")
    keeper = SessionKeeper(archive, conversation, "/a/model")
    output = Output(io.StringIO(), io.StringIO())
    return ChatSession(output, conversation, ReplyStyle(), goes_on=True, keeper=keeper), keeper


def test_what_a_card_says_is_what_the_cpu_says(packed: Path, cards: Cards) -> None:
    with closing(load_engine(packed, threads=1)) as engine:
        assert engine.where == ""
        wanted, _ = answer(engine, PROMPT, 30)
    for options in (
        ExpertOptions(device="cuda"),
        ExpertOptions(device="cuda:16MiB"),
        ExpertOptions(device="cuda", gpu_layers=1),
    ):
        with closing(load_engine(packed, threads=1, experts=options)) as engine:
            rest = ", the CPU the rest" if options.gpu_layers else " and the head"
            assert f"{options.gpu_layers or 2} of 2 layers{rest}" in engine.where
            for _ in range(2):
                assert answer(engine, PROMPT, 30)[0] == wanted, options
            assert cards.drivers[-1].calls["launch_graph"] > 20
    assert len(cards.drivers) == 3
    for driver in cards.drivers:
        assert driver.taken == driver.num_pinned == 0
        assert driver.closed == 1


@pytest.mark.parametrize(
    ("options", "names", "told"),
    [
        ({"device": "cuda:1"}, ["model 1"], "model 1 computes 2 of 2 layers and the head"),
        ({"device": "cuda:1:16MiB"}, ["model 1"], "model 1 computes 2 of 2 layers and the head"),
        ({"devices": "1"}, ["model 1"], "model 1 computes 2 of 2 layers and the head"),
        (
            {"devices": "0,1"},
            ["model", "model 1"],
            "model computes 1 and model 1 1 of 2 layers and",
        ),
        (
            {"device": "cuda:16MiB", "devices": "2, 0:8MiB", "gpu_layers": 2},
            ["model 2", "model"],
            "model 2 computes 1 and model 1 of 2 layers and the head",
        ),
    ],
)
def test_cards_that_are_chosen(
    packed: Path, cards: Cards, options: dict[str, Any], names: list[str], told: str
) -> None:
    with closing(load_engine(packed, threads=1)) as engine:
        wanted, _ = answer(engine, PROMPT, 30)
    with closing(load_engine(packed, threads=1, experts=ExpertOptions(**options))) as engine:
        assert told in engine.where
        assert [driver.name for driver in cards.drivers] == names
        assert answer(engine, PROMPT, 30)[0] == wanted
    for driver in cards.drivers:
        assert driver.taken == driver.num_pinned == 0
        assert driver.closed == 1


@pytest.mark.parametrize("bits", [5, 6])
def test_fewer_than_eight_bits_are_eight_on_a_card(bits: int, cards: Cards, tmp_path: Path) -> None:
    """What the CPU computes in 5 and 6 bits is the same to the last bit, and takes less memory."""
    path = written(tmp_path, bits)
    with closing(load_engine(path, threads=1)) as engine:
        wanted, _ = answer(engine, PROMPT, 30)
        in_memory = engine.model.weight_bytes
    for options in (ExpertOptions(device="cuda"), ExpertOptions(device="cuda", gpu_layers=1)):
        with closing(load_engine(path, threads=1, experts=options)) as engine:
            assert answer(engine, PROMPT, 30)[0] == wanted
            assert engine.model.weight_bytes > in_memory
            assert cards.drivers[-1].calls["launch_graph"] > 20


def test_a_card_that_fails_costs_one_reply(packed: Path, cards: Cards) -> None:
    """What was said before it is not said, the next reply comes from the CPU."""
    with closing(load_engine(packed, threads=1)) as engine:
        wanted, _ = answer(engine, PROMPT, 30)
    with closing(load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))) as engine:
        error = DeviceError("model: cuStreamSynchronize", found="ILLEGAL_ADDRESS")
        cards.drivers[0].arm("synchronize", 9, error, lost=True)
        with pytest.raises(DeviceError, match=r"2 layers of 64 x 96.*ILLEGAL_ADDRESS"):
            answer(engine, PROMPT, 30)
        for _ in range(2):
            assert answer(engine, PROMPT, 30)[0] == wanted
    assert cards.drivers[0].closed == 1


@pytest.mark.parametrize(
    ("sampling", "on_card"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.9, "top_k": 1}, True),
        ({"temperature": 0.6, "top_p": 0.95, "seed": 3}, True),
        ({"temperature": 0.9, "seed": 3, "top_p": 1.0}, True),
        ({"temperature": 0.9, "seed": 3, "top_k": 7, "top_p": 1.0, "min_p": 0.01}, True),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, False),
    ],
)
def test_who_chooses_a_token(
    packed: Path, cards: Cards, sampling: dict[str, Any], on_card: bool
) -> None:
    """The host, from candidates that the card finds, but for a penalty. Both say the same."""
    params = GenerationParams(SamplingParams(**sampling), 12, ignore_eos=True)
    said = []
    for options in (ExpertOptions(), ExpertOptions(device="cuda")):
        with closing(load_engine(packed, threads=1, experts=options)) as engine:
            events = list(engine.generate(PROMPT, params))
            said.append([event.text for event in events if isinstance(event, Delta)])
    assert said[0] == said[1]
    assert cards.drivers[0].launched.count("gather_candidates") == (11 if on_card else 0)


def test_a_conversation_reuses_its_cache(packed: Path, cards: Cards) -> None:
    with closing(load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))) as engine:
        answer(engine, PROMPT, 5)
        _, done = answer(engine, (*PROMPT, 71, 72), 5)
        assert done.usage.cached_tokens == len(PROMPT)


def test_a_chat_reads_ahead_on_the_card_and_keeps_no_cache(
    packed: Path, cards: Cards, tmp_path: Path
) -> None:
    """From a thread of its own; what only the card holds is read anew when a session goes on."""
    with closing(load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))) as engine:
        session, keeper = chat_on(engine, tmp_path)
        session.say("What is larger?")
        session.settling.wait()
        assert session.settling.error is None
        assert engine.sequence.ids == session.conversation.coming_prompt()
        session.close()
        (kept,) = keeper.archive.sessions()
        assert not keeper.archive.snapshot_path(kept.id).exists()
    with closing(load_engine(packed, threads=1)) as engine:
        session, keeper = chat_on(engine, tmp_path)
        keeper.resume(kept.id)
        session.say("And now?")
        session.close()
        assert keeper.archive.snapshot_path(kept.id).exists()
    with closing(load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))) as engine:
        session, keeper = chat_on(engine, tmp_path)
        assert "read anew, into the card's memory" in keeper.resume(kept.id)
        session.close()


def test_a_card_keeps_no_cache_in_8_bits(packed: Path, cards: Cards) -> None:
    with pytest.raises(UsageError, match="--kv-bits 8 beside --device cuda"):
        load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"), kv_bits=8)
    assert not cards.drivers


def test_sampling_is_the_hosts(packed: Path, cards: Cards) -> None:
    def said(engine: Engine) -> list[str]:
        params = GenerationParams(SamplingParams(temperature=1.0, seed=3), 20, ignore_eos=True)
        return [str(event) for event in engine.generate(PROMPT, params)][1:-1]

    with closing(load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))) as engine:
        found = said(engine)
    with closing(load_engine(packed, threads=1)) as engine:
        assert said(engine) == found


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"device": "cuda", "ram": "50%"}, UsageError, "--ram, --vram, --policy"),
        ({"device": "cuda", "vram": "50%"}, UsageError, "--ram, --vram, --policy"),
        ({"device": "simulated:1GiB"}, UsageError, "--ram, --vram, --policy"),
        ({"device": "cuda:2GiB"}, MemoryLimitError, r"expected at most 0\.5 GiB"),
        ({"device": "cuda:64KiB"}, MemoryLimitError, "memory for 1 layer of the model"),
        ({"device": "cuda", "gpu_layers": 0}, UsageError, "--gpu-layers"),
        ({"devices": "0,1", "gpu_layers": 1}, UsageError, "--gpu-layers: .*found 1 layer for 2"),
        ({"devices": "0,1,2"}, UsageError, "--devices: .* found 2 layers for 3 cards"),
        ({"devices": "0,1:2GiB"}, MemoryLimitError, r"what model 1 has free but"),
        ({"devices": "0:64KiB,1"}, MemoryLimitError, "model: memory for 1 layer of the model"),
        ({"devices": "0,1", "vram": "1MiB,2MiB"}, UsageError, "--ram, --vram, --policy"),
        ({"devices": "0,7"}, UsageError, "card 7: expected 0, found 7"),
    ],
)
def test_what_cannot_be_is_refused(
    packed: Path, cards: Cards, options: dict[str, Any], kind: type[LocalR1Error], told: str
) -> None:
    cards.missing = 7
    with pytest.raises(kind, match=told):
        load_engine(packed, threads=1, experts=ExpertOptions(**options))
    for driver in cards.drivers:
        assert driver.taken == driver.num_pinned == 0
        assert driver.closed == 1


def test_reference_kernels_have_no_card(packed: Path, cards: Cards) -> None:
    with pytest.raises(UsageError, match="native kernels beside it"):
        load_engine(packed, kernels="reference", experts=ExpertOptions(device="cuda"))


def test_a_model_that_is_not_quantized_is_refused(tmp_path: Path, cards: Cards) -> None:
    tiny_transformer("llama", 0, vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    document = json.dumps(tokenizer_document())
    (tmp_path / "tokenizer.json").write_text(document, encoding="utf-8")
    with pytest.raises(KernelError, match=r"Quantize the model with `localr1 quantize`"):
        load_engine(tmp_path, threads=1, experts=ExpertOptions(device="cuda"))
    assert cards.drivers[0].closed == 1


def test_chat_and_bench_say_what_computes(packed: Path, cards: Cards) -> None:
    asked = ["chat", str(packed), "-p", "hello", "--max-tokens", "3", "-t", "1"]
    result = CliRunner().invoke(app, [*asked, "--device", "cuda"])
    assert result.exit_code == 0, result.output
    assert TOLD in result.stderr
    counts = ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--device", "cuda"]
    result = CliRunner().invoke(app, ["bench", str(packed), *counts])
    assert result.exit_code == 0, result.output
    assert TOLD in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, ["bench", str(packed), *counts, "-o", "json"])
    assert json.loads(result.stdout)[0]["device"] == TOLD
    result = CliRunner().invoke(app, [*asked, "--devices", "0,1"])
    assert result.exit_code == 0, result.output
    assert "model computes 1 and model 1 1 of 2 layers and the head" in result.stderr
    result = CliRunner().invoke(app, ["bench", str(packed), *counts[:-2], "--devices", "1,0"])
    assert "model 1 computes 1 and model 1 of 2 layers" in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, [*asked, "--gpu-layers", "1"])
    assert isinstance(result.exception, UsageError) or result.exit_code == 2


def test_arithmetic_is_computed_there_too(packed: Path, cards: Cards) -> None:
    asked = ["eval", "arithmetic", str(packed), "--per-kind", "1", "--max-tokens", "2", "--json"]
    found = []
    for options in ([], ["--device", "cuda"], ["--devices", "1,0", "--gpu-layers", "2"]):
        result = CliRunner().invoke(app, [*asked, "-t", "1", *options])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[1] == found[2] == found[0]
    assert [driver.name for driver in cards.drivers] == ["model", "model 1", "model"]
    assert all(driver.launched for driver in cards.drivers)


def test_perplexity_and_divergence_are_computed_there_too(
    packed: Path, cards: Cards, tmp_path: Path
) -> None:
    """But for attention's last bits those of the CPU: in tiles, and in a window that leaves a rest.
    What is compared with is the CPU's own."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. 0123456789" * 2)
    read = ["--text", str(text), "--window", "70", "--json", "-t", "1"]

    def measured(*asked: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["eval", *asked, *read])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    cpu = measured("ppl", str(packed))
    one = measured("ppl", str(packed), "--device", "cuda")
    two = measured("kl", str(packed), str(packed), "--devices", "1,0", "--gpu-layers", "2")
    for found in (one, two["model"]):
        assert found["num_tokens"] == cpu["num_tokens"]
        assert found["loss"]["value"] == pytest.approx(cpu["loss"]["value"], rel=1e-4)
    assert abs(two["kl"]["value"]) < 1e-5
    assert two["reference"] == cpu
    assert [driver.name for driver in cards.drivers] == ["model", "model 1", "model"]
    assert all(driver.launched and driver.closed == 1 for driver in cards.drivers)


def test_without_a_card_one_sentence_says_so(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="expected an NVIDIA graphics card and its driver"):
        load_engine(packed, threads=1, experts=ExpertOptions(device="cuda"))
