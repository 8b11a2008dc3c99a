"The arithmetic of the benchmark table, with a clock that the test sets: nothing here measures time."

import numpy as np
import pandas as pd
import pytest
import torch

from spectral_nb.dev import timing


class Clock:
    "A clock that moves only when it is told to."

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, *durations: float):
        "A call that takes each of the durations in turn, then the last one for ever."
        left = list(durations)

        def taken(*_):
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return taken


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_seconds_are_what_the_clock_moved(clock):
    assert timing.seconds(clock.call(0.25)) == 0.25
    assert timing.seconds(lambda x: x, 3) == 0


def test_compare_leaves_out_the_first_call_and_scales_the_peer(clock):
    ours, peer = clock.call(50.0, 1.0, 2.0, 4.0), clock.call(70.0, 3.0, 3.0, 8.0)
    (row,) = timing.compare("x", ours, peer, 3, scale=2, threads=(1,))
    assert (row["ours"], row["peer"], row["n_repeats"], row["threads"]) == (2.0, 6.0, 3, 1)
    assert (row["ratio_low"], row["ratio"], row["ratio_high"]) == (3.0, 4.0, 6.0)  # fake clock: of 6/1, 6/2, 16/4


def test_both_sides_are_timed_in_turns(clock):
    order = []
    tick = clock.call(1.0)
    timing.compare(
        "x", lambda: (order.append("ours"), tick()), lambda: (order.append("peer"), tick()), 2, threads=(1, 2)
    )
    assert order == ["ours", "peer"] * 6


def test_threads_are_those_of_every_library_and_are_put_back():
    from threadpoolctl import threadpool_info

    before = torch.get_num_threads(), [p["num_threads"] for p in threadpool_info()]
    with timing.on_threads(1):
        assert torch.get_num_threads() == 1
        assert {p["num_threads"] for p in threadpool_info()} == {1}
    assert (torch.get_num_threads(), [p["num_threads"] for p in threadpool_info()]) == before


def test_ratio_row_is_over_repeats_not_over_medians():
    row = timing.ratio_row("x", [1, 2, 4], [2, 8, 4], unit="MiB")
    assert (row["ours"], row["peer"], row["ratio"]) == (2, 4, 2)  # fake clock: ratios 2, 4, 1
    with pytest.raises(ValueError, match="ours and peer need equally many values"):
        timing.ratio_row("x", [1], [1, 2])
    with pytest.raises(ValueError, match="n_repeats"):
        timing.compare("x", lambda: None, lambda: None, 0)


def test_scaling_rows_have_the_median_and_the_extremes(clock):
    call = clock.call(9.0, 1.0, 5.0, 2.0)
    table = timing.scaling_rows("x", lambda m, b: call(), n_layers=1, sizes=dict(prompts=(2,)))
    assert table.iloc[0].drop("section").to_dict() == dict(what="prompts", size=2, seconds=2.0, low=1.0, high=5.0)
    with pytest.raises(ValueError, match="width 128 is no multiple of 3 heads"):
        timing.scaling_rows("x", lambda m, b: None, sizes=dict(heads=(3,)))


def test_exponents():
    sizes = np.array([1, 2, 4, 8])
    for power in (0, 1, 2):
        assert timing.fit_exponent(sizes, 3.0 * sizes**power) == pytest.approx(power)
    with pytest.raises(ValueError, match="at least 2"):
        timing.fit_exponent([1], [1])


def test_predictions_follow_the_exponents_and_the_arithmetic_of_a_pass():
    from spectral_nb.dev import predicted as p

    rows = [
        dict(section=section, what=what, size=middle * f, seconds=2.0 * f**power)
        for section in p.CHANGES
        for what, middle, power in zip(timing.MIDDLE, timing.MIDDLE.values(), (1, 0, 2, 1))
        for f in (1, 2, 4)
    ]
    scaling, assumed, shape = pd.DataFrame(rows), p.Assumed(), p.Shape(1e9, 8, 1280, 16)
    assert list(timing.MIDDLE) == ["prompts", "heads", "width", "context"]
    grown = (256 / 64) * (1280 / 128) ** 2 * (64 / 32) * (8 / 4)  # heads have exponent 0
    assert p.core_seconds(scaling, "14 survey", shape, assumed) == pytest.approx(2.0 * grown)
    assert p.floor_seconds(shape, assumed) == pytest.approx(2e9 * 256 * 64 / assumed.card_flops)
    table = p.predicted(scaling).set_index(["section", "model"])
    seventy = table.loc["12 tracing", "70B"]
    assert not seventy["fits one card"] and np.isnan(seventy["s on one card"]) and seventy["cards a copy"] >= 4
    assert table.loc["13 fingerprint", "1B"].GB > 4 * 1.24
    one = table.loc["14 survey", "7B"]
    assert one["s on one card"] / one["s on 64 cards"] == pytest.approx(64 * 0.8)
    with pytest.raises(ValueError, match="is not in the scaling"):
        p.exponents(scaling, "16 none")
