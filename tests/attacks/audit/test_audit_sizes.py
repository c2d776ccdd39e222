"""Ceilings, numbers of canaries, the Gaussian's epsilon and the halving behind them all."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from privfm.attacks.audit.bisection import largest_rejected
from privfm.attacks.audit.gaussian import gaussian_delta, gaussian_epsilon
from privfm.attacks.audit.guesses import Declared
from privfm.attacks.audit.one_run_fdp import GaussianFamily, one_run_fdp
from privfm.attacks.audit.size import canaries_needed, ceiling
from privfm.checks import InvalidArgument


@pytest.mark.parametrize(("m", "expected"), [(10**2, 3.49), (10**3, 5.81), (10**4, 8.11), (10**5, 10.42)])
def test_ceiling_is_the_closed_form(m, expected):
    # Corrections C: ln(q / (1 - q)), q = .05^(1/m); about ln(m / 3).
    assert ceiling(m) == pytest.approx(expected, abs=0.005)
    assert ceiling(m) == pytest.approx(np.log(m / 3), abs=0.02)
    assert ceiling(m, 0.99) < ceiling(m) and ceiling(m, delta=1e-6) < ceiling(m)


@pytest.mark.parametrize("delta", [0.0, 1e-6])
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 5.8])
def test_needed_at_perfect_guesses_is_where_the_ceiling_passes(epsilon, delta):
    needed = canaries_needed(epsilon, delta=delta)
    assert ceiling(needed, delta=delta) >= epsilon
    assert ceiling(max(1, int(0.98 * needed) - 1), delta=delta) < epsilon


@pytest.mark.parametrize(("epsilon", "mu"), [(2.0, 1.0), (1.0, 0.501551689)])
def test_needed_of_a_gaussian_mechanism_is_where_simulated_runs_start_to_certify(epsilon, mu):
    needed = canaries_needed(epsilon, mechanism_mu=mu, delta=1e-5)

    def certified(m):
        runs = 0
        for seed in range(20):
            generator = np.random.default_rng(seed)
            coins = generator.random(m) < 0.5
            scores = mu * coins + generator.normal(size=m)
            runs += any(
                one_run_fdp(scores, coins, 1e-5, family=GaussianFamily(), guesses=Declared((count,))).epsilon >= epsilon
                for count in (max(1, round(share * m)) for share in (0.02, 0.05, 0.1))
            )
        return runs

    assert certified(needed // 6) < 10 < certified(3 * needed)


def test_more_is_needed_for_more():
    assert canaries_needed(1.0, mechanism_mu=1.0, delta=1e-5) < canaries_needed(3.0, mechanism_mu=1.0, delta=1e-5)
    assert canaries_needed(1.0, confidence=0.8) < canaries_needed(1.0, confidence=0.99)
    assert canaries_needed(2.0, mechanism_mu=1.0, delta=1e-5) > canaries_needed(2.0, delta=1e-5)


def test_the_mechanisms_own_epsilon_is_out_of_reach():
    with pytest.raises(InvalidArgument, match="would not certify"):
        canaries_needed(4.5, mechanism_mu=1.0, delta=1e-5)
    with pytest.raises(InvalidArgument, match="epsilon"):
        canaries_needed(0.0)
    with pytest.raises(InvalidArgument, match="delta"):
        canaries_needed(1.0, mechanism_mu=1.0)


@pytest.mark.parametrize(
    ("mu", "delta", "expected"),
    [(1.0, 1e-5, 4.377178), (2.0, 1e-5, 9.997256), (10**0.5, 1e-3, 14.07935), (10**0.5, 1e-5, 17.85659)],
)
def test_gaussian_epsilon_against_the_accountant(mu, delta, expected):
    # Corrections C: dp_accounting's get_epsilon_gaussian(1 / mu, delta).
    assert gaussian_epsilon(mu, delta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mu", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 0.5, 3.0])
def test_gaussian_delta_is_the_hockey_stick(mu, epsilon):
    # delta = integral of max(0, p_in - e^eps p_out).
    def excess(y):
        return max(0.0, norm.pdf(y - mu) - np.exp(epsilon) * norm.pdf(y))

    middle = mu / 2 + epsilon / mu
    low, high = max(middle, -40.0), mu + 40.0
    expected = quad(excess, low, high, points=[mu, 0.0], limit=500)[0] if low < high else 0.0
    assert gaussian_delta(mu, epsilon) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_gaussian_epsilon_at_its_ends():
    assert gaussian_epsilon(0.0, 1e-5) == 0.0 and gaussian_epsilon(float("inf"), 1e-5) == float("inf")
    assert gaussian_epsilon(1e-7, 1e-5) == 0.0  # delta alone covers it
    assert gaussian_delta(0.0, 0.3) == 0.0
    assert gaussian_epsilon(60.0, 1e-5) == pytest.approx(1800 + 60 * 4.2649, rel=1e-3)  # mu^2/2 + mu Phi^-1(1 - delta)
    for mu, delta in ((1.0, 0.0), (1.0, 1.0), (-1.0, 1e-5)):
        with pytest.raises(InvalidArgument):
            gaussian_epsilon(mu, delta)


def test_halving_never_rounds_upwards():
    for edge in (0.0, 1e-3, 0.7, 123.456):
        found = largest_rejected(lambda x, edge=edge: x <= edge)
        assert found <= edge and found == pytest.approx(edge, rel=2e-6, abs=2e-6)
    assert largest_rejected(lambda x: False) == 0.0
    assert largest_rejected(lambda x: True, 5.0) == 5.0
    with pytest.raises(InvalidArgument, match="rejects everything"):
        largest_rejected(lambda x: True)
