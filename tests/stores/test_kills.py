"""A slice of the campaign of kills in a store; all of it runs by launch/benchmark.py store_kills."""

import pytest

from campaigns import kills
from campaigns.store_kills import StoreRun


@pytest.mark.whole
def test_nothing_is_lost(tmp_path):
    outcomes = list(kills.campaign(tmp_path, kills=2, terms=1, seed=0, kind=StoreRun))
    assert [outcome.problem for outcome in outcomes] == [""] * 4
    assert {outcome.signal: outcome.status for outcome in outcomes} == {"SIGKILL": -9, "SIGTERM": 75, "nothing": 0}
