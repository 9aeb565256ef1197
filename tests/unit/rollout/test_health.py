"""The replica state machine against a table written by hand, and its promises under any history."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.rollout.health import Event, Health, ReplicaState, Stamp, judge_silence
from tests.structures import QUICK

LEGAL = {
    Health.STARTING: {Event.STARTED: Health.CATCHING_UP, Event.DIED: Health.DEAD},
    Health.CATCHING_UP: {
        Event.CAUGHT_UP: Health.HEALTHY,
        Event.FENCED: Health.FENCED,
        Event.DIED: Health.DEAD,
    },
    Health.HEALTHY: {
        Event.CAUGHT_UP: Health.HEALTHY,
        Event.OUTDATED: Health.CATCHING_UP,
        Event.FENCED: Health.FENCED,
        Event.PROGRESSED: Health.HEALTHY,
        Event.SILENT: Health.SUSPECT,
        Event.DIED: Health.DEAD,
    },
    Health.SUSPECT: {
        Event.CAUGHT_UP: Health.HEALTHY,
        Event.OUTDATED: Health.CATCHING_UP,
        Event.FENCED: Health.FENCED,
        Event.PROGRESSED: Health.HEALTHY,
        Event.SILENT: Health.SUSPECT,
        Event.DIED: Health.DEAD,
    },
    Health.FENCED: {Event.ANSWERED: Health.CATCHING_UP, Event.DIED: Health.DEAD},
    Health.DEAD: {},
}


def stamp(version: int) -> Stamp:
    return Stamp(version, digest=100 + version)


def happen(state: ReplicaState, event: Event, version: int) -> ReplicaState:
    return state.after(event, serving=stamp(version) if event is Event.CAUGHT_UP else None)


@pytest.mark.parametrize(("health", "event"), list(itertools.product(Health, Event)))
def test_every_pair_of_health_and_event_goes_where_the_table_says_or_is_refused(health, event):
    state = ReplicaState(health, stamp(4))
    expected = LEGAL[health].get(event)
    if expected is None:
        with pytest.raises(ValueError, match=f"{health}.*{event}"):
            happen(state, event, 5)
    else:
        after = happen(state, event, 5)
        assert after == ReplicaState(expected, stamp(5 if event is Event.CAUGHT_UP else 4))


@QUICK
@given(st.lists(st.tuples(st.sampled_from(Event), st.integers(0, 3)), max_size=30))
def test_no_history_makes_a_replica_routable_with_weights_it_did_not_commit(history):
    state, committed, has_died = ReplicaState(), -1, False
    for event, version in history:
        try:
            state = happen(state, event, version)
        except ValueError:
            continue
        if event is Event.CAUGHT_UP:
            committed = version
        has_died |= event is Event.DIED
        for fleet_version in range(-1, 4):
            if state.is_routable(stamp(fleet_version)):
                assert committed == fleet_version >= 0
                assert not has_died


def test_a_stamp_is_refused_with_any_event_but_catching_up():
    with pytest.raises(ValueError, match="CAUGHT_UP"):
        ReplicaState(Health.HEALTHY, stamp(1)).after(Event.PROGRESSED, serving=stamp(2))
    with pytest.raises(ValueError, match="CAUGHT_UP"):
        ReplicaState(Health.CATCHING_UP).after(Event.CAUGHT_UP)


@pytest.mark.parametrize(
    ("silent_s", "verdict"),
    [(0.0, None), (24.9, None), (25.0, Event.SILENT), (99.9, Event.SILENT), (100.0, Event.DIED)],
)
def test_silence_is_suspect_after_a_quarter_of_the_deadline_and_fatal_after_all(silent_s, verdict):
    assert judge_silence(silent_s, 100.0) is verdict
