"""Claims of the static laws: what a fit recovers and what it cannot; the solver finds the optimum;
what a run has shown foretells its end, and aioli and horizon go by that.
"""
import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import aioli
from aioli import (Forecast, LogLinear, Power, cover, fit_forecast, fit_linear_dynamic,
                   fit_log_linear, fit_power_law, lmo_step, solve_static)
from worlds import (Static, differ, drive, history, kl, matrices, rng_of, same, seeds, sizes,
                    softmax, swapped)

torch.set_num_threads(1)                    # on a busy machine two threads take 30 times as long
ms = st.integers(2, 6)
objectives = st.sampled_from(["loss", "perplexity"])
floors = st.sampled_from([0., .02])


def a_law(seed, m, n=None):
    """A log-linear law in which most groups help most losses, own groups more."""
    rng, n = rng_of(seed), n or m
    t = rng.uniform(-1, .4, (n, m)) - np.eye(n, m)
    return LogLinear(rng.uniform(.5, 2, n), t)


def a_power_law(seed, m, n=None):
    rng, n = rng_of(seed), n or m
    a = rng.uniform(.05, .4, (n, m)) + np.eye(n, m)
    return Power(rng.uniform(1, 2, n), rng.uniform(.2, .6, n), a, rng.uniform(.3, .9, (n, m)))


def a_forecast(seed, m):
    rng = rng_of(seed)
    return Forecast(rng.uniform(1, 2, m), rng.uniform(.2, 1, m), rng.uniform(0, 1, m),
                    rng.uniform(.2, .8) * rng.dirichlet(np.ones(m)))


class Straight(NamedTuple):
    """The linear law as a static one: L = c - A p."""
    c: np.ndarray
    A: np.ndarray

    def __call__(self, P):
        return self.c - P @ self.A.T

    def gradient(self, p):
        return -self.A

    @property
    def m(self):
        return self.A.shape[1]


class Signed(NamedTuple):
    """The log-linear law with a factor k of either sign, as an unconstrained fit may return."""
    c: np.ndarray
    k: np.ndarray
    t: np.ndarray

    def __call__(self, P):
        return self.c + self.k * np.exp(P @ self.t.T)

    def gradient(self, p):
        return self.t * (self(p) - self.c)[:, None]

    @property
    def m(self):
        return self.t.shape[1]


def lattice(m, n):
    """All mixtures in steps of 1 / n."""
    axes = [np.arange(n + 1)] * (m - 1)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, m - 1)
    points = points[points.sum(1) <= n]
    return np.column_stack((points, n - points.sum(1))) / n


# ---- the laws ----


@given(ms, seeds)
def test_a_law_is_its_formula_on_any_array_of_mixtures(m, seed):
    P = rng_of(seed).dirichlet(np.ones(m), (2, 3))
    exponential, power = a_law(seed, m, 3), a_power_law(seed, m, 3)

    def exponential_at(i, p):
        return exponential.c[i] + math.exp(sum(exponential.t[i] * p))

    def power_at(i, p):
        return power.c[i] + 1 / (power.eps[i] + sum(power.a[i] * p ** power.g[i]))
    for law, formula in ((exponential, exponential_at), (power, power_at)):
        for index in np.ndindex(2, 3):
            same(law(P)[index], [formula(i, P[index]) for i in range(3)])


@given(ms, seeds, st.sampled_from([a_law, a_power_law, a_forecast]))
def test_a_laws_gradient_is_its_slope(m, seed, make):
    law, rng = make(seed, m), rng_of(seed)
    p, step = .9 * rng.dirichlet(np.ones(m)) + .1 / m, 1e-6
    slope = [(law(p + step * e) - law(p - step * e)) / (2 * step) for e in np.eye(m)]
    same(law.gradient(p), np.transpose(slope), rtol=1e-6, atol=1e-7)


@given(ms, seeds, st.floats(-3, 3))
def test_a_factor_k_is_the_same_number_added_to_a_row_of_t(m, seed, shift):
    """So k can be left out, and t and k are not identifiable, though predictions are."""
    law, P = a_law(seed, m), rng_of(seed).dirichlet(np.ones(m), 5)
    same(Signed(law.c, np.full(m, np.exp(-shift)), law.t + shift)(P), law(P))
    same(LogLinear(law.c, law.t + shift)(P) - law.c, np.exp(shift) * (law(P) - law.c))


@given(ms, seeds, st.sampled_from([a_law, a_power_law, a_forecast]))
def test_a_law_is_convex(m, seed, make):
    """As k > 0; for the power law, as its exponents are below 1."""
    law, rng = make(seed, m), rng_of(seed)
    p, q = rng.dirichlet(np.ones(m), 2)
    for share in (.1, .5, .8):
        between = law(share * p + (1 - share) * q)
        assert np.all(between <= share * law(p) + (1 - share) * law(q) + 1e-12)


@given(st.integers(3, 6), seeds)
def test_groups_in_fixed_proportions_are_one_group_of_the_same_law(m, seed):
    """Its column of t is the mean in these proportions; so for A in the linear law."""
    law, rng = a_law(seed, m), rng_of(seed)
    k = rng.integers(2, m)                                          # the last k groups are frozen
    inside = rng.dirichlet(np.ones(k))

    def collapsed(t):
        return np.column_stack((t[:, :m - k], t[:, m - k:] @ inside))
    q = rng.dirichlet(np.ones(m - k + 1))
    p = np.concatenate((q[:-1], q[-1] * inside))
    same(LogLinear(law.c, collapsed(law.t))(q), law(p))
    same(Straight(law.c, collapsed(law.t))(q), Straight(law.c, law.t)(p))


# ---- the solver ----


@st.composite
def capped_mixtures(draw):
    """(p, caps): some groups without a share, caps that add up to 1 at least, often just so."""
    m, rng = draw(sizes), rng_of(draw(seeds))
    p = rng.dirichlet(np.full(m, .5)) * (rng.permutation(m) < draw(st.integers(1, m)))
    p /= p.sum()
    least = rng.dirichlet(np.full((p > 0).sum(), .5))               # a mixture under the caps
    caps = rng.uniform(0, 1, m)
    more = draw(st.sampled_from([0, 1e-13, 1e-9, .1]))
    caps[p > 0] = least + more * rng.uniform(0, 1, len(least))
    caps[draw(st.sampled_from([[], [0]]))] = np.inf
    return p, caps


@given(capped_mixtures(), seeds)
def test_the_projection_is_the_nearest_mixture_under_the_caps(problem, seed):
    """One factor C for all groups below their caps, and C p over the cap for the others; so no
    mixture under the caps is nearer."""
    p, caps = problem
    q = aioli.project(p, caps)
    same(q.sum(), 1)
    assert (q <= caps * (1 + 1e-8)).all() and not q[p == 0].any()
    free = (p > 0) & (q < caps * (1 - 1e-8))
    if free.any():
        C = q[free].sum() / p[free].sum()
        same(q[free], C * p[free])
        assert C >= 1 - 1e-9
        capped = (p > 0) & ~free
        assert (C * p[capped] >= q[capped] * (1 - 1e-7)).all()
    for other in rng_of(seed).dirichlet(np.ones(len(p)), 20):
        other = aioli.project(np.where(p > 0, other, 0), caps)
        assert kl(q, p) <= kl(other, p) + 1e-9


@given(capped_mixtures())
def test_a_projection_projected_stays_and_caps_above_the_mixture_do_nothing(problem):
    p, caps = problem
    q = aioli.project(p, caps)
    same(aioli.project(q, caps), q)
    assert np.array_equal(aioli.project(p, np.full(len(p), np.inf)), p * 1. / p.sum())
    same(aioli.project(7 * p, p + .01), p)


