"""The sampler against a plain one that sorts everything; its draws against their distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localr1.candidates import Candidates, Sought
from localr1.errors import NumericsError, UsageError
from localr1.sampler import TOTAL_ERROR, Sampler, SamplingParams

NUM_DRAWS = 4000
CHI_SQUARE_LIMIT = 1e-4
"""A right sampler fails once in 10,000 seeds, and the seeds here are fixed. With 4,000 draws a
probability that is off by a tenth of itself at 0.3 gives a p-value below 1e-6."""


def kept_distribution(
    logits: torch.Tensor, params: SamplingParams, history: list[int]
) -> dict[int, float]:
    """Token to probability after all filters, by a full sort in float64."""
    values = logits.double().clone()
    for token in set(history):
        value = values[token]
        penalty = params.repetition_penalty
        values[token] = value / penalty if value > 0 else value * penalty
    if params.temperature == 0:
        return {int(values.argmax()): 1.0}
    order = sorted(range(len(values)), key=lambda token: (-float(values[token]), token))
    if params.top_k > 0:
        order = order[: params.top_k]
    probabilities = torch.softmax(values[order] / params.temperature, dim=0)
    if params.top_p < 1:
        before = torch.cumsum(probabilities, dim=0) - probabilities
        count = max(1, int((before < params.top_p).sum()))
        order, probabilities = order[:count], probabilities[:count]
    if params.min_p > 0:
        count = max(1, int((probabilities >= params.min_p * probabilities[0]).sum()))
        order, probabilities = order[:count], probabilities[:count]
    probabilities = probabilities / probabilities.sum()
    return dict(zip(order, probabilities.tolist(), strict=True))


def draws(
    logits: torch.Tensor, params: SamplingParams, history: list[int], count: int
) -> NDArray[np.int64]:
    sampler = Sampler(params)
    return np.array([sampler.sample(logits, history) for _ in range(count)])


def chi_square_p_value(observed: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """By Wilson and Hilferty's cube-root approximation, good far beyond what is asked here."""
    degrees = len(observed) - 1
    if degrees == 0:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


CASES = {
    "temperature": SamplingParams(temperature=0.7, top_p=1.0, seed=1),
    "top_p": SamplingParams(temperature=0.6, top_p=0.95, seed=2),
    "top_k": SamplingParams(temperature=1.0, top_k=7, top_p=1.0, seed=3),
    "top_k and top_p": SamplingParams(temperature=1.3, top_k=12, top_p=0.8, seed=4),
    "min_p": SamplingParams(temperature=0.9, top_p=1.0, min_p=0.05, seed=5),
    "all filters": SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, seed=6),
    "penalty": SamplingParams(temperature=0.8, top_p=0.97, repetition_penalty=1.4, seed=7),
    "flat": SamplingParams(temperature=50.0, top_p=0.5, seed=8),
    "top_k beyond the vocabulary": SamplingParams(temperature=1.0, top_k=9999, top_p=0.9, seed=9),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution_of_a_full_sort(name: str) -> None:
    params = CASES[name]
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(len(name))) * 3
    history = [int(token) for token in torch.topk(logits, 5).indices]
    expected = kept_distribution(logits, params, history)
    drawn = draws(logits, params, history, NUM_DRAWS)
    assert set(drawn.tolist()) <= set(expected), "a token that the filters drop was drawn"
    # Tokens too rare for the test's approximation are counted together.
    common = [token for token, share in expected.items() if share * NUM_DRAWS >= 8]
    observed = [int((drawn == token).sum()) for token in common]
    shares = [expected[token] * NUM_DRAWS for token in common]
    if NUM_DRAWS - sum(shares) >= 8:
        observed.append(NUM_DRAWS - sum(observed))
        shares.append(NUM_DRAWS - sum(shares))
    p_value = chi_square_p_value(np.array(observed), np.array(shares) * sum(observed) / sum(shares))
    assert p_value > CHI_SQUARE_LIMIT


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 300.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 700]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_draw_is_among_what_a_full_sort_keeps(
    size: int,
    scale: float,
    ties: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p, 1.0, seed)
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    if ties:
        logits = logits.round()
    kept = kept_distribution(logits, params, [])
    # The edge of top-p may fall on either side of one rounding: one more token is allowed there.
    wider = kept_distribution(
        logits, SamplingParams(temperature, top_k, min(1.0, top_p + 1e-5), min_p, 1.0, seed), []
    )
    assert set(draws(logits, params, [], 5).tolist()) <= set(kept) | set(wider)


def candidates_of(
    logits: torch.Tensor, sought: Sought, asked: list[int], error: float = 0.0
) -> Candidates:
    """What a device would find; it is `error` off in the rest's sum, and `asked` gains an entry
    where that was not enough."""
    values = logits.numpy()
    floor = values.max() - np.float32(sought.depth)
    is_candidate = values >= floor
    others = (values[~is_candidate].astype(np.float64) - values.max()) * sought.inverse_temperature
    rest = float(np.exp(others).sum()) * (1.0 + error)

    def all_logits() -> torch.Tensor:
        asked.append(1)
        return logits[None]

    ids = np.flatnonzero(is_candidate)
    return Candidates(ids, values[ids], floor, rest, others.size, all_logits)


