"""Which steps are taken, which are skipped, and when a run ends."""

from __future__ import annotations

import json
import math

import pytest

from npr_megatron.config.training import TrainerConfig
from npr_megatron.train.guard import Guard

LIMITS = TrainerConfig(max_skips_in_row=2, spike_factor=3.0, spike_window=4)


def after(*norms: float, limits: TrainerConfig = LIMITS) -> Guard:
    """Return the guard of a run that has taken steps of these norms."""
    guard = Guard(limits=limits)
    for norm in norms:
        assert guard.fault_of(1.0, norm) == ""
        guard = guard.after_step(norm)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "complaint"),
    [
        (1.0, 0.0, ""),
        (-1e30, 1e30, ""),
        (math.nan, math.nan, "needs a finite loss, its sum is nan"),
        (-math.inf, 1.0, "needs a finite loss, its sum is -inf"),
        (1.0, math.nan, "needs a finite gradient, its norm is nan"),
        (1.0, math.inf, "needs a finite gradient, its norm is inf"),
    ],
)
def test_only_numbers_that_are_finite_are_learnt_from(loss, norm, complaint):
    fault = Guard(limits=TrainerConfig()).fault_of(loss, norm)
    assert complaint in fault and bool(fault) == bool(complaint)


def test_a_spike_is_measured_by_the_median_of_a_full_window():
    assert after(1.0, 1.0, 1.0).fault_of(1.0, 1e9) == "", "the window is not full"
    guard = after(1.0, 2.0, 2.0, 40.0)
    assert guard.fault_of(1.0, 6.0) == ""
    assert "3 times 2, the median of the last 4 steps, and is 6.1" in guard.fault_of(1.0, 6.1)
    assert guard.after_step(6.0).norms == (2.0, 2.0, 40.0, 6.0), "the oldest is forgotten"
    assert guard.after_skip().norms == guard.norms, "what was skipped is no measure"


def test_without_a_factor_nothing_finite_is_a_spike():
    limits = TrainerConfig(spike_window=1)
    assert after(1e-9, limits=limits).fault_of(1.0, 1e30) == ""


def test_a_run_ends_after_so_many_skips_in_a_row_and_a_good_step_forgives():
    guard = after(1.0).after_skip()
    assert not guard.is_at_end
    guard = guard.after_skip()
    assert guard.is_at_end
    assert guard.why_it_ends == ("and the 2 before it were skipped (trainer.max_skips_in_row is 2)")
    assert not guard.after_step(1.0).is_at_end


def test_a_stage_whose_first_step_is_wrong_ends_at_once():
    assert Guard(limits=LIMITS).is_at_end
    assert "no step of this stage was taken yet" in Guard(limits=LIMITS).why_it_ends


def test_nothing_is_skipped_where_no_skip_is_allowed():
    guard = after(1.0, limits=TrainerConfig(max_skips_in_row=0))
    assert guard.is_at_end and "and none is skipped" in guard.why_it_ends


def test_what_is_remembered_survives_a_file_and_a_shorter_window():
    guard = after(0.1, 0.2, 1 / 3, 0.4).after_skip()
    remembered = json.loads(json.dumps(guard.remembered()))
    assert Guard.restored(LIMITS, remembered) == guard
    shorter = Guard.restored(LIMITS.model_copy(update={"spike_window": 2}), remembered)
    assert shorter.norms == (1 / 3, 0.4)
    assert Guard.restored(LIMITS, None) == Guard(limits=LIMITS)