@given(sizes, seeds, st.floats(1, 8), st.floats(1, 30))
def test_from_uniform_the_projection_is_unimax(m, seed, epochs, more):
    """Groups in the order of their size each take an equal part of what is left, or all they may;
    so the smaller a group the more epochs (U3, U5)."""
    n = rng_of(seed).dirichlet(np.ones(m))                          # sizes
    budget = n.sum() * epochs / more
    caps, filled, left = epochs * n / budget, np.zeros(m), 1.
    for rank, j in enumerate(n.argsort()):
        filled[j] = min(caps[j], left / (m - rank))
        left -= filled[j]
    q = aioli.project(np.full(m, 1 / m), caps)
    same(q, filled, atol=1e-9)
    assert np.all(np.diff((q / n)[n.argsort()]) <= 1e-9 * (q / n).max())
    same(aioli.project(np.full(m, 1 / m), caps + 1 / m), np.full(m, 1 / m))         # U4


@pytest.mark.parametrize("caps", [[.3, .4, .2], [.5, np.nan, 1], [-.1, 1, 1], [0, 0, 0]])
def test_caps_that_leave_no_mixture_are_refused(caps):
    with pytest.raises(ValueError, match="raise them, or train for fewer steps"):
        aioli.project(np.full(3, 1 / 3), caps)
    with pytest.raises(ValueError, match="not to 0.4"):
        aioli.project([0, .5, .5], [.6, .2, .2])


@given(st.floats(-4, -.05), st.floats(-1, 1), st.floats(-4, -.05), st.floats(-1, 1))
def test_the_optimum_for_two_groups_has_a_closed_form(k1, b1, k2, b2):
    best = min(max((k2 + b2 - b1 + math.log(k2 / k1)) / (k1 + k2), 0), 1)
    p = solve_static(LogLinear(np.array([1., 2.]), np.array([[k1 + b1, b1], [b2, k2 + b2]])))
    same(p, [best, 1 - best], atol=1e-5)


@settings(max_examples=20)
@given(st.integers(2, 4), seeds, objectives, st.booleans())
def test_the_solver_is_at_least_as_good_as_a_fine_grid(m, seed, objective, power):
    """The law's own optimum is below every mixture that one could have tried."""
    law = (a_power_law if power else a_law)(seed, m)
    w = rng_of(seed).uniform(.1, 2, m)

    def value(P):
        return (np.exp(law(P)) if objective == "perplexity" else law(P)) @ w
    p = solve_static(law, weights=w, objective=objective)
    same(p.sum(), 1)
    best = value(lattice(m, {2: 2000, 3: 60, 4: 24}[m])).min()
    assert p.min() >= 0 and value(p) <= best * (1 + 1e-9)


@settings(max_examples=20)
@given(ms, seeds)
def test_at_the_optimum_no_group_promises_more_than_another(m, seed):
    """Column sums of A[i, j] = -t_ij (L_i - c_i) are equal on the support, and none is higher off
    it: so the online step stays there."""
    law = a_law(seed, m)
    p = solve_static(law)
    s = -law.gradient(p).sum(0)
    assert np.all(s <= s @ p + 1e-7)
    same(s[p > 1e-3], s @ p, rtol=0, atol=1e-7)
    same(lmo_step(p, -law.gradient(p), .1), p, rtol=0, atol=1e-7)


@settings(max_examples=15)
@given(ms, seeds)
def test_for_a_convex_law_the_start_of_the_solver_does_not_matter(m, seed):
    law = a_law(seed, m)
    same(solve_static(law, starts=1 + m), solve_static(law), rtol=0, atol=1e-5)


def test_false_that_the_objective_of_dml_is_always_convex():
    """With factors k < 0, as an unconstrained fit returns them, both corners are local optima.

    From the middle the slope leads to the worse one; starts near every corner find the better.
    """
    law = Signed(np.array([4., 4.]), np.array([-1., -1.]), np.array([[1., 0.], [-3., 1.1]]))
    worse, better = law(np.eye(2)).sum(1)
    assert law(np.full(2, .5)).sum() > worse > better + 1
    same(solve_static(law), [1, 0], atol=1e-6)
    same(solve_static(law, starts=3), [0, 1], atol=1e-6)


@settings(max_examples=20)
@given(ms, seeds)
def test_relabelling_relabels_the_optimum_and_levels_and_units_of_weight_do_not_matter(m, seed):
    law, order, rng = a_law(seed, m), rng_of(seed).permutation(m), rng_of(seed)
    w = rng.uniform(.5, 2, m)
    p = solve_static(law, weights=w)
    relabelled = LogLinear(law.c[order], law.t[np.ix_(order, order)])
    same(solve_static(relabelled, weights=w[order]), p[order], rtol=0, atol=1e-5)
    lifted = LogLinear(law.c + rng.uniform(0, 3, m), law.t)
    same(solve_static(lifted, weights=w), p, rtol=0, atol=1e-5)
    same(solve_static(law, weights=7 * w), p, rtol=0, atol=1e-5)
    same(solve_static(law), solve_static(law, weights=np.ones(m)), rtol=0, atol=0)


def test_false_that_the_unit_of_one_groups_loss_does_not_matter():
    """Nats or bits per byte, with different bytes per token, weigh the groups differently."""
    law = a_law(0, 2)
    in_bits = LogLinear(np.array([.3, 1]) * law.c, law.t + np.log([[.3], [1]]))
    differ(solve_static(in_bits), solve_static(law), .05)


@settings(max_examples=15)
@given(ms, seeds)
def test_a_linear_law_ends_at_a_corner(m, seed):
    """And a floor keeps the others in."""
    A = rng_of(seed).uniform(-.5, 1, (m, m))
    s = A.sum(0)
    assume(np.sort(s)[-1] - np.sort(s)[-2] > .05)
    corner, law = np.eye(m)[s.argmax()], Straight(np.zeros(m), A)
    same(solve_static(law), corner, rtol=0, atol=1e-6)
    same(solve_static(law, floor=.05), .05 + (1 - .05 * m) * corner, rtol=0, atol=1e-6)


@given(ms, seeds)
def test_a_laws_gradient_is_minus_its_local_A(m, seed):
    """A[i, j] = -t_ij (L_i(p) - c_i); with c = 0 that is Skill-It's graph times loss."""
    law, p = a_law(seed, m), rng_of(seed).dirichlet(np.ones(m))
    for i, j in np.ndindex(m, m):
        same(law.gradient(p)[i, j], law.t[i, j] * (law(p)[i] - law.c[i]))
    none = LogLinear(np.zeros(m), law.t)
    same(-none.gradient(p), -law.t * none(p)[:, None])


# ---- the solver: how far from the optimum it ends ----


def value(law, w, objective, p):
    """What solve_static minimises: the weighted loss, or the log of the weighted perplexity."""
    L = law(p)
    return w @ L if objective == "loss" else L.max() + np.log(w @ np.exp(L - L.max()))


def gap(law, w, objective, p, floor):
    """How much lower than at p a convex objective can be anywhere, at most: <slope, p - corner>,
    for the corner where that is largest (the Frank-Wolfe gap)."""
    pull = w if objective == "loss" else softmax(np.log(w) + law(p))
    slope = pull @ law.gradient(p)
    return slope @ (p - floor) - (1 - len(p) * floor) * slope.min()


