"""r1-nano's training model against transformers' DeepseekV3ForCausalLM, and its own decode path."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import run_in_chunks
from tokenizers import Tokenizer

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "r1_nano"))

from batches import Rows, loss_and_correct
from export import load_directory, save_directory
from model import Config, R1Nano, Router
from optimizer import MixedPrecision, muon_and_adam
from run_state import FILE
from sampling import generate
from tokenizer import BOS, THINK, USER, encode, prompt_text, train_tokenizer
from train import AT_ONCE_FROM, WarmUp

# float32 on both sides; logits are of order one, and a swapped rope half or a forgotten scaling
# factor moves them by more than 1e-2 (the planted errors below).
PARITY = 1e-4
# The same numbers summed in another order (absorbed against expanded attention).
DECODE = 1e-4

transformers = pytest.importorskip("transformers")


def routers(model: R1Nano) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(per_kind=200)


@pytest.fixture
def model() -> R1Nano:
    torch.manual_seed(5)
    model = R1Nano(Config(num_hidden_layers=3)).eval()
    for router in routers(model):
        # A bias large enough to change the choice, so that its place in the rule is tested.
        router.e_score_correction_bias.normal_(std=0.3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def reference_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert type(reference).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        logits: torch.Tensor = reference.eval()(ids).logits
    return logits


@torch.no_grad()
def test_logits_equal_transformers(model: R1Nano, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_directory(model, tokenizer, tmp_path, torch.float32)
    ids = torch.randint(0, 512, (3, 37))
    expected = reference_logits(tmp_path, ids)
    assert (model.logits(model(ids)) - expected).abs().max() < PARITY

    for router in routers(model):
        router.e_score_correction_bias.zero_()
    assert (model.logits(model(ids)) - expected).abs().max() > 100 * PARITY


@torch.no_grad()
def test_directory_round_trip(model: R1Nano, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_directory(model, tokenizer, tmp_path, torch.float32)
    again, read_tokenizer = load_directory(tmp_path, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    text = prompt_text("Wie viele r sind in Erdbeere?")
    assert encode(read_tokenizer, [text]) == encode(tokenizer, [text])


@torch.no_grad()
def test_decode_equals_forward(model: R1Nano) -> None:
    ids = torch.randint(3, 512, (4, 21))
    expected = model(ids)
    caches = model.new_caches(4, 32)
    model(ids[:, :16], caches)
    for position in range(16, 21):
        hidden = model.decode(ids[:, position], torch.full((4,), position), caches, 32)
        assert (hidden - expected[:, position]).abs().max() < DECODE


@torch.no_grad()
def test_batched_sampling_equals_one_by_one(model: R1Nano) -> None:
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 9, 13, 30, 7)]

    def greedy(batch: list[list[int]]) -> list[list[int]]:
        return generate(model, batch, max_new_tokens=12, temperature=0, generator=torch.Generator())

    assert greedy(prompts) == [greedy([prompt])[0] for prompt in prompts]


def test_no_tensor_is_made_on_the_default_device() -> None:
    torch.manual_seed(3)
    model = R1Nano(Config(num_hidden_layers=2))
    optimizer = MixedPrecision(model, lambda masters: muon_and_adam(masters, 0.02, 0.003))
    ids = torch.randint(3, 512, (2, 9))
    targets = torch.randint(3, 512, (2, 9))
    positions = torch.full((2,), 9)
    # Whatever does not name its device would land on "meta" here, and meet the model's tensors.
    with torch.device("meta"):
        loss, _ = loss_and_correct(model, Rows(ids, targets, (0, 1)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
        model.balance(0.01)
        caches = model.new_caches(2, 16)
        with torch.no_grad():
            model(ids, caches)
            assert model.decode(ids[:, 0], positions, caches, 16).device.type == "cpu"


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path, model: R1Nano) -> None:
    save_directory(model, tokenizer, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n\\boxed{4}"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    one = fast.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert one == prompt_text("What is 2 + 2?")
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == prompt_text("And 3 + 3?", [("What is 2 + 2?", "\\boxed{4}")])
    assert (text.count(BOS), text.count(USER), text.count(THINK)) == (1, 2, 1)
    ids = fast.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ids == encode(tokenizer, [one])[0]


@torch.no_grad()
def test_logits_equal_localr1(model: R1Nano, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_directory(model, tokenizer, tmp_path, torch.float32)
    with open_checkpoint(tmp_path) as checkpoint:
        runtime = load_model(checkpoint, ReferenceKernels())
    ids = torch.randint(0, 512, (37,))
    expected = model.logits(model(ids[None]))[0]
    assert (run_in_chunks(runtime, ids, [20, 10]) - expected).abs().max() < PARITY


def test_a_resumed_run_is_the_run_that_never_stopped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = WarmUp(0, 0.02, 0.003, "cpu")
    whole.train_step(tokenizer, 4, 4, 1.0)
    whole.save(tmp_path / FILE)
    resumed = WarmUp(1, 0.02, 0.003, "cpu")  # Another start: all of it must come from the file.
    resumed.seed = 0
    resumed.load(tmp_path / FILE)
    assert resumed.step == whole.step == 1
    for run in (whole, resumed):
        run.train_step(tokenizer, 4, 4, 0.5)
    states = [run.optimizer.state() | dict(run.model.state_dict()) for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_second_run_begins_with_the_first_one_s_weights(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = WarmUp(0, 0.02, 0.003, "cpu")
    first.train_step(tokenizer, 4, 4, 1.0)
    save_directory(first.model, tokenizer, tmp_path)
    second = WarmUp(1, 0.02, 0.003, "cpu")
    second.begin_with(load_directory(tmp_path, torch.float32)[0])
    assert second.step == AT_ONCE_FROM
    begun, ended = second.model.state_dict(), first.model.state_dict()
    # The router stays in float32 while it is trained, and is exported in bfloat16.
    assert all(torch.equal(begun[name].bfloat16(), ended[name].bfloat16()) for name in ended)
    second.train_step(tokenizer, 4, 4, 1.0)
    assert not torch.equal(second.model.lm_head.weight, first.model.lm_head.weight)
    third = WarmUp(1, 0.02, 0.003, "cpu")
    third.begin_with(load_directory(tmp_path, torch.float32)[0])
    third.train_step(tokenizer, 4, 4, 1.0)
    assert torch.equal(second.model.lm_head.weight, third.model.lm_head.weight)
