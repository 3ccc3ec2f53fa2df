"""Where experts are computed, and whether something pays: decisions without torch."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localr1.errors import UsageError
from localr1.experts.options import CardSpec, ExpertOptions, SimulatedSpec, parse_device
from localr1.experts.schedule import LEARNING, MIN_STREAM_TOKENS, POINTS, Curve, Rates, Use, split
from localr1.experts.trial import BLOCK, EXPLORE, Trial
from localr1.experts.usage import ExpertUsage


def rates(cpu: float, device: float, link: float) -> Rates:
    """Seconds of an expert in proportion to its tokens; copies and products overlap."""
    return Rates(
        Curve([cpu * point for point in POINTS]),
        Curve([device * point for point in POINTS]),
        Curve([max(device * point, link) for point in POINTS]),
        link,
    )


def slow_link() -> Rates:
    return Rates(
        Curve([1.0, 2.0, 5.0, 17.0]), Curve([0.2, 0.2, 0.3, 0.5]), Curve([4.0] * 4), link=4.0
    )


def makespan(uses: list[Use], on_device: set[int], given_rates: Rates) -> float:
    device = cpu = 0.0
    for use in uses:
        if use.expert in on_device:
            seconds = given_rates.device(use.tokens)
            device += seconds if use.on_device else given_rates.streamed(use.tokens)
        else:
            cpu += given_rates.cpu(use.tokens)
    return max(device, cpu)


uses_of_a_pass = st.lists(
    st.tuples(st.integers(1, 100), st.booleans(), st.booleans()), min_size=1, max_size=7
).map(
    lambda drawn: [
        # An expert lies somewhere in memory, or is read into RAM.
        Use(expert, tokens, on_device, in_ram)
        for expert, (tokens, on_device, in_ram) in enumerate(drawn)
    ]
)


@given(uses_of_a_pass, st.floats(0.1, 10), st.floats(0.01, 10), st.floats(0.1, 100))
def test_a_split_is_near_the_best_there_is(
    uses: list[Use], cpu: float, device: float, link: float
) -> None:
    """Against every assignment that the rules allow. The order by ratios with the best cut is at
    most the longest single expert worse than the best."""
    given_rates = rates(cpu, device, link)
    parts = split(uses, given_rates, max_streamed=len(uses))
    found = {use.expert for use in (*parts.device, *parts.streamed)}
    assert sorted(use.expert for use in (*parts.device, *parts.streamed, *parts.cpu)) == list(
        range(len(uses))
    )
    forced = {use.expert for use in uses if use.on_device and not use.in_ram}
    barred = {
        use.expert
        for use in uses
        if not use.on_device and (not use.in_ram or use.tokens < MIN_STREAM_TOKENS)
    }
    assert forced <= found
    assert not barred & found
    assert all(use.on_device for use in parts.device)
    assert all(use.in_ram and not use.on_device for use in parts.streamed)
    free = [use.expert for use in uses if use.expert not in forced | barred]
    best = min(
        makespan(uses, forced | set(chosen), given_rates)
        for size in range(len(free) + 1)
        for chosen in itertools.combinations(free, size)
    )
    longest = max(
        min(given_rates.cpu(use.tokens), given_rates.streamed(use.tokens)) for use in uses
    )
    assert makespan(uses, found, given_rates) <= best + longest + 1e-9


def test_above_the_break_even_experts_are_streamed() -> None:
    """A copy takes 4: an expert of 1 token takes the CPU 1, one of 64 tokens 17."""
    few = [Use(expert, 1, False, True) for expert in range(4)]
    many = [Use(expert, 64, False, True) for expert in range(5)]
    assert not split(few, slow_link(), max_streamed=9).streamed
    streamed = split(many, slow_link(), max_streamed=9).streamed
    assert len(streamed) == 4  # 16 on the device, 17 on the CPU.
    assert len(split(many, slow_link(), max_streamed=1).streamed) == 1
    in_decode = [Use(expert, 1, False, True) for expert in range(100)]
    assert not split(in_decode, slow_link(), max_streamed=100).streamed


def test_a_limit_on_streaming_spares_nothing_that_lies_on_the_device() -> None:
    """What may not be streamed is not counted as if it were."""
    uses = [Use(expert, 64, False, True) for expert in range(6)]
    uses += [Use(6 + expert, 4, True, True) for expert in range(4)]
    parts = split(uses, slow_link(), max_streamed=0)
    assert [use.expert for use in parts.device] == [6, 7, 8, 9]
    assert not parts.streamed


@pytest.mark.parametrize("pays", [True, False])
def test_streaming_that_does_not_pay_is_left(pays: bool) -> None:
    """Copies take of the cores and the memory that compute, which no curve knows: found out by
    trying, whatever the work of a layer."""
    given_rates = slow_link()
    streamed = 0
    for layer in range(40 * BLOCK):
        uses = [Use(expert, 64, False, True) for expert in range(2 + layer % 5)]
        parts = split(uses, given_rates, max_streamed=9)
        alone = 17.0 * len(uses)
        copied = alone * (0.7 if pays else 1.2)
        given_rates.observe_layer(uses, copied if parts.streamed else alone)
        streamed += bool(parts.streamed)
    share = streamed / (40 * BLOCK)
    assert share > 0.75 if pays else share < 0.25


def test_layers_that_say_nothing_of_streaming_are_not_asked() -> None:
    given_rates = slow_link()
    for _ in range(4 * BLOCK):
        given_rates.observe_layer([Use(0, 1, False, True), Use(1, 9, True, True)], 1.0)
        given_rates.observe_layer([Use(0, 9, False, True), Use(1, 9, False, False)], 1.0)
    assert given_rates.streaming.is_on


def test_what_lies_on_the_device_may_be_computed_by_an_idle_cpu() -> None:
    """A device that is no faster than the CPU does half of what both hold."""
    both = [Use(expert, 1, True, True) for expert in range(8)]
    parts = split(both, rates(1.0, 1.0, 10.0), max_streamed=8)
    assert len(parts.device) == len(parts.cpu) == 4
    fast = split(both, rates(10.0, 0.1, 10.0), max_streamed=8)
    assert len(fast.device) == 8


def test_rates_follow_what_is_measured() -> None:
    curve = Curve([1.0, 2.0, 4.0, 10.0])
    assert [curve(tokens) for tokens in (1, 4, 10, 64, 160)] == [1.0, 2.0, 3.0, 10.0, 22.0]
    for _ in range(int(10 / LEARNING)):
        curve.observe([1, 4], 6.0)  # Twice what was expected.
    assert curve(1) == pytest.approx(2.0, rel=0.01)
    curve.observe([1], 1e9)  # The machine slept: no measurement counts beyond ten times.
    assert curve(1) < 3.0
    link = rates(1.0, 1.0, 1.0)
    for _ in range(int(10 / LEARNING)):
        link.observe_link(2, 6.0)
    assert link.link == pytest.approx(3.0, rel=0.01)


def run_trial(trial: Trial, cost_on: float, cost_off: float, count: int) -> float:
    """Share of `count` measurements that were made with it on."""
    on = 0
    for _ in range(count):
        on += trial.is_on
        trial.measured(cost_on if trial.is_on else cost_off)
    return on / count


def test_what_does_not_pay_switches_itself_off() -> None:
    trial = Trial()
    assert trial.is_on
    assert run_trial(trial, 2.0, 1.0, 100 * BLOCK) < 1.5 / EXPLORE + 0.02
    assert not trial.pays
    # The conversation changes, and it begins to pay.
    assert run_trial(trial, 1.0, 2.0, 200 * BLOCK) > 0.7
    assert trial.pays


def test_what_makes_no_difference_is_off() -> None:
    trial = Trial()
    run_trial(trial, 1.0, 1.0, 10 * BLOCK)
    assert not trial.pays


def test_usage_says_what_bound_the_speed() -> None:
    usage = ExpertUsage(ram_hits=8, reads=2, seconds=1.0, ram_seconds=0.3, disk_seconds=0.5)
    assert usage.bound == "disk"
    assert usage.hit_rate == usage.memory_rate == 0.8
    usage.device_hits, usage.device_bytes, usage.streamed = 10, 1, 4
    assert usage.hit_rate == 0.3
    usage.device_hits, usage.streamed, usage.spared = 0, 0, 2  # The CPU computed what lay there.
    assert usage.hit_rate == 0.2
    usage.seconds = 3.0
    assert usage.bound == "compute"
    before = usage.copy()
    usage.reads += 5
    assert (usage - before).reads == 5
    assert (usage - before).ram_hits == 0
    assert ExpertUsage().hit_rate == 0.0


def test_devices_are_read_from_what_a_user_writes() -> None:
    assert parse_device("cpu") is None
    assert parse_device("cuda") == CardSpec()
    assert parse_device("cuda:8GiB") == CardSpec(0, 8 << 30)
    assert parse_device("cuda:1") == CardSpec(1)
    assert parse_device("cuda:12:8GiB") == CardSpec(12, 8 << 30)
    assert parse_device("cuda:1073741824") == CardSpec(0, 1 << 30)
    assert parse_device("simulated:24GiB") == SimulatedSpec(24 << 30)
    found = parse_device("simulated:8GB, pcie=16GB/s, latency=1ms, threads=2")
    assert found == SimulatedSpec(8 * 10**9, 16e9, 1e-3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "expected cpu, cuda, cuda:1, cuda:8GiB or simulated:24GiB"),
        ("simulated", "expected cpu, cuda, cuda:1, cuda:8GiB or simulated:24GiB"),
        ("cuda:", "expected cpu, cuda"),
        ("cuda:50%", "--device: expected an amount"),
        ("cuda:1:", "--device: expected an amount"),
        ("cuda:1:lots", "--device: expected an amount"),
        ("cuda:0,1", "--device: expected an amount"),
        ("simulated:lots", "--device"),
        ("simulated:-1GiB", "--device"),
        ("simulated:1GiB,pcie=25", "--device: pcie: expected such as 25GB/s"),
        ("simulated:1GiB,pcie=0/s", "--device: pcie"),
        ("simulated:1GiB,latency=5", "--device: latency: expected such as 10us"),
        ("simulated:1GiB,threads=0", "--device: threads: expected 1 to 1024"),
        ("simulated:1GiB,speed=9", "expected pcie, latency and threads once, found .*speed"),
        ("simulated:1GiB,threads=1,threads=2", "once"),
    ],
)
def test_a_device_that_is_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_device(text)


def test_several_cards_are_read_from_what_a_user_writes() -> None:
    assert ExpertOptions(devices="0,1").cards == (CardSpec(0), CardSpec(1))
    assert ExpertOptions(devices="1").cards == (CardSpec(1),)
    found = ExpertOptions(device="cuda:8GiB", devices="2, 0:1GiB", vram="1GiB, 50%")
    assert found.cards == (CardSpec(2, 8 << 30), CardSpec(0, 1 << 30))
    assert [found.vram_of(0), found.vram_of(1)] == ["1GiB", " 50%"]
    assert ExpertOptions(devices="0,1", vram="2GiB").vram_of(1) == "2GiB"
    assert ExpertOptions(device="cpu").cards == ExpertOptions(device="simulated:1GiB").cards == ()
    assert not ExpertOptions(devices="0,1", gpu_layers=3).moves_experts
    assert ExpertOptions(devices="0,1", vram="1GiB").moves_experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "0,0"}, "--devices: expected each card once, found 0 twice"),
        ({"devices": "0,"}, "--devices: expected cards such as 0,1 or 0:8GiB,1:12GiB"),
        ({"devices": "0,one"}, "--devices: expected cards such as"),
        ({"devices": "8GiB"}, "--devices: expected cards such as"),
        ({"devices": "0:lots"}, "--devices: expected an amount"),
        ({"devices": "0,1", "device": "simulated:1GiB"}, "--devices: expected NVIDIA cards"),
        ({"devices": "0,1", "device": "cuda:1"}, "expected the cards in one of the two"),
        ({"devices": "0,1", "vram": "1GiB,1GiB,1GiB"}, "of all cards, or 2 with commas"),
        ({"devices": "0,1,2", "vram": "1GiB,1GiB"}, "of all cards, or 3 with commas"),
        ({"device": "cuda", "vram": "1GiB,1GiB"}, "--vram: expected one amount"),
    ],
)
def test_several_cards_that_are_none(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExpertOptions(**options)  # type: ignore[arg-type]


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--policy: expected one of static, .*found .*best"):
        ExpertOptions(policy="best")
    with pytest.raises(UsageError, match="--vram: expected a device to hold it, found none"):
        ExpertOptions(vram="1GiB")
    with pytest.raises(UsageError, match="--gpu-layers: expected an NVIDIA card"):
        ExpertOptions(gpu_layers=3)
    for device in ("cpu", "cuda", "cuda:8GiB"):
        assert not ExpertOptions(device=device).moves_experts
    assert not ExpertOptions(device="cuda", gpu_layers=3).moves_experts
    assert ExpertOptions(ram="50%").moves_experts
    assert ExpertOptions(device="cuda", vram="1GiB").moves_experts
    assert ExpertOptions(device="simulated:1GiB").moves_experts