@st.composite
def convex_problems(draw):
    """(law, weights, objective, floor): any groups, losses and signs, slopes from 1e-3 to 1e3."""
    make = draw(st.sampled_from([LogLinear, Power, Forecast]))
    m, n, rng = draw(sizes), draw(sizes), rng_of(draw(seeds))
    slope = 10.0 ** draw(st.integers(-3, 3))
    if make is LogLinear:
        t = slope * rng.uniform(-1, 1, (n, m))
        law = LogLinear(rng.uniform(0, 2, n), t - t.mean(1, keepdims=True))
    elif make is Power:
        law = Power(rng.uniform(0, 2, n), rng.uniform(.01, 1, n), slope * rng.uniform(0, 1, (n, m)),
                    rng.uniform(.1, 1, (n, m)))
    else:
        law = Forecast(rng.uniform(0, 3, m), slope * rng.uniform(0, 1, m), rng.uniform(0, 1, m),
                       rng.uniform(.05, .9) * rng.dirichlet(np.ones(m)))
    objective, floor = draw(objectives), draw(floors)
    return law, rng.uniform(.1, 2, len(law.c)), objective, floor


@given(convex_problems())
def test_no_mixture_can_be_lower_than_what_the_solver_finds(problem):
    law, w, objective, floor = problem
    p = solve_static(law, w, objective, floor=floor)
    same(p.sum(), 1)
    assert p.min() >= floor * (1 - 1e-9)
    assert gap(law, w, objective, p, floor) <= 1e-6 * max(1, abs(value(law, w, objective, p)))


def steep_law(make, rng, p, slope, push):
    """A law and weights for which the slope of the weighted losses at p is -push plus a constant.

    Losses are 1 at p; the slopes of each are about `slope` there.
    """
    m = len(p)
    if make is LogLinear:               # the last loss makes up for what the slopes of others lack
        t = rng.uniform(-1, 1, (m, m))
        t = np.vstack((t, -push - t.sum(0)))
        t -= (t @ p)[:, None]
        t *= min(slope, 300 / np.abs(t).max())                      # e^300 is a number, e^1000 not
        return LogLinear(np.zeros(m + 1), t), np.ones(m + 1)
    if make is Power:
        a, g = slope * np.diag(rng.uniform(.5, 1, m)), rng.uniform(.2, 1, (m, m))
        g[p == 0] = 1                                               # else infinitely steep there
        law = Power(np.zeros(m), rng.uniform(.1, 1, m), a, g)
    else:
        n = rng.uniform(.05, .9) * rng.dirichlet(np.ones(m))
        law = Forecast(np.zeros(m), slope * rng.uniform(.2, 1, m), rng.uniform(0, 1, m), n)
    law = law._replace(c=1 - law(p))
    return law, push / -np.diag(law.gradient(p))


@st.composite
def solved_problems(draw):
    """(law, weights, objective, floor, optimum), the optimum in a corner, on an edge or inside."""
    make = draw(st.sampled_from([LogLinear, Power, Forecast]))
    place, floor = draw(st.sampled_from(["corner", "edge", "inside"])), draw(floors)
    m, rng = draw(st.integers(3, 6)), rng_of(draw(seeds))
    kept = dict(corner=1, edge=rng.integers(2, m), inside=m)[place]
    share = np.zeros(m)
    share[rng.permutation(m)[:kept]] = rng.dirichlet(np.full(kept, 3.))
    push = np.where(share > 0, 1, rng.uniform(.1, .9, m))           # outside, the others pull more
    p = floor + (1 - m * floor) * share
    law, w = steep_law(make, rng, p, 10.0 ** draw(st.integers(-3, 3)), push)
    return law, w, draw(objectives), floor, p


@given(solved_problems())
def test_the_solver_finds_an_optimum_in_a_corner_on_an_edge_or_inside(problem):
    """For either objective the slope at p is the same, as all losses are equal there."""
    law, w, objective, floor, best = problem
    least = value(law, w, objective, best)
    assert abs(gap(law, w, objective, best, floor)) <= 1e-9 * max(1, abs(least))   # it is one
    p = solve_static(law, w, objective, floor=floor)
    assert abs(value(law, w, objective, p) - least) <= 1e-6 * max(1, abs(least))


# ---- the solver under caps and near a prior ----


def objective_of(law, w, objective, prior, kl):
    """What solve_static minimises, and its slope up to a constant, as functions of p."""
    def total(p):
        return value(law, w, objective, p) + kl * p @ np.log(p / prior)

    def slope(p):
        pull = w if objective == "loss" else softmax(np.log(w) + law(p))
        return pull @ law.gradient(p) + kl * np.log(p / prior)
    return total, slope


def residual(slope, p, floor, caps):
    """How far p is from the conditions of an optimum: each group that could have less wants none,
    and each that could have more neither, to one level of the slopes; the level is the best."""
    def at(level):
        less = (p - floor) @ np.maximum(slope - level, 0)
        return less + np.minimum(caps - p, 1) @ np.maximum(level - slope, 0)
    return min(map(at, slope))


@st.composite
def limits(draw, m):
    """(prior, kl, caps), the caps over a floor of .02, often just adding up to 1 and often none."""
    rng = rng_of(draw(seeds))
    caps = .02 + (1 - .02 * m) * rng.dirichlet(np.full(m, .5))
    caps *= draw(st.sampled_from([1, 1.0001, 1.5, 4]))
    prior = .9 * rng.dirichlet(np.ones(m)) + .1 / m
    kl = draw(st.sampled_from([0, 1e-3, .05, 1., 30.]))
    return prior, kl, np.where(rng.uniform(0, 1, m) < draw(st.sampled_from([0, .5])), np.inf, caps)


@settings(max_examples=60)
@given(st.data())
def test_under_caps_and_near_a_prior_no_mixture_is_lower_than_what_the_solver_finds(data):
    """Free groups have one slope, groups at their cap want more and those at the floor less."""
    law, w, objective, floor = data.draw(convex_problems())
    prior, kl, caps = data.draw(limits(law.m))
    with np.errstate(over="ignore"):
        assume(np.isfinite(law(aioli.project(np.full(law.m, 1 / law.m), caps))).all())
    p = solve_static(law, w, objective, floor=floor, prior=prior, kl=kl, caps=caps)
    same(p.sum(), 1)
    assert (p >= floor * (1 - 1e-9)).all() and (p <= caps * (1 + 1e-9)).all()
    assume(objective == "loss" or law(p).max() < 1e4)               # else rounding decides a slope
    total, slope = objective_of(law, w, objective, prior, kl)
    size = max(1, abs(total(p)), (np.abs(law.gradient(p)) @ p).max())
    assert residual(slope(p), p, floor, caps) <= 1e-8 * size


def test_a_group_that_may_get_nothing_gets_nothing_near_a_prior_too():
    law = LogLinear(np.zeros(3), np.diag([-3., -2., -1.]))
    near = dict(kl=.05, prior=np.array([.5, .3, .2]))
    p = solve_static(law, caps=[0, 1, 1], **near)
    close = solve_static(law, caps=[1e-9, 1, 1], **near)
    same(p, close, 0, 1e-7)
    assert p[0] < 1e-100


@settings(max_examples=20)
@given(st.data())
def test_near_a_prior_the_optimum_is_the_prior_times_the_exponent_of_the_gain_capped(data):
    """p = min(caps, C prior exp(-df/dp / kl)): Olmix's own condition (M1, M2)."""
    m = data.draw(sizes)
    law, (prior, _, caps) = a_law(data.draw(seeds), m), data.draw(limits(m))
    for limit in (caps, np.full(m, np.inf)):
        p = solve_static(law, prior=prior, kl=.5, caps=limit)
        gain = np.exp(-law.gradient(p).sum(0) / .5)
        same(p, aioli.project(prior * gain / (prior @ gain), limit), rtol=1e-4, atol=1e-8)


