"""Speeds and caps by rank, host and device; what a pair costs, measured; ranks slowed on purpose."""

import math

import pytest
import torch

from cca_ds.balance import measure
from cca_ds.balance.partition import BalanceError, cut
from cca_ds.balance.peers import Peer, describe_speeds, given_caps, given_seconds, look_up, settle
from cca_ds.balance.slowdown import Slowdown
from cca_ds.config.recipes import ConfigError, load_recipe
from cca_ds.config.schema import Balance

H100, A100, A40 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA A40"
PEERS = [
    Peer(0, "n1.cluster", H100),
    Peer(1, "n2.cluster", A100),
    Peer(2, "n3.cluster", A40),
    Peer(3, "cpu4", "cpu"),
]


def test_a_rank_is_found_by_number_then_host_then_device():
    table = {"2": "rank", "n2": "host", "a100": "device", "H100": "word", "cpu": "cpu"}
    assert [look_up(table, peer) for peer in PEERS] == ["word", "host", "rank", "cpu"]
    assert look_up({"NVIDIA": 1, "NVIDIA A40": 2}, PEERS[2]) == 2
    assert look_up({"n1.cluster": 1}, PEERS[0]) == 1


@pytest.mark.parametrize("key", ["A10", "H10", "80", "NVIDIA H100 40GB", "1"])
def test_what_is_only_part_of_a_word_or_a_number_of_another_rank_does_not_fit(key):
    assert look_up({key: 1.0}, PEERS[0]) is None


def test_given_speeds_are_pairs_a_second():
    assert given_seconds({"H100": 4.0, "A100": 2.0, "2": 0.5, "cpu": 1.0}, PEERS) == [0.25, 0.5, 2.0, 1.0]


def test_a_rank_without_a_speed_is_named_with_host_and_device():
    with pytest.raises(BalanceError) as caught:
        given_seconds({"H100": 4.0, "A100": 2.0}, PEERS)
    text = str(caught.value)
    assert "rank 2 on n3.cluster (NVIDIA A40)" in text and "H100, A100" in text and "\n" not in text


def test_caps_fall_back_to_the_micro_size():
    assert given_caps(Balance(micro_sizes={"A100": 4, 3: 0}), 8, PEERS) == [8, 4, 8, 0]


def test_the_recipe_takes_numbers_as_keys_and_refuses_bad_values():
    run = load_recipe(
        "digits", ["balance.speeds={0: 3, cpu: 1}", "balance.mode=given", "balance.slowdown.1=3"]
    )
    assert run.balance.speeds == {"0": 3.0, "cpu": 1.0} and run.balance.slowdown == {"1": 3.0}
    for wrong in ("balance.speeds={0: 0}", "balance.micro_sizes={0: -1}", "balance.slowdown={0: 0.5}",
                  "balance.remeasure_every=5"):  # fmt: skip
        with pytest.raises(ConfigError, match="balance"):
            load_recipe("digits", [wrong])


def test_noise_between_equal_ranks_is_settled_and_a_true_difference_kept():
    assert settle([1.00, 1.02, 1.04, 3.0, 2.9]) == pytest.approx([1.02, 1.02, 1.02, 2.95, 2.95])
    assert settle([1.0, 1.06]) == [1.0, 1.06]


def test_speeds_are_told_by_rank_and_host():
    peers = [Peer(0, "a", H100), Peer(1, "a", H100), Peer(2, "b", A40)]
    assert describe_speeds(peers, [0.001, 0.0011, 0.004]) == (
        "ranks 0-1 on a (NVIDIA H100 80GB HBM3) 1, 1.1 ms a pair; rank 2 on b (NVIDIA A40) 4 ms a pair"
    )


def test_a_cut_at_a_fixed_number_of_forwards():
    assert cut(16, [1.0, 3.0], [4, 4]).forwards == 3
    fixed = cut(16, [1.0, 3.0], [4, 4], forwards=4)
    assert fixed.forwards == 4 and fixed.pairs == (12, 4)
    assert cut(16, [1.0, 3.0], [4, 4], forwards=2).pairs == (8, 8)  # the caps leave no choice
    with pytest.raises(BalanceError, match="do not fit in 1 forwards"):
        cut(16, [1.0, 3.0], [4, 4], forwards=1)