@settings(max_examples=250, deadline=None)
@given(
    size=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 300.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-30, 0.05, 0.6, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 700]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1.0]),
    error=st.sampled_from([-TOTAL_ERROR / 2, 0.0, TOTAL_ERROR / 2]),
    seed=st.integers(0, 2**63 - 1),
)
def test_candidates_give_the_token_that_all_logits_give(
    size: int,
    scale: float,
    ties: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    error: float,
    seed: int,
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p, 1.0, seed)
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    if ties:
        logits = logits.round()
    whole, few = Sampler(params), Sampler(params)
    assert few.sought is not None
    found = candidates_of(logits, few.sought, [], error)
    for _ in range(5):
        assert few.sample_from(found) == whole.sample(logits)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "top_k and top_p", "min_p"])
def test_candidates_settle_most_draws(name: str) -> None:
    """Also at the edge of what they can: where top-k takes more tokens than there are, and where
    the total is only known to TOTAL_ERROR."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(len(name))) * 3
    whole, few, asked = Sampler(CASES[name]), Sampler(CASES[name]), list[int]()
    assert few.sought is not None
    found = candidates_of(logits, few.sought, asked)
    tokens = [few.sample_from(found) for _ in range(NUM_DRAWS // 4)]
    assert tokens == [whole.sample(logits) for _ in tokens]
    assert len(asked) < len(tokens) // 50


def test_a_total_at_the_edge_of_the_nucleus_takes_all_logits() -> None:
    """Two tokens more or less, by an error that a sum of float32 may have."""
    logits = torch.tensor([0.95, 0.04, 0.01 * 0.6, 0.01 * 0.4]).log() * 0.6
    asked: list[int] = []
    sampler = Sampler(SamplingParams(0.6, top_p=0.95, seed=1))
    assert sampler.sought is not None
    sampler.sample_from(candidates_of(logits, sampler.sought, asked))
    assert asked
    logits[0] += 0.001
    sampler.sample_from(candidates_of(logits, sampler.sought, asked))
    assert len(asked) == 1


def test_what_is_drawn_from_more_than_candidates() -> None:
    """A penalty may take any token up or down; a deep draw takes all logits."""
    assert Sampler(SamplingParams(repetition_penalty=1.1)).sought is None
    assert Sampler(SamplingParams(temperature=0.0)).sought == Sought(0.0, 1.0)
    logits = torch.tensor([0.0] + [-12.0] * 200_000)  # Half of it all lies deep.
    whole, few, asked = Sampler(CASES["temperature"]), Sampler(CASES["temperature"]), list[int]()
    logits *= CASES["temperature"].temperature
    assert few.sought is not None
    found = candidates_of(logits, few.sought, asked)
    tokens = [few.sample_from(found) for _ in range(20)]
    assert tokens == [whole.sample(logits) for _ in tokens]
    assert len(asked) == sum(token > 0 for token in tokens) > 0


def test_the_edges_of_the_nucleus() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    params = SamplingParams(temperature=1.0, top_p=0.79, seed=0)
    assert set(draws(probabilities.log(), params, [], 400).tolist()) == {0, 1}
    params = SamplingParams(temperature=1.0, top_p=0.81, seed=0)
    assert set(draws(probabilities.log(), params, [], 400).tolist()) == {0, 1, 2}


def test_min_p_keeps_what_lies_deep_where_it_is_small() -> None:
    logits = torch.tensor([0.0] + [-4.5] * 200 + [-5.4] * 200)
    params = SamplingParams(temperature=1.0, top_p=1.0, min_p=math.exp(-5.0), seed=0)
    drawn = draws(logits, params, [], 400)
    assert (drawn > 0).mean() == pytest.approx(200 / (200 + math.exp(4.5)), abs=0.1)
    assert drawn.max() <= 200


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0])
    assert Sampler(SamplingParams(temperature=0.0)).sample(logits) == 1
    assert Sampler(SamplingParams(temperature=1.0, top_k=1)).sample(logits) == 1


def test_the_same_seed_draws_the_same() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.5, seed=42)
    first = draws(logits, params, [], 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        assert (draws(logits, params, [], 50) == first).all()
    finally:
        torch.set_num_threads(threads)
    other = SamplingParams(temperature=1.5, seed=43)
    assert (draws(logits, other, [], 50) != first).any()


def test_a_drawn_seed_can_be_given_again() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SamplingParams(temperature=2.0))
    drawn = [sampler.sample(logits) for _ in range(20)]
    again = Sampler(SamplingParams(temperature=2.0, seed=sampler.seed))
    assert [again.sample(logits) for _ in range(20)] == drawn


def test_the_penalty_counts_tokens_that_came_later() -> None:
    logits = torch.tensor([5.0, 4.9, -9.0])
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=1.5))
    history: list[int] = []
    drawn = []
    for _ in range(2):
        drawn.append(sampler.sample(logits, history))
        history.append(drawn[-1])
    assert drawn == [0, 1]
    assert logits.tolist() == pytest.approx([5.0, 4.9, -9.0]), "the caller's logits were changed"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_is_an_error(value: float) -> None:
    logits = torch.zeros(100)
    logits[17] = value
    for params in (SamplingParams(), SamplingParams(temperature=0.0)):
        with pytest.raises(NumericsError, match="1 of 100"):
            Sampler(params).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_names_the_range(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"{name}: expected a .*number (from|above) .* to "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