@settings(max_examples=20)
@given(st.data())
def test_caps_and_a_prior_reduce_to_what_they_are_made_of(data):
    """f = 0: the prior under caps, from uniform UniMax (M3); f linear: egd (S12); the prior weighs
    all or nothing: M5."""
    m = data.draw(sizes)
    law, (prior, _, caps) = a_law(data.draw(seeds), m), data.draw(limits(m))
    A = data.draw(matrices(m, scale=1.))
    nothing, near = Straight(np.zeros(m), np.zeros((m, m))), dict(rtol=1e-4, atol=1e-5)
    same(solve_static(nothing, prior=prior, kl=.1, caps=caps), aioli.project(prior, caps), **near)
    same(solve_static(nothing, kl=.1, caps=caps), aioli.project(np.full(m, 1 / m), caps), **near)
    line = Straight(np.zeros(m), A)
    same(solve_static(line, prior=prior, kl=.5), aioli.egd(prior, A.sum(0), 1 / .5), **near)
    same(solve_static(line, prior=prior, kl=.5, caps=caps),
         aioli.project(aioli.egd(prior, A.sum(0), 1 / .5), caps), **near)
    same(solve_static(law, prior=prior, kl=1e6, caps=caps), aioli.project(prior, caps), **near)
    same(law(solve_static(law, prior=prior, kl=1e-7, caps=caps)).sum(),
         law(solve_static(law, caps=caps)).sum(), rtol=1e-5)


@settings(max_examples=15)
@given(st.data())
def test_the_more_the_prior_weighs_the_nearer_the_mixture_and_the_higher_the_loss(data):
    m = data.draw(sizes)
    law, (prior, _, caps) = a_law(data.draw(seeds), m), data.draw(limits(m))
    path = [solve_static(law, prior=prior, kl=x, caps=caps) for x in (0, .01, .1, .5, 2, 20)]
    assert np.all(np.diff([kl(p, prior) for p in path]) <= 1e-8)
    assert np.all(np.diff([law(p).sum() for p in path]) >= -1e-8)


@settings(max_examples=15)
@given(st.integers(3, 6), seeds, st.booleans())
def test_the_optimum_of_groups_frozen_in_its_proportions_is_the_optimum(m, seed, capped):
    """The last two become one group, whose cap is the first that one of them would meet (M7)."""
    law, rng = a_law(seed, m), rng_of(seed)
    caps = 1 / m + rng.uniform(0, .3, m) if capped else np.full(m, np.inf)
    p = solve_static(law, caps=caps)
    assume(p[-2:].min() > 1e-6)
    inside = p[-2:] / p[-2:].sum()
    frozen = LogLinear(law.c, np.column_stack((law.t[:, :-2], law.t[:, -2:] @ inside)))
    q = solve_static(frozen, caps=np.append(caps[:-2], (caps[-2:] / inside).min()))
    same(np.append(q[:-1], q[-1] * inside), p, rtol=0, atol=1e-4)


@pytest.mark.parametrize("limits, says", [
    (dict(caps=[.3, .3, .3]), "add up to 1"), (dict(caps=[.01, 1, 1], floor=.02), "caps must be 0"),
    (dict(prior=[.5, .5, 0]), "3 shares above 0"), (dict(prior=[.5, .5]), "3 shares above 0"),
    (dict(kl=-1), "--kl -1 is out of range"), (dict(kl=np.nan), "out of range"),
    (dict(weights=[1, 1, -1], objective="perplexity"), "minimise --objective loss")])
def test_limits_that_leave_no_problem_are_refused(limits, says):
    with pytest.raises(ValueError, match=says):
        solve_static(a_law(0, 3), **limits)


def test_a_loss_that_should_rise_has_a_weight_below_0():
    """An accuracy, say; the corner with the most of it wins."""
    law = Straight(np.zeros(2), np.array([[1., 0.], [0., -3.]]))
    same(solve_static(law, weights=[1, 1]), [1, 0], atol=1e-6)
    same(solve_static(law, weights=[1, -1]), [0, 1], atol=1e-6)


def test_a_group_that_first_steps_drive_out_comes_back():
    """Losses 2.0, 1.5 and 4.1 at uniform, half of each reducible, a fifth of the run over."""
    n, L = np.full(3, 1 / 15), np.array([2., 1.5, 4.1])
    law = Forecast(L / 2, L / 2 / math.sqrt(3), np.zeros(3), n)
    same(law(np.full(3, 1 / 3)), L)
    p = solve_static(law, objective="perplexity", floor=.02)
    same(p, [.158, .075, .767], rtol=0, atol=1e-3)
    assert np.exp(law(p)).mean() == pytest.approx(16.628, abs=1e-3)
    assert np.exp(law(np.array([.02, .02, .96]))).mean() > 19


def test_a_first_step_into_the_wrong_corner_can_be_taken_back():
    """At group 0 the total is e, at group 1 it is 1 / e, and between them there is no hill."""
    law = LogLinear(np.zeros(2), np.array([[-20., -18., 60.], [1., -1., 0.]]))
    p = solve_static(law)
    assert p[1] > 1 - 1e-6 and law(p).sum() == pytest.approx(math.exp(-1), abs=1e-6)


def test_a_law_that_overflows_at_uniform_is_solved_from_where_it_does_not():
    """There exp(900) is no number; at the optimum, without group 0, the total is below 1 / 2."""
    law = LogLinear(np.zeros(2), np.array([[3000., -300., 0.], [0., 1., -1.]]))
    p = solve_static(law)
    assert law(p).sum() < .5 and gap(law, np.ones(2), "loss", p, 0) <= 1e-6


@pytest.mark.parametrize("t", [[[np.nan, 0.], [0., 1.]], [[1e4, 1e4], [1e4, 1e4]]])
def test_a_law_without_finite_numbers_is_refused(t):
    with pytest.raises(ValueError, match="no finite number to minimise"):
        solve_static(LogLinear(np.zeros(2), np.array(t)))


# ---- the fits ----


@given(st.data(), st.integers(0, 5))
def test_the_linear_dynamic_fit_recovers_A_from_any_mixtures_that_tell_the_groups_apart(data, more):
    A = data.draw(matrices(n=data.draw(sizes)))
    m = A.shape[1]
    P = rng_of(data.draw(seeds)).dirichlet(np.full(m, .5), m + more)
    assume(np.linalg.cond(P) < 1e4)
    same(fit_linear_dynamic(P, P @ A.T) / np.abs(A).max(), A / np.abs(A).max(), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="do not tell"):
        fit_linear_dynamic(P[:m - 1], P[:m - 1] @ A.T)


@pytest.mark.parametrize("m, runs, seed", [(2, 9, 0), (3, 8, 1), (7, 24, 3)])
def test_the_log_linear_fit_recovers_the_predictions_of_the_law_that_made_the_losses(m, runs, seed):
    """On mixtures that it has not seen, near the corners too; and it is the same every time."""
    law, P = a_law(seed, m), cover(m, runs, rng_of(seed))
    found = fit_log_linear(P, law(P))
    unseen = rng_of(seed + 1).dirichlet(np.ones(m), 50)
    same(found(P), law(P), rtol=0, atol=5e-4)
    same(found(unseen), law(unseen), rtol=0, atol=2e-3)
    assert found.c.min() >= 0
    if m == 3:
        again = fit_log_linear(P, law(P))
        assert np.array_equal(found.c, again.c) and np.array_equal(found.t, again.t)


