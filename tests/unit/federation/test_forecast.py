"""The time that the remaining rounds will take."""

import pytest

from pfm_llm.federation.forecast import Forecast


def actual_and_forecast(
    num_rounds: int, num_clients: int, size: int, first: int = 1
) -> list[tuple[float, float]]:
    """A round takes 1 s, and the trunk takes 2 s for each client of the first pass."""
    new = [min(size, max(0, num_clients - r * size)) for r in range(first - 1, num_rounds)]
    forecast = Forecast(first, num_rounds, num_clients, size)
    found = []
    for place, count in enumerate(new):
        left = forecast.add(1.0 + 2.0 * count, 2.0 * count)
        found.append((sum(1.0 + 2.0 * c for c in new[place + 1 :]), left))
    return found


@pytest.mark.parametrize(
    ("num_rounds", "num_clients", "size", "first"),
    [(30, 64, 8, 1), (30, 60, 8, 1), (5, 64, 8, 1), (30, 64, 8, 5), (30, 64, 8, 20), (1, 8, 8, 1)],
)
def test_the_forecast_is_right_from_the_first_round_on(
    num_rounds: int, num_clients: int, size: int, first: int
) -> None:
    for actual, left in actual_and_forecast(num_rounds, num_clients, size, first):
        assert left == pytest.approx(actual)


def test_states_that_were_cached_before_cost_nothing() -> None:
    forecast = Forecast(1, 100, 64, 8)
    assert forecast.add(1.5) == pytest.approx(99 * 1.5)


def test_a_trunk_that_is_never_cached_is_a_steady_cost() -> None:
    forecast = Forecast(1, 4, 8, 8)
    forecast.add(3.0, 2.0)
    forecast.add(3.0, 2.0)
    assert forecast.add(3.0, 2.0) == pytest.approx((1.0 + 3.0 + 3.0) / 3)
