from itertools import combinations
from math import inf, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from privfm.checks import InvalidArgument, TooFewClients
from privfm.defenses.channels.masks import graph as mask_graph
from privfm.defenses.channels.masks.graph import (
    active,
    complete,
    least_threshold,
    log2_failure,
    log2_privacy,
    ring,
    smallest,
)

THIRD = 1 / 3

# n, corrupt, drop-outs -> k, t: hypergeometric bounds worked out apart from this package, 2^-40 and 2^-20 each
KNOWN = [
    (100, 0.1, 0.05, 16, 11),
    (100, 0.2, 0.05, 24, 19),
    (100, THIRD, 0.1, 42, 32),
    (200, 0.1, 0.05, 26, 17),
    (200, 0.2, 0.05, 37, 27),
    (200, THIRD, 0.1, 64, 46),
    (1000, 0.1, 0.05, 36, 23),
    (1000, 0.2, 0.05, 52, 37),
    (1000, THIRD, 0.1, 102, 72),
]


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "k", "t"), KNOWN)
def test_known_numbers(n, corrupt, dropouts, k, t):
    assert least_threshold(n, k, corrupt, dropouts) == t
    assert all(least_threshold(n, fewer, corrupt, dropouts) is None for fewer in range(k - 6, k))


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "k", "t"), KNOWN)
def test_a_ring_takes_the_next_even_number(n, corrupt, dropouts, k, t):
    graph = smallest(n, corrupt, dropouts)
    assert (graph.neighbours, graph.threshold) == (k + k % 2, t)
    assert graph.meets_bounds and not graph.complete
    assert graph.log2_privacy <= -40 and graph.log2_failure <= -20


@pytest.mark.parametrize(("n", "k", "t"), [(100, 10, 6), (200, 38, 27), (1000, 52, 30), (60, 8, 5)])
def test_the_probabilities_beside_scipy(n, k, t):
    corrupt, dropouts = n // 5, n // 20
    opened = n * hypergeom.sf(t - 1, n - 1, corrupt, k)
    parted = n * (n - 1) / 2 * hypergeom.pmf(k, n, corrupt + dropouts, k)
    lost = n * hypergeom.cdf(t - 1, n - 1, n - dropouts - 1, k)
    assert log2_privacy(n, k, t, 0.2, 0.05) == pytest.approx(log2(opened + parted), abs=1e-6)
    if lost > 0:
        assert log2_failure(n, k, t, 0.05) == pytest.approx(log2(lost), abs=1e-6)
    else:
        assert log2_failure(n, k, t, 0.05) == -inf


def test_ten_neighbours_of_a_hundred_are_no_defense():
    """With 20 of 100 corrupt some client has six or more corrupt neighbours with probability up to 0.416."""
    graph = mask_graph.given(100, 10, 0.2, 0.05)
    assert (graph.neighbours, graph.threshold) == (10, 6)
    assert 2**graph.log2_privacy == pytest.approx(0.4158, abs=1e-3)
    assert not graph.meets_bounds
    assert "NOT within" in graph.statement and "2^-1.3" in graph.statement


def test_a_given_number_that_is_enough_keeps_the_bounds():
    graph = mask_graph.given(100, 40, 0.2, 0.05)
    assert graph.neighbours == 40 and graph.meets_bounds and "NOT" not in graph.statement


