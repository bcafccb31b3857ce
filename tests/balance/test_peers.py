"""Speeds and limits of ranks by number, host and device."""

import pytest

from cca_ds.balance.partition import BalanceError
from cca_ds.balance.peers import (
    Peer,
    average_equal_ranks,
    chosen_mode,
    cost_of_even,
    describe_speeds,
    given_caps,
    given_seconds,
    look_up,
)
from cca_ds.config.recipes import ConfigError, load_recipe
from cca_ds.config.schema import Balance

H100, A100, A40 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA A40"
PEERS = [Peer(0, "n1.cluster", H100), Peer(1, "n2.cluster", A100), Peer(2, "n3.cluster", A40), Peer(3, "cpu4", "cpu")]


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
    run = load_recipe("digits", ["balance.speeds={0: 3, cpu: 1}", "balance.mode=given"])
    assert run.balance.speeds == {"0": 3.0, "cpu": 1.0}
    for wrong in ("balance.speeds={0: 0}", "balance.micro_sizes={0: -1}",
                  "balance.remeasure_every=5"):  # fmt: skip
        with pytest.raises(ConfigError, match="balance"):
            load_recipe("digits", [wrong])


def test_noise_between_equal_ranks_is_averaged_and_a_true_difference_kept():
    assert average_equal_ranks([1.00, 1.02, 1.04, 3.0, 2.9]) == pytest.approx([1.02, 1.02, 1.02, 2.95, 2.95])
    assert average_equal_ranks([1.0, 1.06]) == [1.0, 1.06]


def test_speeds_are_listed_by_rank_and_host():
    peers = [Peer(0, "a", H100), Peer(1, "a", H100), Peer(2, "b", A40)]
    assert describe_speeds(peers, [0.001, 0.0011, 0.004]) == (
        "ranks 0-1 on a (NVIDIA H100 80GB HBM3) 1, 1.1 ms a pair; rank 2 on b (NVIDIA A40) 4 ms a pair"
    )


def of_devices(*devices):
    return [Peer(rank, "node", device) for rank, device in enumerate(devices)]


def test_where_devices_differ_they_are_measured():
    for devices, mode in (((H100, H100), "even"), ((H100, A40), "measured"), (("cpu", "cpu"), "even")):
        assert chosen_mode(Balance(), of_devices(*devices)) == mode
    assert chosen_mode(Balance(mode="even"), of_devices(H100, A40)) == "even"


def test_even_shares_on_unequal_devices_say_what_they_cost():
    assert cost_of_even(of_devices(H100, H100)) is None
    # 989 and 150 TFLOP/s: of 1139, twice 150 are used
    assert "on NVIDIA H100 80GB HBM3 and NVIDIA A40: all ranks wait for the slowest, about 74% of" in cost_of_even(
        of_devices(H100, A40)
    )
    assert "all ranks wait for the slowest; balance.mode=measured" in cost_of_even(of_devices(H100, "Some GPU"))