def test_the_log_linear_fit_needs_m_plus_one_runs_and_no_more():
    """There are m + 1 free parameters per loss; as many generic runs recover the predictions."""
    law, P = a_law(5, 2), np.array([[.9, .1], [.1, .9], [.4, .6]])
    found = fit_log_linear(P, law(P))
    same(found(P), law(P), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least 3"):
        fit_log_linear(P[:2], law(P[:2]))


def test_relabelling_groups_relabels_the_fit_and_a_constant_moves_its_level_only():
    law, P, order = a_law(6, 3, 2), cover(3, 7, rng_of(0)), np.array([2, 0, 1])
    L = law(P) + .003 * rng_of(1).normal(size=(7, 2))               # noise: the fit is not exact
    found = fit_log_linear(P, L)
    both = fit_log_linear(P[:, order], np.hstack((L[:, ::-1], L + [1, 2])))
    same(both(P[:, order]), np.hstack((found(P)[:, ::-1], found(P) + [1, 2])), rtol=0, atol=1e-4)


def test_false_that_the_fit_recovers_the_parameters():
    """Two laws with k = 1 / 5 and 5 are one fit, so neither k is found."""
    law, P = a_law(7, 2), cover(2, 9, rng_of(0))
    small, large = (Signed(law.c, np.full(2, k), law.t - math.log(k)) for k in (.2, 5.))
    differ(small.t, large.t, 3)
    same(fit_log_linear(P, small(P)).t, fit_log_linear(P, large(P)).t, rtol=0, atol=1e-6)


def test_one_run_gone_wrong_does_not_bend_the_law():
    """The Huber error: at the other runs the predictions stay."""
    law, P = a_law(8, 2), cover(2, 15, rng_of(0))
    L = law(P)
    L[4] += 1.
    found = fit_log_linear(P, L)
    rest = np.arange(15) != 4
    assert np.abs(found(P)[rest] - law(P)[rest]).max() < .02


@pytest.mark.parametrize("m, runs", [(2, 12), (3, 30)])
def test_the_power_fit_recovers_the_predictions_of_the_law_that_made_the_losses(m, runs):
    """And it is the same every time."""
    law, P = a_power_law(m, m), cover(m, runs, rng_of(0))
    found = fit_power_law(P, law(P))
    unseen = .9 * rng_of(1).dirichlet(np.ones(m), 50) + .1 / m
    same(found(P), law(P), rtol=0, atol=2e-3)
    same(found(unseen), law(unseen), rtol=0, atol=1e-2)
    assert all(part.min() >= 0 for part in found)
    if m == 2:
        assert all(np.array_equal(a, b) for a, b in zip(found, fit_power_law(P, law(P))))


@pytest.mark.parametrize("fit", [fit_log_linear, fit_power_law])
def test_a_loss_has_the_same_law_whichever_others_are_fitted(fit):
    """To the last bit, without its neighbours and in another order."""
    P = cover(2, 7, None)
    L = a_law(3, 2, 3)(P) + .02 * rng_of(1).normal(size=(7, 3))
    with swapped(fit=functools.partial(aioli.fit, iterations=10)):
        together = fit(P, L)
        for chosen in ([2], [1, 0]):
            alone = fit(P, L[:, chosen])
            assert all(np.array_equal(part[chosen], own) for part, own in zip(together, alone))


def test_a_power_law_has_diminishing_returns_where_losses_have_none():
    """Exponents are at most 1, also for a group whose use grows with its share."""
    P = cover(2, 12, rng_of(0))
    found = fit_power_law(P, 3 - P ** 2)
    assert found.g.max() <= 1 and np.abs(found(P) - (3 - P ** 2)).max() < .3


@pytest.mark.parametrize("fit, runs, warns", [
    (fit_power_law, 7, "8 numbers of a law are fitted to 7 runs"), (fit_power_law, 8, None),
    (fit_log_linear, 4, None)])
def test_a_law_with_more_numbers_than_runs_says_so(fit, runs, warns, recwarn):
    P = cover(3, runs, rng_of(0))
    fit(P, a_power_law(0, 3)(P)[:, :1])
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == bool(warns) and all(warns in line for line in said)


@pytest.mark.parametrize("fit", [fit_log_linear, fit_power_law])
def test_a_fit_refuses_what_are_not_runs(fit):
    P, L = cover(2, 5, None), np.full((5, 2), 3.)
    refused = ((P[:4], L), (P, L[:, 0]), (-P, L), (P, np.where(L > 0, np.nan, L)), (0 * P, L),
               (P[:1], L[:1]))
    for mixtures, losses in refused:
        with pytest.raises(ValueError):
            fit(mixtures, losses)


def test_a_fit_takes_mixtures_in_percent():
    """Shares are divided by their sum, so a table rounded to three decimals will do."""
    law, P = a_law(9, 2), cover(2, 9, rng_of(0))
    same(fit_log_linear(100 * P, law(P))(P), law(P), rtol=0, atol=1e-4)


@settings(max_examples=15)
@given(st.integers(3, 6), st.integers(2, 6), seeds)
def test_a_cover_is_spread_out_by_thinning_the_closest_pairs(m, runs, seed):
    """Of 8 times as many Dirichlet(1.5) draws the first of the closest two goes, until `runs` are
    left."""
    left = list(rng_of(seed).dirichlet(np.full(m, 1.5), 8 * runs))
    while len(left) > runs:
        pairs = [(math.dist(left[a], left[b]), a)
                 for a, b in itertools.combinations(range(len(left)), 2)]
        left.pop(min(pairs)[1])
    same(cover(m, runs, rng_of(seed)), left)


@pytest.mark.parametrize("objective", ["loss", "perplexity"])
@pytest.mark.parametrize("method, fit, law", [
    (aioli.dml, "fit_log_linear", a_law(10, 3)),
    (aioli.power, "fit_power_law", a_power_law(10, 3))])
def test_dml_and_power_take_the_optimum_of_the_law_that_they_fit(method, fit, law, objective):
    """The static law in the loop: sweep, fit to all of it, solve, train; A as documented."""
    fitted, h = [], history(3)

    def spy(P, L):
        fitted.append((P, L))
        return law
    with swapped(**{fit: spy}):
        drive(method(h, 10, objective=objective), Static(law), h)
    (P, L), last = fitted[0], h.last.request
    assert len(P) == len(L) == 9 and np.array_equal(P, [row.request.p for row in h.rows[:-1]])
    assert np.array_equal(L, [law(p) for p in P])
    best = solve_static(law, objective=objective, starts=4, floor=P.min(), caps=P.max(0))
    same(last.p, best, rtol=0, atol=1e-6)
    same(last.A, -law.t if method is aioli.dml else -law.gradient(last.p))


@pytest.mark.parametrize("method", [aioli.dml, aioli.power])
def test_no_proposal_goes_into_a_corner_that_its_sweep_has_not_seen(method):
    """Group 1 hurts every loss here, so the law's own optimum is p = (1, 0)."""
    a, h = np.array([[1., 0.], [1., 0.]]), history(2)
    law = Power(np.ones(2), np.ones(2), a, np.full((2, 2), .5))
    drive(method(h, 10), Static(law), h)
    same(h.last.request.p, [.9, .1], rtol=1e-3)


@settings(max_examples=20)
@given(ms, seeds, st.integers(1, 9), st.floats(0, 2), objectives)
def test_a_proposal_gives_no_group_more_than_some_run_gave_it(m, seed, runs, weight, objective):
    """Nor less than the least that any group was given, and under these it is the best there is."""
    law, rng = a_law(seed, m), rng_of(seed)
    P, w = rng.dirichlet(np.ones(m), runs + 1), rng.uniform(.1, 1, m)
    p = aioli.propose(law, P, objective, w, weight)
    assert (p <= P.max(0) * (1 + 1e-9)).all() and p.min() >= min(P.min(), .5 / m) * (1 - 1e-9)
    total, _ = objective_of(law, w / w.sum(), objective, np.full(m, 1 / m), weight)
    assert all(total(p) <= total(q) + 1e-8 for q in P)


def test_dml_and_power_stay_near_the_prior_that_is_asked_for():
    law, h = a_law(1, 2), aioli.History("ab", [3e6, 1e6], 8)
    known = {fit: lambda P, L: law for fit in ("fit_log_linear", "fit_power_law")}
    natural = [.75, .25]
    for asked, prior in (("", natural), ("natural", natural), ("uniform", [.5, .5]),
                         ("1+4", [.2, .8])):
        for method in (aioli.dml, aioli.power):
            with swapped(**known):
                drive(method(h, 10, kl=1e4, mixture_prior=asked), Static(law), h)
            same(h.last.request.p, prior, rtol=1e-3)
    for asked in ("1+2+3", "1+0", "natrual"):
        with pytest.raises(ValueError, match="shares"):
            next(aioli.dml(h, 10, kl=.1, mixture_prior=asked))
    for asked in ("natural", "uniform", "1+4"):
        with pytest.raises(ValueError, match="--mixture-prior changes nothing without --kl"):
            next(aioli.dml(h, 10, mixture_prior=asked))


def test_grid_takes_the_mixture_whose_average_is_least_in_what_it_minimises():
    """Average loss is least at the first of nine mixtures, average perplexity at the fourth."""
    def law(p):
        return np.array([4 - 3 * p[0], 1 + 3.5 * p[0]])
    for objective, best in (("loss", .1), ("perplexity", .4)):
        h = history(2)
        drive(aioli.grid(h, 10, objective=objective), Static(law), h)
        same(h.last.request.p, [best, 1 - best])


# ---- forecasts of a run, and the method that plans with them ----


def a_run(law, shares, stretch):
    """What a run shows whose losses follow a Forecast: n, share, losses, after stretches of
    `stretch` of the run."""
    n = np.cumsum(np.multiply(shares, stretch), axis=0)                       # (t, m)
    E = (1 - law.o) * n + law.o * n.sum(1, keepdims=True) * shares
    return n, np.array(shares), law.c + law.b / np.sqrt(E)


@given(ms, seeds)
def test_a_forecast_is_what_the_run_will_show_at_its_end(m, seed):
    """Forecast(p) is the law at t = 1 of a run that goes on at p: the two forms of E agree."""
    law, p = a_forecast(seed, m), rng_of(seed).dirichlet(np.ones(m))
    left = 1 - law.read.sum()
    n = np.array([law.read, law.read + left * p])
    E = (1 - law.o) * n[1] + law.o * n[1].sum() * p
    same(law(p), law.c + law.b / np.sqrt(E))


@pytest.mark.parametrize("at_the_prior, rtol", [(True, 1e-9), (False, 3e-2)])
@given(m=ms, seed=seeds)
def test_a_forecast_fitted_to_a_run_that_follows_the_law_foretells_its_end(
        m, seed, at_the_prior, rtol):
    """Exactly for o = .3, to 3 % for any o on the grid, once the run has changed its mixture."""
    rng = rng_of(seed)
    o = np.full(m, .3) if at_the_prior else rng.integers(0, 11, m) / 10
    truth = a_forecast(seed, m)._replace(o=o)
    shares = [np.full(m, 1 / m)] * 6 + list(rng.dirichlet(np.full(m, 9.), 10))
    n, share, L = a_run(truth, shares, .03)
    law, p = fit_forecast(n, share, L), rng.dirichlet(np.full(m, 9.))
    same(law(p), truth._replace(read=n[-1])(p), rtol=rtol)
    same(law.read, n[-1])


def test_a_forecast_needs_three_validations():
    with pytest.raises(ValueError, match="raise --rounds or --wait"):
        fit_forecast([[.1, .1], [.2, .2]], [[.5, .5]] * 2, [[3., 3.]] * 2)


def test_the_noise_of_validations_is_that_of_their_second_differences_and_at_least_a_hundredth():
    """A few jumps, as a change of mixture makes, do not move it; nor does a trend."""
    trend = np.linspace(5, 4, 300)[:, None] * [1, .5]
    for deviation in (.05, .2):
        L = trend + deviation * rng_of(0).normal(size=trend.shape)
        L[[50, 120, 200]] += 1
        assert aioli.validation_noise(L) == pytest.approx(.46 * deviation ** 2, rel=.2)
    assert aioli.validation_noise(trend) == 1e-4 == aioli.validation_noise(trend[:3])


@pytest.mark.parametrize("o", [0., .1, .9, 1.])
def test_on_quiet_losses_a_few_changes_of_mixture_tell_what_is_forgotten(o):
    """The prior on o, .3, has the weight of a misfit of .01 nats, the least noise there is."""
    truth = Forecast(np.full(2, 2.), np.full(2, .1), np.full(2, o), np.zeros(2))
    shares = [[.5, .5]] * 12 + [[.75, .25]] * 4 + [[.25, .75]] * 4
    found = fit_forecast(*a_run(truth, shares, .03))
    same(found.o, o, rtol=0, atol=.01)


class Run:
    """A world whose main run follows a Forecast law, with real counts of windows."""

    def __init__(self, law, steps, batch):
        self.law, self.batch, self.total, self.n = law, batch, steps * batch, np.zeros(len(law.c))

    def __call__(self, request):
        windows = request.steps * self.batch * request.p
        self.n, share = self.n + windows / self.total, request.p
        E = (1 - self.law.o) * self.n + self.law.o * self.n.sum() * share
        return dict(loss=self.law.c + self.law.b / np.sqrt(np.maximum(E, 1e-4)), windows=windows)


def noisy(world, rng):
    """The same world with noise in its losses."""
    def answer(request):
        said = world(request)
        return dict(said, loss=said["loss"] + .02 * rng.normal(size=len(said["loss"])))
    return answer


def method_on(method, law, world=None, **settings):
    """A method's 1,000 steps in a world that follows this law -> its History."""
    h = history(len(law.c))
    drive(method(h, 1000, **settings), world or Run(law, 1000, h.batch), h)
    return h


aioli_on = functools.partial(method_on, aioli.aioli)
horizon_on = functools.partial(method_on, aioli.horizon)
forecasting = pytest.mark.parametrize("method", [aioli.aioli, aioli.horizon])


def averages(truth, h, objective):
    """What is minimised, by the law at uniform, at the end of the run, and at the law's optimum."""
    best = solve_static(truth, objective=objective, floor=.02)
    ends = truth(h.uniform), h.losses()[-1], truth(best)
    return [(np.exp(L) if objective == "perplexity" else L).mean() for L in ends]


@given(st.integers(2, 5), st.integers(0, 2), seeds, objectives, st.floats(.05, 2),
       st.sampled_from([0, 250]))
def test_aioli_is_its_description(k, absent, seed, objective, eta, before):
    """Longhand, from any start, on noisy losses, on a run of its own or after steps on all groups;
    only the fit of the forecast is taken as it is."""
    rng, m = rng_of(seed), k + absent
    law = a_forecast(seed, m)._replace(read=np.zeros(m))
    start = rng.permutation(np.r_[rng.uniform(.5, 1, k), np.zeros(absent)])
    start = p = start / start.sum()
    h, known, world = history(m), history(m), noisy(Run(law, 1000, 8), rng)
    slopes = []
    if before:
        request = aioli.Train(h.uniform, before)
        h.add(request, **world(request))
    earlier, steps = len(h.rows), 1000 - before
    drive(aioli.aioli(h, steps, eta=eta, objective=objective, start=start), world, h)
    rows = h.trained()[earlier:]
    assert [row.request.steps for row in rows] == 10 * [steps // 25] + [steps * 15 // 25]
    for t, row in enumerate(rows):
        same(row.request.p, p)
        if t > 3:
            same(row.request.A, np.diag(slopes))                    # what it stepped on
        if t < 3:                                                   # 16 % of its steps
            continue
        known.rows = h.rows[:earlier + t + 1]
        law, slopes, pulls = aioli.forecast_end(known, 8000), [], []
        left = 1 - sum(law.read)
        for c, b, o, n, share in zip(law.c, law.b, law.o, law.read, p):
            E = max((1 - o) * (n + left * share) + o * share, 1e-4)
            slope = b / 2 * E ** -1.5 * ((1 - o) * left + o)
            worth = math.exp(c + b / math.sqrt(E)) if objective == "perplexity" else 1.
            slopes.append(slope if share else 0.)
            pulls.append(worth * slopes[-1])
        total = sum(pulls) or 1.                                    # nothing falls: no step
        weights = [a * math.exp(eta * k * pull / total) for a, pull in zip(p, pulls)]
        p = [w / sum(weights) for w in weights]


@settings(max_examples=15)
@given(ms, seeds, objectives)
def test_where_a_run_follows_the_law_aioli_steps_on_its_slope(m, seed, objective):
    """What more of a group in the rest of the run takes off its loss at the end, times exp(loss)
    for perplexity, scaled to sum 1 and times eta m."""
    truth = a_forecast(seed, m)._replace(o=np.full(m, .3), read=np.zeros(m))
    rows = aioli_on(truth, objective=objective, eta=.1).trained()
    p = [row.request.p for row in rows]
    moves = 0
    for t in range(3, 10):
        law = truth._replace(read=sum(row.windows for row in rows[:t + 1]) / 8000)
        pull = -np.diag(law.gradient(p[t])) * aioli.importance(law(p[t]), objective)
        moved = np.log(p[t + 1] / p[t])
        same(moved - moved.max(), .1 * m * (pull - pull.max()) / pull.sum(), rtol=1e-5, atol=1e-6)
        moves += np.ptp(moved) > 1e-3
    assert moves


@settings(max_examples=15)
@given(ms, seeds, objectives)
def test_aioli_ends_close_to_the_best_fixed_mixture_where_a_run_follows_the_law(
        m, seed, objective):
    """At least nine tenths of the way from uniform."""
    truth = a_forecast(seed, m)._replace(o=np.full(m, .3), read=np.zeros(m))
    h = aioli_on(truth, objective=objective)
    uniform, found, best = averages(truth, h, objective)
    assert found - best <= .1 * (uniform - best) + 1e-4


@given(ms, seeds, st.floats(.01, 3), objectives)
def test_a_round_of_aioli_moves_log_odds_by_eta_times_the_groups_at_most(m, seed, eta, objective):
    """Whatever it measures, as the shares of a unit are what it steps on."""
    rng, h = rng_of(seed), history(m)

    def noise(request):
        return dict(loss=rng.normal(5, 1, m))
    drive(aioli.aioli(h, 1000, eta=eta, objective=objective), noise, h)
    odds = np.log([row.request.p for row in h.trained()])
    odds -= odds.mean(1, keepdims=True)
    assert np.all(np.ptp(np.diff(odds, axis=0), axis=1) <= eta * m + 1e-9)
    found_any = any(row.request.A.any() for row in h.trained() if row.request.A is not None)
    assert (np.abs(odds).max() > 1e-6 * eta) == found_any


@settings(max_examples=15)
@given(ms, seeds, objectives)
def test_aioli_stays_uniform_where_all_groups_are_alike_or_its_step_is_none(m, seed, objective):
    law = a_forecast(seed, m)._replace(o=np.full(m, .3), read=np.zeros(m))
    alike = Forecast(*(np.full(m, part[0]) for part in law[:3]), np.zeros(m))
    for h in (aioli_on(alike, objective=objective), aioli_on(law, eta=0., objective=objective)):
        same([row.request.p for row in h.trained()], 1 / m, rtol=1e-6)


@settings(max_examples=15)
@given(ms, st.integers(1, 3), seeds, objectives)
def test_groups_that_aioli_does_not_start_with_are_never_trained_on(k, absent, seed, objective):
    """The others move as if those were not there, where the law is exact."""
    m = k + absent
    law = a_forecast(seed, m)._replace(o=np.full(m, .3), read=np.zeros(m))
    start = rng_of(seed).permutation(m) < k
    h = aioli_on(law, start=start / k, objective=objective)
    assert not h.read()[:, ~start].any()
    p = np.array([row.request.p for row in h.trained()])
    assert not p[:, ~start].any() and (p[:, start] > 0).all()
    same(p.sum(1), 1)
    inside = Forecast(*(part[start] for part in law))
    alone = aioli_on(inside, objective=objective)
    same(p[:, start], [row.request.p for row in alone.trained()], rtol=1e-6)


def test_false_that_one_mixture_is_best_for_loss_and_for_perplexity():
    """Group 0 has more to learn, group 1 is the harder: aioli and horizon tell them apart."""
    law = Forecast(np.array([1., 4.]), np.array([.5, .3]), np.full(2, .3), np.zeros(2))
    for method in (aioli.aioli, aioli.horizon):
        p = {o: method_on(method, law, objective=o).last.request.p
             for o in ("loss", "perplexity")}
        assert p["loss"][0] > .55 and p["perplexity"][1] > .55


@settings(max_examples=15)
@given(ms, seeds, objectives)
def test_horizon_ends_lower_than_uniform_and_close_to_the_best_fixed_mixture(m, seed, objective):
    """Where the law holds: at least 80 % of the way, after a start at uniform that cannot be taken
    back."""
    truth = a_forecast(seed, m)._replace(o=np.full(m, .3), read=np.zeros(m))
    h = horizon_on(truth, objective=objective)
    uniform, found, best = averages(truth, h, objective)
    assert found - best <= .2 * (uniform - best) + 2e-3


@settings(max_examples=10)
@given(ms, seeds, st.floats(.05, 1))
def test_no_log_share_moves_by_more_than_reach_against_another_but_twice(m, seed, reach):
    h = horizon_on(a_forecast(seed, m)._replace(read=np.zeros(m)), reach=reach)
    p = np.log([row.request.p for row in h.trained()])
    move = np.diff(p, axis=0)
    assert np.all(np.ptp(move, axis=1) <= 2 * reach + 1e-9)


@settings(max_examples=10)
@given(st.integers(2, 5), seeds)
def test_horizon_stays_uniform_where_all_groups_are_alike_and_until_it_knows_enough(m, seed):
    law = a_forecast(seed, m)
    alike = Forecast(*(np.full(m, part[0]) for part in law[:3]), np.zeros(m))
    same([row.request.p for row in horizon_on(alike).trained()], 1 / m, rtol=1e-4)
    h = horizon_on(law._replace(read=np.zeros(m)), wait=.4)
    assert all(np.array_equal(row.request.p, h.uniform) for row in h.trained()[:10])


def test_horizon_records_with_every_plan_minus_the_gradient_of_the_law_behind_it():
    law = Forecast(np.array([1., 1.]), np.array([.8, .2]), np.full(2, .3), np.zeros(2))
    rows = horizon_on(law).trained()
    for row in rows[:4]:                                            # 16 % of 25 rounds
        assert row.request.A is None and np.array_equal(row.request.p, [.5, .5])
    for t in range(4, 11):
        A, p, known = rows[t].request.A, rows[t].request.p, history(2)
        known.rows = rows[:t]
        same(A, -aioli.forecast_end(known, 8000).gradient(p))
        assert A[0, 1] == A[1, 0] == 0 and np.all(np.diag(A) > 0)
        assert p[0] > .5                                            # the first plan already
    assert len(rows) == 11 and p[0] > .6


@forecasting
@given(steps=st.integers(100, 2000), rounds=st.integers(5, 40), last=st.floats(.75, 1))
def test_validations_come_in_rounds_until_last_and_then_the_mixture_is_held(
        method, steps, rounds, last):
    h = history(2)
    world = Run(a_forecast(1, 2)._replace(read=np.zeros(2)), steps, h.batch)
    drive(method(h, steps, rounds=rounds, wait=.5, last=last), world, h)
    asked = [row.request.steps for row in h.trained()]
    assert asked[:-1] == aioli.split(steps, rounds)[:len(asked) - 1] and sum(asked) == steps
    assert sum(asked[:-1]) <= last * steps < sum(asked[:-1]) + max(aioli.split(steps, rounds)) + 1


def test_after_a_prior_horizon_counts_what_the_run_has_read_before_it():
    law = Forecast(np.array([1., 1.]), np.array([.5, .4]), np.full(2, .3), np.zeros(2))
    h, world = history(2), Run(law, 1000, 8)

    def two_to_one(h, steps):
        yield aioli.Train(np.array([1 / 3, 2 / 3]), steps)
    drive(aioli.with_prior(h, 1000, aioli.horizon, two_to_one), world, h)
    rows = h.trained()[:1 + int(.4 * 25)]
    windows, share = np.array([row.windows for row in rows]), np.array([row.share for row in rows])
    n = windows.cumsum(0) / 8000                            # of the whole run, prior and all
    law = fit_forecast(n, share, h.losses()[:len(rows)])
    plan = solve_static(law, floor=.02)
    assert law.read.sum() == pytest.approx(.5 + .5 * .4) and .5 < plan[0] < .9
    same(h.last.request.p, plan, rtol=0, atol=.02)


def test_after_a_prior_aioli_does_too():
    law = Forecast(np.array([1., 1.]), np.array([.5, .4]), np.full(2, .3), np.zeros(2))
    h, world = history(2), Run(law, 1000, 8)
    drive(aioli.with_prior(h, 1000, aioli.aioli, functools.partial(aioli.fixed, mixture="1+2")),
          world, h)
    known, rows, p = history(2), h.trained(), h.last.request.p
    known.rows = rows[:-1]
    found = aioli.forecast_end(known, 8000)
    assert rows[0].request.steps == 500 and found.read.sum() == pytest.approx(.5 + .5 * .4)
    before = rows[-2].request.p
    s = -np.diag(found.gradient(before)) * np.exp(found(before))
    same(p, lmo_step(before, np.diag(s / s.sum()), 1.))
    assert p[0] > .5                                        # it has read less of that


@forecasting
@given(rounds=st.integers(1, 40), wait=st.floats(0, .5), prior=st.sampled_from([0, .02, .2, .5]))
def test_too_few_validations_are_refused_before_anything_trains_and_never_later(
        method, rounds, wait, prior):
    h = history(2)
    if prior:
        h.add(aioli.Train(h.uniform, round(1000 * prior)), loss=[4., 4.])
    steps, already = 1000 - round(1000 * prior), len(h.rows)
    world = Run(a_forecast(1, 2)._replace(read=np.full(2, prior / 2)), 1000, h.batch)
    with contextlib.suppress(ValueError):
        drive(method(h, steps, rounds=rounds, wait=wait), world, h)
    ends = np.cumsum(aioli.split(steps, rounds))
    plans, counts = (wait * steps <= ends) & (ends <= .4 * steps), ends + 1000 * prior >= 80
    already = already if prior >= .08 else 0                        # not if in the warm-up
    refused = not plans.any() or already + counts[:plans.argmax() + 1].sum() < 3
    trained = sum(row.request.steps for row in h.rows) - round(1000 * prior)
    assert trained == (0 if refused else steps)


@given(ms, seeds, st.sampled_from([.02, .1]))
def test_no_share_of_a_plan_is_below_the_floor_and_the_rest_is_the_best_there_is(m, seed, floor):
    law = a_power_law(seed, m)
    p = solve_static(law, starts=1 + m, floor=floor)
    assert p.min() >= floor * (1 - 1e-9) and p.sum() == pytest.approx(1)
    others = floor + (1 - m * floor) * rng_of(seed).dirichlet(np.ones(m), 200)      # (200, m)
    assert law(p).sum() <= law(others).sum(1).min() + 1e-9


def test_a_floor_must_leave_a_choice():
    with pytest.raises(ValueError, match="lower it below 1/3"):
        solve_static(a_law(0, 3), floor=.4)


@forecasting
@pytest.mark.parametrize("warmup, inside", [(.1, 1), (.3, 5)])
def test_a_forecast_is_not_fitted_to_what_the_warm_up_showed(method, warmup, inside):
    """While the rate still rises, losses say nothing about tokens: up to four fifths of the warm-up
    they do not count. A round is 4 % of the run here."""
    law = a_forecast(0, 2)._replace(read=np.zeros(2))

    def forecast_and_mixtures(spoilt):
        h, world = history(2, warmup=warmup), Run(law, 1000, 8)

        def spoil(request):
            answer = world(request)
            return dict(answer, loss=answer["loss"] + 3 * (len(h.rows) == spoilt))
        drive(method(h, 1000, wait=.45, last=.6), spoil, h)
        mixtures = [row.request.p for row in h.rows]
        h.rows = h.rows[:8]
        return np.array(aioli.forecast_end(h, 8000)), np.array(mixtures)
    forecast, mixtures = forecast_and_mixtures(spoilt=None)
    assert np.ptp(mixtures, axis=0).max() > .01
    for t in range(inside):
        for found, expected in zip(forecast_and_mixtures(spoilt=t), (forecast, mixtures)):
            assert np.array_equal(found, expected)
    changed, moved = forecast_and_mixtures(spoilt=inside)
    differ(changed, forecast)
    differ(moved, mixtures)


@forecasting
def test_the_end_of_a_long_warm_up_is_waited_for_and_it_is_said_how(method):
    h = history(2, warmup=.3)
    with pytest.raises(ValueError, match="raise --rounds or --wait, or lower --warmup"):
        next(method(h, 1000))
    world = Run(a_forecast(1, 2)._replace(read=np.zeros(2)), 1000, h.batch)
    drive(method(h, 1000, wait=.45, last=.6), world, h)
    planned = [row.request.A is not None for row in h.rows]
    assert planned == [False] * 12 + [True] * 4                     # up to 48 %, then to 60 %


@forecasting
def test_a_prior_does_not_train_when_its_method_would_then_be_refused(method):
    h = history(2, warmup=.9)
    with pytest.raises(ValueError, match="lower --warmup"):
        next(aioli.with_prior(h, 1000, method, aioli.grid))