@given(st.integers(6, 9), st.data())
def test_bounds_hold_on_every_small_ring(n, data):
    """Against all sets of corrupt and missing clients: a fixed ring and random sets are as a random ring and fixed."""
    k = data.draw(st.sampled_from([2, 4]))
    t = data.draw(st.integers(1, k))
    bad, gone = data.draw(st.integers(0, n // 2)), data.draw(st.integers(0, 2))
    around = ring(n, k, b"a seed")
    opened = parted = lost = 0
    sets = list(combinations(range(n), bad))
    for corrupt in sets:
        opened += any(sum(other in corrupt for other in around[own]) >= t for own in range(n))
    away = list(combinations(range(n), min(n, bad + gone)))
    for removed in away:
        parted += components(around, set(range(n)) - set(removed)) > 1
    missing = list(combinations(range(n), gone))
    for removed in missing:
        lost += any(sum(o not in removed for o in around[own]) < t for own in range(n) if own not in removed)
    private = 2 ** log2_privacy(n, k, t, bad / n, gone / n)
    assert opened / len(sets) + parted / len(away) <= private + 1e-9
    assert lost / len(missing) <= 2 ** log2_failure(n, k, t, gone / n) + 1e-9


def components(around, left):
    count, left = 0, set(left)
    while left:
        count, reached = count + 1, {left.pop()}
        while reached:
            own = reached.pop()
            near = set(around[own]) & left
            left -= near
            reached |= near
    return count


# The complete graph


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 33, 49])
@pytest.mark.parametrize(("corrupt", "dropouts"), [(0.0, 0.0), (0.1, 0.05), (0.2, 0.3), (THIRD, 0.1), (0.5, 0.4)])
def test_under_fifty_everybody_is_a_neighbour(n, corrupt, dropouts):
    graph = smallest(n, corrupt, dropouts)
    bad, gone = int(n * corrupt + 1e-9), int(n * dropouts + 1e-9)
    assert graph.complete and graph.neighbours == n - 1 and graph.meets_bounds
    assert bad < graph.threshold <= n - gone
    if (n + bad) // 2 + 1 <= n - gone:
        assert 2 * graph.threshold > n + bad  # honest clients answer for one secret, corrupt ones for both


def test_what_no_graph_can_do():
    with pytest.raises(InvalidArgument, match="of 10 clients 4 answer, of whom 5"):
        complete(10, 0.5, 0.6)
    with pytest.raises(InvalidArgument, match=r"corrupt=0\.7"):
        smallest(100, 0.7, 0.3)


def test_many_that_need_everybody():
    """36 of 60 corrupt and 23 missing: whoever has two others or more left out may have lost all honest ones."""
    graph = smallest(60, 0.6, 0.39)
    assert (graph.complete, graph.threshold, graph.meets_bounds) == (True, 37, True)


# Active


@pytest.mark.parametrize("n", range(2, 60))
def test_active_two_stories_need_more_than_there_are(n):
    corrupt = (n - 1) // 3
    graph = active(n, corrupt, 0.0)
    assert graph.complete
    assert 2 * graph.threshold > (n - corrupt) + 2 * corrupt
    assert graph.threshold - corrupt > corrupt


def test_active_refuses_a_third():
    with pytest.raises(TooFewClients, match="3 may be corrupt: against an active server expected more than 9"):
        active(9, 3, 0.0)
    with pytest.raises(InvalidArgument, match="of 10 clients 6 stay, but 7 must agree"):
        active(10, 3, 0.4)


# The ring


@given(st.integers(3, 60), st.data())
def test_a_ring_is_regular_and_mutual(n, data):
    k = data.draw(st.sampled_from([k for k in range(2, n) if k % 2 == 0] + [n - 1]))
    around = ring(n, k, data.draw(st.binary(min_size=1, max_size=32)))
    assert all(len(set(others)) == k and others == sorted(others) for others in around)
    assert all(own not in others for own, others in enumerate(around))
    assert all(own in around[other] for own, others in enumerate(around) for other in others)


def test_a_ring_is_one_circle():
    around = ring(30, 2, b"seed")
    assert components(around, range(30)) == 1


def test_the_seed_decides():
    assert ring(40, 4, b"a") == ring(40, 4, b"a") != ring(40, 4, b"b")


def test_every_pair_is_as_likely(untouched_random_state):
    """10 clients with 2 neighbours, 9000 rings: each of 45 pairs 2000 times, deviation 39 at most; 6 of them."""
    counts = np.zeros((10, 10), int)
    for seed in range(9000):
        for own, others in enumerate(ring(10, 2, seed.to_bytes(4, "big"))):
            counts[own, others] += 1
    pairs = counts[np.triu_indices(10, 1)]
    assert abs(pairs - 2000).max() < 240
    assert pairs.sum() == 90_000


def test_bad_arguments():
    for call in (
        lambda: smallest(1, 0.1, 0.1),
        lambda: smallest(10, -0.1, 0.1),
        lambda: smallest(10, 0.1, 1.0),
        lambda: mask_graph.given(10, 3, 0.1, 0.1),
        lambda: mask_graph.given(10, 0, 0.1, 0.1),
        lambda: ring(10, 5, b""),
        lambda: ring(4, 6, b""),
        lambda: ring(1, 0, b""),
        lambda: active(1, 0, 0.0),
    ):
        with pytest.raises(InvalidArgument):
            call()