def test_a_slowed_rank_sleeps_in_proportion_to_its_pairs():
    naps = []
    module = torch.nn.Linear(2, 1)
    Slowdown(3.0, pair_seconds=0.5, rows_per_pair=2, sleep=naps.append).attach(module)
    module(torch.zeros(8, 2))
    module(torch.zeros(2, 2))
    with torch.no_grad():
        module(torch.zeros(8, 2))
    assert naps == [2.0 * 0.5 * 4, 2.0 * 0.5]


def tiny_run(*overrides):
    return load_recipe("digits", ["model.weights=null", "model.overrides={dim: 32, n_layer: 9}", *overrides])


def test_a_deep_model_is_measured_by_four_blocks_and_one(device, monkeypatch):
    measured = measure.Probe(tiny_run(), device, "fp32", None)
    seen = []

    def cost(step, sizes, repeats):
        seen.append((len(measured.module.layers), sizes))
        return 2.0 + 3.0 * len(measured.module.layers)

    monkeypatch.setattr(measure, "measure_speed", cost)
    assert measured.seconds_per_pair(5) == pytest.approx(2.0 + 3.0 * 9)
    assert seen == [(4, [5]), (1, [5])] and len(measured.module.layers) == 4
    monkeypatch.setattr(measure, "measure_speed", lambda step, sizes, repeats: 4.0)
    assert measured.seconds_per_pair(5) == pytest.approx(4.0 * 9 / 4)  # blocks lost in noise


def test_measuring_is_real_slowed_alike_and_leaves_the_random_state(device):
    naps = []
    slowdown = Slowdown(2.0, pair_seconds=1.0, rows_per_pair=2, sleep=naps.append)
    before = torch.get_rng_state()
    run = tiny_run("model.overrides.n_layer=2", "model.dropout=true")
    seconds = measure.Probe(run, device, "fp32", None, slowdown).seconds_per_pair(3)
    assert 0 < seconds < math.inf
    assert naps == [3.0] * 4  # one pass to warm up, three timed
    assert torch.equal(before, torch.get_rng_state())


def test_memory_too_short_for_the_micro_batch_times_fewer_pairs(device, monkeypatch):
    measured = measure.Probe(tiny_run("model.overrides.n_layer=1"), device, "fp32", None)
    tried = []

    def cost(step, sizes, repeats):
        tried.append(sizes[0])
        if sizes[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(measure, "measure_speed", cost)
    assert measured.seconds_per_pair(9) == 1.0 and tried == [9, 4, 2]


def test_a_short_var_keeps_its_width():
    run = load_recipe("var-d30", ["model.weights=null"])
    with torch.device("meta"):
        module = measure.build_module(measure._shortened(run))
    assert len(module.blocks) == 4 and module.config.dim == 1920 and module.config.n_head == 30


def test_state_bytes_by_hand():
    """P = 1000 in bf16 on 4 ranks: 2 of weights, 4 of gradients, 12 of the optimizer; gathered weights at stage 3."""
    config = lambda stage, **zero: {"zero_optimization": {"stage": stage, **zero}}  # noqa: E731
    assert measure.state_bytes(1000, config(0), 4, 2) == 18000
    assert measure.state_bytes(1000, config(1), 4, 2) == 2000 + 4000 + 3000
    assert measure.state_bytes(1000, config(2), 4, 2) == 2000 + 1000 + 3000
    assert measure.state_bytes(1000, config(3), 4, 2) == 500 + 1000 + 3000 + 2000
    offloaded = config(3, offload_optimizer={"device": "cpu"}, stage3_max_live_parameters=10)
    assert measure.state_bytes(1000, offloaded, 4, 2) == 500 + 1000 + 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bytes_per_pair_hold_for_a_larger_pass():
    run = tiny_run("model.overrides={dim: 256, n_layer: 4}")
    measured = measure.Probe(run, "cuda:0", "bf16", None)
    each = measured.bytes_per_pair(16)
    predicted = measured._peak(16) + 48 * each
    assert measured._peak(64) == pytest.approx(predicted, rel=0.2)
    ds = {"zero_optimization": {"stage": 3}}
    assert measure.micro_that_fits(run, ds, 1, "bf16", measured, 16) == 16
