"""What a server receives in one round, kept for attacks by hand."""

import pytest
import torch

from privfm.checks import RoundFailed
from privfm.defenses import FixedPoint
from privfm.defenses.channels import PairwiseMasks
from privfm.federation import FixedSize, rounds
from privfm.federation.glimpse import glimpse


def test_rows_are_those_of_the_round_and_the_run_goes_on_as_without(federation):
    own = federation(cohort=FixedSize(6))
    seen = glimpse(own)
    assert seen.wire.rows.shape == (6, own.learner.d)
    assert torch.equal(seen.model, own.learner.initial())
    (step,) = rounds(own, 1)
    assert torch.equal(step.state.model, seen.after.model)
    second = glimpse(own, seen.after)
    assert second.after.round == 2
    assert torch.equal(second.model, seen.after.model)


def test_a_secure_sum_shows_its_sum_alone(federation):
    plain = glimpse(federation(cohort=FixedSize(6)))
    masked = glimpse(
        federation(cohort=FixedSize(6), transforms=(FixedPoint(8.0, 20),), channel=PairwiseMasks(clients=6))
    )
    assert masked.wire.rows is None
    (total,) = masked.wire.vectors
    assert torch.allclose(total, plain.wire.rows.sum(0), atol=6 * 8.0 / 2**20)


def test_a_round_that_cannot_finish_is_no_glimpse(federation):
    own = federation(cohort=FixedSize(6), channel=PairwiseMasks(clients=6), transforms=(FixedPoint(1e-9, 20),))
    with pytest.raises(RoundFailed):
        glimpse(own)
