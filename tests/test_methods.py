"""Claims of the methods: each is its paper's algorithm, spends what it says, composes and resumes.

The originals are restated here longhand, in plain loops, from the papers and the released code, not
from aioli.py; they run beside ours through random rounds.
"""
import functools
import inspect
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import aioli
from aioli import METHODS, History, Peek, Train, Update, probe_counts
from worlds import (NAMES, Exact, Linear, Scripted, Static, aioli_on, differ, doge_weights,
                    doremi_weights, drive, freely, gradient_signals, grape_mixtures, history,
                    matrices, measure, mixtures_of, rng_of, same, seeds, sizes, skillit_weights,
                    softmax, steps_of, swapped, tables, weights_of)

torch.set_num_threads(1)                                            # the fits are small

# ---- the originals, longhand ----


def original_skillit(graph, before, losses, eta, window):
    """As released: graph[j][i], train j to eval i; weights restart from ones; a window of sums."""
    k, rounds = len(before), []
    weights = [math.exp(eta * sum(graph[j])) for j in range(k)]
    rounds.append([w / sum(weights) for w in weights])
    for t in range(1, len(losses) + 1):
        weights = [1.0] * k
        for j in range(k):
            influence = 0.0
            for i in range(k):
                recent = sum(losses[s][i] for s in range(max(0, t - window), t))
                influence += graph[j][i] * recent
            weights[j] *= math.exp(eta * influence)
        rounds.append([w / sum(weights) for w in weights])
    return rounds


def original_doremi(batches, k, eta, c, never_seen):
    """As released: batches[t][j] lists (proxy loss, reference loss) per token, and is empty if
    group j is not in batch t."""
    alpha, score, history, running = [1 / k] * k, [never_seen] * k, [], [0.0] * k
    for batch in batches:
        for j, tokens in enumerate(batch):
            if tokens:
                clipped = [max(proxy - reference, 0.0) for proxy, reference in tokens]
                score[j] = sum(clipped) / len(tokens)
        alpha = [alpha[j] * math.exp(eta * score[j]) for j in range(k)]
        alpha = [a / sum(alpha) for a in alpha]
        alpha = [(1 - c) * a + c / k for a in alpha]
        history.append(alpha)
        running = [r + a for r, a in zip(running, alpha)]
    return history, [r / len(batches) for r in running]


def original_doge(steps, lrs, k, mu, max_norm=1.0, cap=5.0, stale=False):
    """As released: steps[t] = (gradient of each group or None, gradient of the target batch).

    stale: a group that is not in the batch keeps its last gradient; else it counts as 0."""
    def norm(g):
        return math.sqrt(sum(x * x for x in g))

    def clipped(g):
        return [x * min(1.0, max_norm / norm(g)) for x in g] if norm(g) > 0 else list(g)

    log_alpha, history, running = [math.log(1 / k)] * k, [], [0.0] * k
    known = [[0.0] * len(steps[0][1])] * k
    for (grads, target), lr in zip(steps, lrs):
        target, absent = clipped(target), [0.0] * len(target)
        for j, g in enumerate(grads):
            if g is not None:
                known[j] = clipped(g)
            elif not stale:
                known[j] = absent
        grads = known
        mean_norm = sum(norm(g) for g in grads) / k
        scores = []
        for g in grads:
            score = lr * sum(x * y for x, y in zip(g, target)) / (mean_norm + 1e-6)
            scores.append(min(max(score, 0.0), cap * lr))
        log_alpha = [a + s / mu for a, s in zip(log_alpha, scores)]
        top = max(log_alpha)
        alpha = [math.exp(a - top) for a in log_alpha]
        alpha = [a / sum(alpha) for a in alpha]
        log_alpha = [math.log(a) for a in alpha]
        history.append(alpha)
        running = [r + a for r, a in zip(running, alpha)]
    return history, [r / len(steps) for r in running]


def original_grape(steps, losses, k, mu_train, mu_tgt, eps):
    """Two players: steps[t] = (gradient of each group or None, of each target), losses[t] before.

    As released, with the mean over draws at alpha and z in place of a draw."""
    def dot(x, y):
        return sum(a * b for a, b in zip(x, y))

    def mean(weights, vectors):
        return [dot(weights, column) for column in zip(*vectors)]

    def softmax(logs):
        weights = [math.exp(x - max(logs)) for x in logs]
        return [w / sum(weights) for w in weights]

    alpha, z, trained = [1 / k] * k, [1 / k] * k, []
    for (grads, targets), loss in zip(steps, losses):
        grads = [g or [0.0] * len(targets[0]) for g in grads]
        of_log = [[x / loss[n] for x in g] for n, g in enumerate(targets)]
        train = mean(alpha, grads)
        z = softmax([math.log(z[n]) - mu_tgt * dot(of_log[n], train) for n in range(k)])
        z = [w * (1 - eps) + eps / k for w in z]
        target = mean(z, of_log)
        alpha = softmax([math.log(alpha[j]) + mu_train * dot(grads[j], target) for j in range(k)])
        trained.append(alpha)
    return trained


def original_aioli(losses, order, k, f, sweeps, probe_steps, eta, rounds, ema, perplexity):
    """Aioli's Algorithms 1 and 2: average the drops per probe, solve with P, normalise, and step.

    losses(mixture, steps) trains and validates; order(round) lists the probed groups of one round.
    """
    P = np.full((k, k), (1 - f) / (k - 1))
    np.fill_diagonal(P, f)
    p, blend, previous, trained = [1 / k] * k, None, losses([1 / k] * k, 0), []
    for t in range(rounds):
        G = np.zeros((k, k))
        for j in order(t):
            now = losses(list(P[j]), probe_steps)
            for i in range(k):
                G[i, j] += (previous[i] - now[i]) / sweeps
            previous = now
        A = np.array([np.linalg.solve(P, G[i, :]) for i in range(k)])
        if perplexity:                                      # d exp(L_i) = exp(L_i) d L_i
            A = np.array([math.exp(previous[i]) * A[i, :] for i in range(k)])
        if A.min() < 0:
            A = A - A.min()
        A = A / A.sum()
        if ema:
            blend = A if blend is None else (1 - ema) * A + ema * blend
            weights = [math.exp(eta * sum(blend[:, j])) for j in range(k)]
        else:
            weights = [p[j] * math.exp(eta * sum(A[:, j])) for j in range(k)]
        p = [w / sum(weights) for w in weights]
        previous = losses(p, None)
        trained.append(p)
    return trained


def original_unimax(counts, budget, epochs):
    """Algorithm 1 of UniMax: from the smallest group on, an equal part of what is left of the
    budget, or as much as `epochs` passes hold; the shares of what was given out."""
    order = sorted(range(len(counts)), key=lambda j: counts[j])
    left, given = budget, [0.0] * len(counts)
    for rank, j in enumerate(order):
        part = left / (len(counts) - rank)
        given[j] = counts[j] * epochs if part > counts[j] * epochs else part
        left -= given[j]
    return [amount / sum(given) for amount in given]


@given(st.data(), st.floats(.1, 20), st.integers(1, 5000), st.integers(1, 64), st.integers(1, 2048))
def test_unimax_is_the_algorithm_of_its_paper(data, epochs, steps, batch, window):
    """For any budget, also one that all text together cannot fill."""
    m = data.draw(sizes)
    n = steps * batch * window / epochs * 10.0 ** rng_of(data.draw(seeds)).uniform(-3, .5, m)
    h = history(m, batch, n, window=window)
    drive(aioli.unimax(h, steps, epochs=epochs), Scripted(), h)
    same(h.last.request.p, original_unimax(n.tolist(), steps * batch * window, epochs), 0, 1e-10)
    assert steps_of(h) == {"main": steps}


def test_unimax_needs_to_know_how_many_tokens_a_window_has():
    with pytest.raises(ValueError, match=r"say how many a window has, History\(window=...\)"):
        next(aioli.unimax(history(2, window=None), 10))


@st.composite
def probings(draw):
    """(m, f, sweeps, probe, batch, seed) that LearnParams accepts: whole windows, and any probed
    group with the most of them."""
    m, f = draw(sizes), draw(st.floats(.15, 1))
    probe, batch = draw(st.integers(1, 6)), draw(st.integers(1, 16))
    try:
        counts = probe_counts(range(m), m, f, probe * batch)
    except ValueError:
        assume(False)
    assume(np.linalg.cond(counts / (probe * batch)) < 1e3)
    return m, f, draw(st.integers(1, 4)), probe, batch, draw(seeds)


@given(st.data(), st.integers(1, 6), st.floats(.01, 3))
def test_skill_it_is_the_released_algorithm(data, window, eta):
    """Graph from relative drops of single-group runs, a window, a restart from ones, the first
    mixture from the graph alone."""
    G = data.draw(matrices(scale=.2))
    L, L0 = data.draw(tables(m=len(G))), data.draw(tables(1, len(G)))[0]
    original = original_skillit(G.T.tolist(), L0.tolist(), L.tolist(), eta, window)
    same(skillit_weights(G, L, L0, eta=eta, window=window), original)


def test_skill_its_losses_are_one_round_fresher_than_those_of_the_release():
    """The release validates after the first step of a round, where the last round left the model:
    with a window of one round its mixtures come a round late; with three, shares are .14 apart."""
    G, before = np.array([[.6, .05], [.1, .3]]), [7., 7.]
    L = np.array([[2., 6.], [1.5, 6.], [1.5, 6.], [1.5, 6.]])
    late = [before, *L[:-1].tolist()]
    ours = skillit_weights(G, L, before, eta=.2, window=1)
    same(original_skillit(G.T.tolist(), before, late, .2, 1)[2:], ours[1:-1])

    ours = skillit_weights(G, L, before)
    release = original_skillit(G.T.tolist(), before, late, .2, 3)
    assert np.abs(ours - release).max() == pytest.approx(.14, abs=.005)


@st.composite
def token_losses(draw, all_seen_at_first):
    """(batches, k): batches[t][j] lists token losses of proxy and reference, and may be empty."""
    k, rng = draw(sizes), rng_of(draw(seeds))
    batches = []
    for t in range(draw(st.integers(1, 12))):
        present = (rng.uniform(size=k) < .7) | (all_seen_at_first and t == 0)
        present[t % k] |= not present.any()                     # no batch is empty
        lengths = rng.integers(1, 9, k) * present
        batches.append([list(zip(rng.normal(3, 1, n), rng.normal(2.8, 1, n))) for n in lengths])
    return batches, k


def excess_of(batches):
    """What the trainer says of them: mean of the clipped excess per token, NaN where absent."""
    def excess(tokens):
        return np.mean([max(a - b, 0) for a, b in tokens]) if tokens else np.nan
    return [list(map(excess, batch)) for batch in batches]


@given(token_losses(all_seen_at_first=True), st.sampled_from([.01, 1., 3.]),
       st.sampled_from([0, 1e-3, .1]))
def test_doremi_is_the_released_algorithm(drawn, eta, c):
    """Token clip, stale scores of absent groups, smoothing, average of all updated weights."""
    batches, k = drawn
    w, average = original_doremi(batches, k, eta, c, never_seen=math.log(50304))
    found, main = doremi_weights(excess_of(batches), eta=eta, smoothing=c)
    same(found, w)
    same(main, average)


@given(token_losses(all_seen_at_first=False))
def test_doremi_gives_a_group_that_it_has_not_seen_yet_no_score(drawn):
    """The release starts such groups at log V: see the next test."""
    batches, k = drawn
    w, average = original_doremi(batches, k, 1., 1e-3, never_seen=0.)
    found, main = doremi_weights(excess_of(batches))
    same(found, w)
    same(main, average)


def test_the_release_of_doremi_throws_the_weight_at_a_group_that_the_first_batch_lacks():
    """As its score is log V until then; the next batch that has the group does not undo it."""
    batches = [[[(3.2, 3.)], []], [[(3.2, 3.)], [(3.1, 3.)]]]
    release, _ = original_doremi(batches, 2, 1., 1e-3, never_seen=math.log(50304))
    ours, _ = doremi_weights(excess_of(batches))
    same(ours[0, 1], .999 / (1 + math.exp(.2)) + 1e-3 / 2)
    assert min(release[0][1], release[1][1]) > .99 and ours.max() < .6


@st.composite
def gradients(draw, absent):
    """[(G, V)]: gradients of k groups, (k, d), NaN rows absent, and of k targets, at several
    scales; and learning rates."""
    k, rng, T = draw(sizes), rng_of(draw(seeds)), draw(st.integers(1, 12))
    rounds = []
    for _ in range(T):
        V = rng.normal(size=(k, 5)) * 10.0 ** rng.uniform(-1, 1)
        G = (rng.normal(size=(k, 5)) + V.mean(0)) * 10.0 ** rng.uniform(-2, 1, (k, 1))
        if absent:
            G[1:][rng.uniform(size=k - 1) < .3] = np.nan        # no batch is empty
        rounds.append((G, V))
    return rounds, (10.0 ** rng.uniform(-4, -2, T) * rng.integers(0, 5, T).clip(max=1)).tolist()


def longhand(rounds):
    """Such rounds as lists, with None for absent groups, and the mean target."""
    found = []
    for G, V in rounds:
        grads = [None if np.isnan(g).any() else g.tolist() for g in G]
        found.append((grads, V.mean(0).tolist()))
    return found


@given(gradients(absent=False), st.sampled_from([.01, .05]), st.sampled_from([.5, 5.]))
def test_doge_is_the_released_algorithm(drawn, mu, cap):
    """Clipped gradients, norm, learning rate, cut scores, average; the mean target gradient."""
    rounds, lrs = drawn
    k = len(rounds[0][0])
    w, average = original_doge(longhand(rounds), lrs, k, mu, cap=cap)
    found, main = doge_weights([gradient_signals(G, V) for G, V in rounds], lrs, mu=mu, cap=cap)
    same(found, w)
    same(main, average)


@given(gradients(absent=True))
def test_doge_counts_the_gradient_of_an_absent_group_as_zero(drawn):
    """In score and in mean norm, as Aioli's port does; the release keeps the last gradient."""
    rounds, lrs = drawn
    k = len(rounds[0][0])
    w, average = original_doge(longhand(rounds), lrs, k, .05)
    found, main = doge_weights([gradient_signals(G, V) for G, V in rounds], lrs)
    same(found, w)
    same(main, average)


def test_the_release_of_doge_lets_an_absent_group_keep_its_last_gradient():
    """So its weight moves on as before; where no group is absent, nothing differs."""
    G, V = np.eye(2), np.array([[1., .5], [1., .5]])
    rounds = [(G, V), (np.array([[1., 0.], [np.nan, np.nan]]), V)]
    release, _ = original_doge(longhand(rounds), [3e-3] * 2, 2, .05, stale=True)
    ours, _ = doge_weights([gradient_signals(G, V) for G, V in rounds], [3e-3] * 2)
    same(ours[0], release[0])
    differ(ours[1], release[1], .005)


@given(gradients(absent=True), seeds, st.sampled_from([.1, 1.5]), st.sampled_from([0., 5.]),
       st.sampled_from([0., 1e-3, .3]))
def test_grape_is_the_game_of_its_paper(drawn, seed, eta, robust, smoothing):
    """Both players, gradients of log losses; a group that is not in the batch counts as 0."""
    rounds = [(G / np.nanmax(abs(G)), V / abs(V).max()) for G, V in drawn[0]]
    k = len(rounds[0][0])
    losses = rng_of(seed).uniform(1, 9, (len(rounds) + 1, k))
    steps = [(grads, V.tolist()) for (grads, _), (_, V) in zip(longhand(rounds), rounds)]
    original = original_grape(steps, losses.tolist(), k, eta, robust, smoothing)
    found = grape_mixtures([gradient_signals(G, V) for G, V in rounds], losses, eta=eta,
                           robust=robust, smoothing=smoothing)
    same(found, original, 0, 1e-10)


def test_grape_peeks_in_the_run_and_trains_on_none_of_it():
    h = run("grape", 100, rounds=10)
    assert [type(row.request) for row in h.rows] == [Train] + [Peek, Train] * 10
    assert {row.request.on for row in h.rows} == {"main"} and steps_of(h) == {"main": 100}


@pytest.mark.parametrize("losses", [[0, 5], [-5, 5]])
def test_grape_needs_losses_above_0(losses):
    h = history(2)
    with pytest.raises(ValueError, match="^grape needs losses above 0, not a "):
        drive(aioli.grape(h, 100), Scripted([losses]), h)


@given(st.data(), st.sampled_from([0., .1, .5]), st.sampled_from([(.75, 1), (.75, 2), (.5, 4)]),
       st.sampled_from([.1, 1.]), st.sampled_from(["loss", "perplexity"]))
def test_aioli_is_the_algorithm_of_its_paper(data, ema, probing, eta, objective):
    """Algorithms 1 and 2, in a world that turns and drifts: average the drops, solve with P,
    normalise, step or blend. The only freedom is the order of the probes, so it is given ours."""
    m, (f, sweeps), rounds = data.draw(st.integers(3, 6)), probing, 3
    A, turn = data.draw(matrices(m, scale=1e-3)), data.draw(matrices(m, scale=1e-4))
    world = Linear(A, batch=4 * (m - 1), turn=turn, drift=1e-3)
    h = aioli_on(A, rounds * 5 * sweeps * m, world=world, rounds=rounds, f=f, sweeps=sweeps,
                 ema=ema, eta=eta, objective=objective)
    requests = [row.request for row in h.trained()]
    probed = [int(request.p.argmax()) for request in requests if request.probe]
    rest = [request.steps for request in requests if request.A is not None]
    again = Linear(A, batch=4 * (m - 1), turn=turn, drift=1e-3)

    def losses(p, steps):
        return again(Train(np.array(p), rest.pop(0) if steps is None else steps))["loss"]

    def order(t):
        return probed[t * sweeps * m:(t + 1) * sweeps * m]
    original = original_aioli(losses, order, m, f, sweeps, 4, eta, rounds, ema,
                              objective == "perplexity")
    same(mixtures_of(h), original, rtol=1e-7)


SCRIPTS = [(2, 5000, 20, .2, .1, .625, 4, 4), (3, 5000, 20, .1, .5, .5, 4, 6),
           (7, 40_000, 200, 1., .1, .75, 2, 10)]


@pytest.mark.parametrize("m, steps, rounds, eta, ema, f, sweeps, probe", SCRIPTS)
def test_published_settings_are_those_of_the_papers_scripts(
        m, steps, rounds, eta, ema, f, sweeps, probe):
    """Of each of its three numbers of groups; --ema is an option of the release."""
    settings = dict(rounds=rounds, eta=eta, f=f, sweeps=sweeps, probe=probe)
    assert aioli.published(m, steps, ema=True) == settings | {"ema": ema}
    assert aioli.published(m, steps) == settings | {"ema": 0.}
    assert aioli.published(m, steps) == settings | {"ema": 0.}          # the table is as it was


def test_other_numbers_of_groups_have_the_settings_of_the_nearest():
    nearest = {1: 2, 4: 3, 6: 7, 8: 7, 20: 7}
    for m, known in nearest.items():
        ours, theirs = aioli.published(m, 4000, True), aioli.published(known, 4000, True)
        assert ours | {"rounds": 0} == theirs | {"rounds": 0}
    assert aioli.published(5, 4000) in (aioli.published(3, 4000), aioli.published(7, 4000))


def test_a_published_round_is_long_enough_for_the_probes_of_many_groups():
    for m in (11, 20, 24):
        h = history(m, 24)
        assert next(aioli.aioli_published(h, 4000)).steps == 0
        assert aioli.published(m, 4000)["rounds"] == 4000 // (20 * m)


@given(st.sampled_from([2, 3, 4, 6, 7, 10]), st.integers(1, 50_000))
def test_a_published_round_is_as_long_as_the_papers_and_there_is_at_least_one(m, steps):
    """Up to what a whole number of them leaves over."""
    rounds, long = aioli.published(m, steps)["rounds"], 250 if m < 6 else 200
    assert rounds >= 1
    assert rounds == 1 or long <= steps / rounds
    assert steps / rounds < 2 * long and (steps % long or steps == rounds * long)


@pytest.mark.parametrize("m, steps, percent", [(2, 5000, 13), (3, 5000, 29), (7, 40_000, 70)])
def test_published_aioli_spends_on_probes_what_its_docstring_says(m, steps, percent):
    h = history(m, 12)
    drive(aioli.aioli_published(h, steps), Exact(np.eye(m) * 1e-3, batch=12), h)
    probes = sum(row.request.steps for row in h.trained() if row.request.probe)
    assert steps_of(h) == {"main": steps} and round(100 * probes / steps) == percent


def test_the_ablations_have_the_settings_of_as_many_groups_as_they_train_on():
    A = np.random.default_rng(0).uniform(-.5, 1, (3, 3)) * 1e-3
    probes = dict(aioli_published=(6, 12, 2), aioli_static=(6, 12, 1), aioli_diagonal=(6, 12, 2),
                  aioli_ood=(4, 8, 2))
    for method, (steps, count, rounds) in probes.items():
        requests = [row.request for row in aioli_on(A, 500, METHODS[method]).trained()]
        probed = [request.steps for request in requests if request.probe]
        assert probed == [steps] * count * rounds
        assert sum(request.A is not None for request in requests) == rounds


@settings(max_examples=10)
@pytest.mark.parametrize("m, steps, rounds, eta, ema, f, sweeps, probe", SCRIPTS)
@given(data=st.data(), averaging=st.booleans(), objective=st.sampled_from(["loss", "perplexity"]))
def test_published_aioli_is_the_paper_with_its_settings(
        m, steps, rounds, eta, ema, f, sweeps, probe, data, averaging, objective):
    """To the last digits, over three rounds and a bit, in a world that turns and rounds nothing."""
    A, turn = data.draw(matrices(m, scale=1e-2)), data.draw(matrices(m, scale=1e-3))
    steps = 3 * steps // rounds + data.draw(st.integers(0, 100))
    world, again = (Exact(A, batch=12, turn=turn, drift=1e-3) for _ in range(2))
    h = aioli_on(A, steps, aioli.aioli_published, world, batch=12, ema=averaging,
                 objective=objective)
    requests = [row.request for row in h.trained()]
    probed = [int(request.p.argmax()) for request in requests if request.probe]
    ends = [steps * t // 3 for t in range(4)]
    rest = [b - a - sweeps * probe * m for a, b in zip(ends, ends[1:])]

    def losses(p, steps):
        return again(Train(np.array(p), rest.pop(0) if steps is None else steps))["loss"]

    def order(t):
        return probed[t * sweeps * m:(t + 1) * sweeps * m]
    original = original_aioli(losses, order, m, f, sweeps, probe, eta, 3, ema if averaging else 0,
                              objective == "perplexity")
    same(mixtures_of(h), original, rtol=0, atol=1e-12)


@given(st.data(), st.integers(1, 6), st.floats(0, 3))
def test_the_control_weighs_by_perplexity_round_by_round(data, rounds, eta):
    """Each share times exp(eta exp(L_j) / sum of those), with the losses that it last saw."""
    L = data.draw(tables(rounds + 1, low=.1))
    m = L.shape[1]
    h = history(m)
    program = aioli.perplexity_weighted(h, 10 * rounds, rounds=rounds, eta=eta)
    drive(program, Scripted(losses=list(L)), h)
    weights, expected = [1 / m] * m, []
    for seen in L[:-1]:
        total = sum(math.exp(loss) for loss in seen)
        weights = [w * math.exp(eta * math.exp(loss) / total) for w, loss in zip(weights, seen)]
        weights = [w / sum(weights) for w in weights]
        expected.append(weights)
    same(mixtures_of(h), expected)
    assert [row.request.steps for row in h.trained()] == [0] + [10] * rounds


@given(sizes, st.integers(1, 9), st.floats(.1, 9), st.floats(0, 9))
def test_the_control_with_equal_losses_is_stratified(m, rounds, loss, eta):
    h = history(m)
    program = aioli.perplexity_weighted(h, 30, rounds=rounds, eta=eta)
    drive(program, Scripted(losses=[np.full(m, loss)] * (rounds + 1)), h)
    same(mixtures_of(h), 1 / m)


def exploration(k, t):
    """ODM's least share at step t."""
    return min(1 / k, math.sqrt(math.log(k) / (k * t)))


def original_odm(losses, k, alpha):
    """Algorithm 1 of ODM, where every group is drawn every time: rewards L / p, a softmax."""
    reward, before, trained = [0.0] * k, 1 / k, []
    for t, seen in enumerate(losses, start=1):
        now = exploration(k, t)
        weights = [math.exp(before * r) for r in reward]
        p = [(1 - k * now) * w / sum(weights) + now for w in weights]
        trained.append(p)
        for i in range(k):
            reward[i] = alpha * reward[i] + (1 - alpha) * seen[i] / p[i]
        before = now
    return trained


def original_odm_released(losses, k, smoothing, later):
    """As released for mixed batches, from the second mixture on: rewards exp(L), proportional.

    later: what is added to the release's count of steps, which begins at 1."""
    estimate, trained, before = [0.0] * k, [], 1 / k
    for iteration, seen in enumerate(losses, start=1 + later):
        now = exploration(k, iteration)
        for i in range(k):
            estimate[i] = smoothing * estimate[i] + (1 - smoothing) * math.exp(seen[i])
        scale = (1 - k * now) / sum(r * before for r in estimate)
        weights = [r * before * scale + now for r in estimate]
        trained.append([w / sum(weights) for w in weights])
        before = now
    return trained


def odm_mixtures(L, **settings):
    """(rounds, m), for losses (rounds, m) after each round."""
    h = history(len(L[0]))
    drive(aioli.odm(h, 3 * len(L), rounds=len(L), **settings), Scripted(losses=list(L)), h)
    return mixtures_of(h)


@given(st.data(), st.integers(2, 60), st.floats(0, .99))
def test_odm_is_the_algorithm_of_its_paper_and_released_that_of_the_release(data, rounds, ema):
    L = data.draw(tables(rounds, low=.1))
    k = L.shape[1]
    same(odm_mixtures(L, ema=ema), original_odm(L.tolist(), k, ema), 0, 1e-10)
    released = odm_mixtures(L, ema=ema, released=True)
    original = original_odm_released(L[:-1].tolist(), k, ema, later=1)
    same(released, [[1 / k] * k, *original], 0, 1e-10)


def test_the_release_of_odm_explores_as_a_step_before():
    L = np.tile([3., 1.], (9, 1))
    release = original_odm_released(L[:-1].tolist(), 2, .9, later=0)[1:]
    ours = odm_mixtures(L, released=True)[2:]
    then, now = (np.array([[exploration(2, t)] for t in range(s, s + 7)]) for s in (2, 3))
    same((ours - now) / (1 - 2 * now), (release - then) / (1 - 2 * then))
    differ(ours, release, .01)


@given(st.data(), st.booleans())
def test_odm_keeps_every_group_above_its_floor_and_begins_uniform(data, released):
    L = data.draw(tables(40, low=.1))
    p, k = odm_mixtures(L, released=released), L.shape[1]
    floors = [exploration(k, t) for t in range(1, 41)]
    assert (p.min(1) >= np.array(floors) - 1e-12).all()
    same(p[:int(k * math.log(k))], 1 / k)


@settings(max_examples=5)
@given(st.data())
def test_odm_as_published_goes_back_to_uniform_while_the_release_keeps_to_the_losses(data):
    """The losses do not change at all, and differ by at least a nat."""
    k, T = data.draw(st.integers(2, 5)), 2000
    L = rng_of(data.draw(seeds)).uniform(1, 4, k)
    L[:2] = 1, 5
    p = np.log(odm_mixtures(np.tile(L, (T, 1))))
    bound = np.array([k * exploration(k, t) * np.ptp(L) for t in range(1, T)])
    assert (np.ptp(p[1:], axis=1) <= bound * (1 + 1e-9)).all()
    assert np.ptp(p[-1]) < .4 and np.ptp(p[-1]) < np.ptp(p[T // 10]) / 2

    q = odm_mixtures(np.tile(L, (T, 1)), released=True)
    floor = exploration(k, T)
    same((q[-1] - floor) / (1 - k * floor), softmax(L))


@given(st.data(), st.floats(-2, 5))
def test_a_shift_of_all_losses_matters_to_odm_as_published_and_not_to_the_release(data, shift):
    """What the release adds up are perplexities, and a factor on them is divided out."""
    L = data.draw(tables(30, data.draw(st.integers(2, 4)), low=3))
    same(odm_mixtures(L + shift, released=True), odm_mixtures(L, released=True))
    assume(abs(shift) > .5)
    differ(odm_mixtures(L + shift), odm_mixtures(L), 1e-4)


@given(st.data(), probings())
def test_the_diagonal_ablation_divides_each_groups_own_fall_by_its_share(data, probing):
    """A_jj = G_jj / f and zeros elsewhere, f as realised in whole windows, in a turning world."""
    m, f, sweeps, probe, batch, seed = probing
    A, turn = data.draw(matrices(m, scale=1e-3)), data.draw(matrices(m, scale=1e-4))
    own = round(f * probe * batch) / (probe * batch)
    world, probes, falls = Linear(A, batch=batch, turn=turn), [], [[] for _ in range(m)]

    def spy(request):
        before, answer = world.runs.get("main"), world(request)
        if request.steps:
            matches = [np.allclose(counts, request.p * probe * batch) for counts in probes[0]]
            j = matches.index(True)
            falls[j].append((before - answer["loss"])[j])
        return answer

    def keep(*asked):
        probes.append(probe_counts(*asked))
        return probes[-1]
    with swapped(probe_counts=keep):
        found = measure(spy, m, f, sweeps, probe, batch, seed, diagonal=True)
    for j in range(m):
        same(found[j, j], np.mean(falls[j]) / own, atol=1e-10)
    assert not (found - np.diag(np.diag(found))).any()


# ---- ADO ----


def original_ado(laws, natural, T, start, length, of_p=False):
    """As released, step by step, given the laws (c, b, a) that the fits would find.

    length: steps for which the last preference and mixture are kept (the release: 1).  of_p: the
    running mean is of the mixtures."""
    k, mean, late, trained = len(natural), list(natural), list(natural), []
    p = list(natural)
    for itr in range(T):
        if itr >= start and itr % length == 0:
            slopes = [max(a, .05) * (c + b / itr ** a - c) / itr for c, b, a in laws]
            rho = [slopes[i] * natural[i] * late[i] ** .5 for i in range(k)]
            rho = [r / sum(rho) for r in rho]
            deficit = max(k * .01 - sum(rho), 0)
            clipped = [max(r * (1 - deficit) / sum(rho), .01) for r in rho]
            rho = [r / sum(clipped) for r in clipped]
            p = [.9 * mean[i] + .1 * rho[i] for i in range(k)]
        if itr >= start:
            weight, term = 1 / (itr + 1), p if of_p else rho
            mean = [(1 - weight) * mean[i] + weight * term[i] for i in range(k)]
        late = [.9 * late[i] + .1 * p[i] for i in range(k)]
        trained.append(p)
    return trained


class OwnLaws(Exact):
    """Losses that obey c + b n^-a, n the steps of the run so far, whatever is trained on."""

    def __init__(self, laws):
        super().__init__(np.zeros((len(laws), len(laws))))
        self.laws, self.steps = np.array(laws), 0

    def __call__(self, request):
        self.steps += request.steps
        c, b, a = self.laws.T
        return dict(loss=c + b * max(self.steps, .5) ** -a, windows=self.windows(request))


@st.composite
def own_laws(draw):
    """(c, b, a) of each group, a a multiple of .01; and natural shares, some below ADO's floor."""
    m, rng = draw(sizes), rng_of(draw(seeds))
    laws = np.column_stack((rng.uniform(.1, 3, m), rng.uniform(1, 9, m),
                            rng.integers(1, 81, m) / 100))
    natural = 10.0 ** rng.uniform(-2, 0, m)
    return laws.tolist(), (natural / natural.sum()).tolist()


def ado_on(laws, natural, T, **settings):
    h = history(len(laws), sizes=natural)
    drive(aioli.ado(h, T, **settings), OwnLaws(laws), h)
    return h


@given(own_laws(), st.integers(1, 4))
def test_ado_is_the_released_algorithm(drawn, length):
    """Given the law, which the fit finds; with a round a step, and with longer ones, through which
    the preference and the mixture stay."""
    laws, natural = drawn
    h = ado_on(laws, natural, 40 * length, rounds=40, wait=.25)
    original = original_ado(laws, natural, 40 * length, 10 * length, length)
    same(mixtures_of(h), original[::length], 0, 1e-10)


@given(own_laws())
def test_ado_finds_the_slope_of_a_law_of_its_own_losses(drawn):
    """-dL / d log n = a (L - c), at the end of every round; exponents below .05 count as that."""
    laws, natural = drawn
    c, b, a = np.array(laws).T
    for at, row in enumerate(ado_on(laws, natural, 40, rounds=40).trained()):
        if row.request.A is not None:
            same(row.request.A, np.diag(np.maximum(a, .05) * b * at ** -a), rtol=1e-6)


def test_the_mean_of_ados_mixtures_would_keep_it_where_it_began():
    """The release averages preferences: a mean of mixtures, of which it is .9 itself, stays."""
    laws, natural = [[1., 5., .5], [1., .5, .1]], [.5, .5]
    ends = [original_ado(laws, natural, 1000, 10, 1, of_p)[-1][0] for of_p in (False, True)]
    assert ends[0] > .85 and ends[1] < .72


@given(own_laws(), st.floats(0, 4), st.floats(.1, 3))
def test_neither_unit_nor_level_of_the_losses_matters_to_ado(drawn, shift, unit):
    """A shift is irreducible loss, and the solver is proportional."""
    laws, natural = drawn
    moved = [[unit * c + shift, unit * b, a] for c, b, a in laws]
    plain, changed = (mixtures_of(ado_on(L, natural, 40, rounds=20)) for L in (laws, moved))
    same(changed, plain, rtol=1e-6)


@given(own_laws())
def test_ado_with_equal_speeds_leaves_natural_for_its_power_of_one_and_a_half(drawn):
    """rho is then natural^1.5, scaled, as what was read of late is natural too."""
    laws, natural = drawn
    n = np.array(natural)
    p = mixtures_of(ado_on([laws[0]] * len(n), natural, 40, rounds=40, floor=0.))
    rho = n ** 1.5 / np.sum(n ** 1.5)
    same(p[:7], [natural] * 7)
    same(p[7], .9 * n + .1 * rho, rtol=1e-6)


def test_ado_where_nothing_is_learnt_stays_natural_and_refuses_losses_below_0():
    h = history(3)
    drive(aioli.ado(h, 100), Scripted([[3, 2, 4]] * 99), h)
    same(mixtures_of(h), [[1 / 6, 1 / 3, 1 / 2]] * 25)
    h = history(2)
    with pytest.raises(ValueError, match="^ado needs losses of 0 or more, not of -5"):
        drive(aioli.ado(h, 100), Scripted([[-5, 5]] * 99), h)


# ---- DML and the static methods ----


def log_linear(c, t):
    """The law, longhand: losses for the mixture p."""
    def law(p):
        return np.array([c[i] + math.exp(np.dot(t[i], p)) for i in range(len(c))])
    return law


def test_dml_ends_at_the_closed_form_optimum_of_the_law_that_made_the_losses():
    """For two groups p* = (k2 + b2 - b1 + ln(k2 / k1)) / (k1 + k2), cut to [0, 1]."""
    for k1, b1, k2, b2 in ((-2., 1., -1., .8),):
        t = [[k1 + b1, b1], [b2, k2 + b2]]
        h = history(2)
        drive(aioli.dml(h, 10), Static(log_linear([1.5, 2.0], t)), h)
        best = min(max((k2 + b2 - b1 + math.log(k2 / k1)) / (k1 + k2), 0), 1)
        same(h.last.request.p, [best, 1 - best], rtol=0, atol=2e-4)


def original_olmix(t, prior, kl, caps):
    """min mean_k exp(t_k . p) + kl sum_j p_j log(p_j / prior_j) under p <= caps, by small steps of
    mirror descent, each cut to the caps by a bisection for the factor of the others."""
    p, n, m = list(prior), len(t), len(prior)
    for _ in range(1500):
        heights = [math.exp(sum(a * b for a, b in zip(row, p))) / n for row in t]
        slopes = [sum(heights[k] * t[k][j] for k in range(n)) for j in range(m)]
        raw = [p[j] ** (1 - .3 * kl) * prior[j] ** (.3 * kl) * math.exp(-.3 * slopes[j])
               for j in range(m)]
        low, high = 0.0, 1e9
        for _ in range(100):
            C = (low + high) / 2
            fills = sum(min(cap, C * x) for cap, x in zip(caps, raw)) < 1
            low, high = (C, high) if fills else (low, C)
        p = [min(cap, C * x) for cap, x in zip(caps, raw)]
    return p


@pytest.mark.parametrize("kl, epochs, prior", [
    (.05, 4., "natural"), (.5, 1.2, "natural"), (.05, 1.2, "uniform"), (1., 50., "1+2+3+4")])
def test_olmix_is_the_problem_of_its_paper(kl, epochs, prior):
    """A run of 6,400 tokens, of 6,000 that there are."""
    n, t = np.array([300., 900., 1800., 3000.]), rng_of(3).uniform(-1, .5, (4, 4)) - np.eye(4)
    shares = dict(natural=n / 6000, uniform=np.full(4, .25)).get(prior, np.arange(1, 5) / 10)
    law, h = aioli.LogLinear(np.ones(4), t), history(4, 8, n)
    with swapped(fit_log_linear=lambda P, L: law):
        drive(aioli.olmix(h, 50, kl=kl, epochs=epochs, mixture_prior=prior), Static(law), h)
    original = original_olmix(t.tolist(), shares, kl, epochs * n / 6400)
    same(h.last.request.p, original, 0, 1e-5)
    same(h.last.request.A, -t)


def test_olmix_of_a_run_that_is_too_long_is_natural_and_it_warns_where_it_leaves_the_runs():
    law, n = aioli.LogLinear(np.ones(2), np.array([[-5., 0.], [-5., 0.]])), np.array([100., 300.])
    with swapped(fit_log_linear=lambda P, L: law):
        h = history(2, 8, n)
        drive(aioli.olmix(h, 50), Static(law), h)
        same(h.last.request.p, [.25, .75])
        h = history(2, 8, n)
        with pytest.warns(UserWarning, match="proposes 1.000 of a, of which no run had .* 0.900"):
            drive(aioli.olmix(h, 50, epochs=1e6, kl=1e-3), Static(law), h)
    with pytest.raises(ValueError, match=r"say how many a window has, History\(window=...\)"):
        next(aioli.olmix(history(2, window=None), 10))


def original_regmix(P, L, prior, objective):
    """As released, with planes for its trees: predict draws around the prior, average the best 128;
    and as ours, above the least share of the runs, and none with more of a group than all runs."""
    m = len(prior)
    target = [sum(losses) / m for losses in L]
    if objective == "perplexity":
        target = [math.log(sum(math.exp(loss) for loss in losses)) for losses in L]
    slope = np.linalg.pinv(P) @ target
    floor = min(min(min(p) for p in P), 1 / (2 * m))
    most = [max(p[j] for p in P) for j in range(m)]
    kept = []
    for draw in np.random.default_rng(0).dirichlet(prior, 100_000).tolist():
        q = [floor + (1 - m * floor) * share for share in draw]
        if all(q[j] <= most[j] for j in range(m)):
            kept.append(q)
    kept += P.tolist()
    ranked = sorted(kept, key=lambda q: sum(q[j] * slope[j] for j in range(m)))
    return np.mean(ranked[:128], axis=0)


def by_regmix(law, m, seed=0, **asked):
    """-> its runs P (9, m), and what it proposes."""
    h = history(m, seed=seed)
    drive(aioli.regmix(h, 10, **asked), Static(law), h)
    *P, p = (row.request.p for row in h.rows)
    return np.array(P), p


@pytest.mark.parametrize("objective, asked, prior", [
    ("loss", "natural", [1 / 6, 1 / 3, 1 / 2]), ("perplexity", "uniform", [1 / 3] * 3),
    ("perplexity", "5+3+2", [.5, .3, .2])])
def test_regmix_is_the_search_of_its_release(objective, asked, prior):
    law = log_linear([1.5, 2., .1], [[-1.5, .3, 0], [.2, -.8, .1], [.5, .1, .3]])
    P, p = by_regmix(law, 3, objective=objective, mixture_prior=asked)
    same(p, original_regmix(P, [law(q) for q in P], prior, objective))


@settings(max_examples=5)
@given(m=st.integers(2, 7), seed=st.integers(1, 10 ** 6))
def test_regmix_stays_where_runs_have_been_and_finds_the_same_again(m, seed):
    """Whatever the seed of the run."""
    law = log_linear(np.ones(m), rng_of(seed).normal(0, 1, (m, m)))
    P, p = by_regmix(law, m)
    assert (p <= P.max(0)).all() and p.min() >= P.min()
    assert np.array_equal(by_regmix(law, m, seed)[1], p)


def test_where_no_draw_is_where_runs_have_been_regmix_proposes_a_run():
    P = aioli.cover(3, 9, rng_of(0))
    p = aioli.search(P, 3 - P, prior=[1 - 1e-9, 5e-10, 5e-10], weights=[1, 0, 0])
    same(p, P[P[:, 0].argmax()])
    with pytest.raises(ValueError, match="a weight below 0 is for losses"):
        aioli.search(P, 3 - P, np.ones(3) / 3, "perplexity", [1, -1, 0])


def test_regmix_warns_where_its_trees_tell_no_mixtures_apart():
    """And proposes about what its draws are around, without a group that stands out."""
    with pytest.warns(UserWarning, match="^the trees predict 2 for all of .* as 9 runs give them"):
        _, p = by_regmix(lambda p: np.full(2, 2.), 2, mixture_prior="uniform")
    same(p, [.5, .5], 0, .08)


@pytest.mark.parametrize("name, method", [
    ("torch", aioli.dml), ("torch", aioli.power), ("torch", aioli.olmix),
    ("lightgbm", aioli.regmix)])
def test_a_law_that_a_package_fits_refuses_to_begin_without_it(name, method, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"^fitting this law needs {name}: pip install {name}$"):
        next(method(history(3), 10))


@pytest.mark.parametrize("runs, leaf, in_bin", [(2, 1, 1), (9, 1, 1), (50, 2, 2), (512, 20, 3),
                                                (900, 20, 3)])
def test_leaves_are_those_of_regmix_where_runs_are_many(runs, leaf, in_bin):
    """Its defaults of LightGBM are 20 runs in a leaf, 3 in a bin."""
    P = aioli.cover(3, 2, rng_of(0))[np.arange(runs) % 2]
    law = aioli.fit_trees(P, 3 - P[:, :2])
    same(law(P), 3 - P[:, :2])
    asked = sys.modules["lightgbm"].asked
    assert (asked["min_data_in_leaf"], asked["min_data_in_bin"]) == (leaf, in_bin)
    assert (asked["learning_rate"], asked["trees"]) == (.01, 1000)


def test_with_the_real_lightgbm(monkeypatch):
    """Nine runs are learnt by heart, and the proposal is in the box of the best of them; with 20
    runs in a leaf nothing is learnt of them; of 200 runs the best are found, twice the same."""
    monkeypatch.delitem(sys.modules, "lightgbm")
    lightgbm = pytest.importorskip("lightgbm")
    law = log_linear([1.5, 2., .1], [[-1.5, .3, 0], [.2, -.8, .1], [.5, .1, -.9]])
    P, p = by_regmix(law, 3)
    L = np.array([law(q) for q in P])
    same(aioli.fit_trees(P, L)(P), L, 0, 2e-3)
    same(aioli.fit_trees(P, L.mean(1, keepdims=True))([p]), [[L.mean(1).min()]], 0, 1e-4)

    usual = lightgbm.train(dict(verbosity=-1), lightgbm.Dataset(P, L[:, 0]), 100)
    assert not np.ptp(usual.predict(P))
    with pytest.warns(UserWarning, match="as 2 runs give them nothing"):
        aioli.search(P[[0, 0]], L[[0, 0]], np.ones(3) / 3)

    P = rng_of(0).dirichlet(np.ones(3), 200)
    L = np.array([law(q) for q in P])
    found = [aioli.search(P, L, np.ones(3) / 3, draws=10_000) for _ in range(2)]
    assert np.array_equal(*found)
    assert law(found[0]).mean() < np.quantile(L.mean(1), .02)


@pytest.mark.parametrize("method", ["dml", "power"])
def test_a_static_method_is_as_good_as_the_best_of_a_fine_grid(method):
    """A grid of mixtures is the original's optimiser; three groups, 9 or 24 runs, an exact law."""
    rng = rng_of(1)
    t = rng.uniform(-.4, .4, (3, 3)) + np.diag([.4, .8, .6]) - 2 * np.diag([.8, 1.2, .9])
    a = np.array([[.9, .2, .1], [.3, 1.2, .1], [.1, .2, .8]])
    laws = dict(dml=log_linear([1.2, 1.8, 1.5], t.tolist()),
                power=lambda p: 1.5 + 1 / (.4 + a @ p ** .6))
    h = history(3)
    drive(METHODS[method](h, 10, dict(dml=9, power=24)[method]), Static(laws[method]), h)
    n = 60
    lattice = [np.array([a, b, n - a - b]) / n for a in range(n + 1) for b in range(n + 1 - a)]
    P = np.array([row.request.p for row in h.rows[:-1]])            # it stays where runs have been
    inside = [p for p in lattice if (p <= P.max(0)).all() and p.min() >= P.min()]
    best = min(laws[method](p).mean() for p in inside)
    assert laws[method](h.last.request.p).mean() <= best + 1e-4


# ---- exact recovery ----


@given(st.data(), probings())
def test_learn_params_returns_A_exactly_when_the_law_is_linear(data, probing):
    """For any order of the probes, sweeps, f and batch; shares are the realised whole windows."""
    m, f, sweeps, probe, batch, seed = probing
    A = data.draw(matrices(m, scale=1e-3))
    same(measure(Linear(A), m, f, sweeps, probe, batch, seed), probe * A, rtol=0, atol=1e-10)


def test_nominal_shares_would_not_return_A():
    """As the release does, with the shares asked for; 8 windows of 7 groups cannot hold them."""
    A = np.random.default_rng(3).uniform(-.5, 1, (7, 7)) * 1e-3
    counts = probe_counts(range(7), 7, .75, 8)
    drops = A @ (counts / 8).T
    nominal = np.full((7, 7), .25 / 6) + (.75 - .25 / 6) * np.eye(7)
    assert np.abs(np.linalg.solve(nominal, drops.T).T - A).max() > 1e-5
    same(measure(Linear(A), 7, .75, 1, 1, 8), A, atol=1e-12)


@given(st.data(), probings())
def test_averaging_the_drops_of_each_probe_and_solving_is_least_squares(data, probing):
    """The paper's recipe on the same drops, in a world that turns: no answer is exact there."""
    m, f, sweeps, probe, batch, seed = probing
    A, turn = data.draw(matrices(m, scale=1e-3)), data.draw(matrices(m, scale=1e-4))
    drops, P = {}, {}
    world = Linear(A, batch=batch, turn=turn)

    def spy(request):
        before, answer = world.runs.get("main"), world(request)
        if request.steps:
            key = tuple(answer["windows"])
            drops.setdefault(key, []).append(before - answer["loss"])
            P[key] = answer["windows"] / answer["windows"].sum()
        return answer
    found = measure(spy, m, f, sweeps, probe, batch, seed)
    assert len(P) == m and {len(d) for d in drops.values()} == {sweeps}
    G = np.array([np.mean(drops[key], axis=0) for key in P])        # (m, m), a row per probe
    same(found, np.linalg.solve(np.array(list(P.values())), G).T, rtol=0, atol=1e-9)


@given(st.data(), probings())
def test_sweeps_there_and_back_return_the_A_of_the_middle_when_A_drifts(data, probing):
    """What drifts is A + turn * segment; for an even number of sweeps."""
    m, f, sweeps, probe, batch, seed = probing
    sweeps += sweeps % 2
    A, turn = data.draw(matrices(m, scale=1e-3)), data.draw(matrices(m, scale=1e-3))
    middle = A + turn * (sweeps * m - 1) / 2
    found = measure(Linear(A, turn=turn), m, f, sweeps, probe, batch, seed)
    same(found, probe * middle, rtol=0, atol=1e-9)


class AnyOrder(list):
    """An order of n groups whose reverse is another draw."""

    def __init__(self, rng, n):
        super().__init__(rng.permutation(n))
        self.rng = rng

    def __getitem__(self, key):
        return AnyOrder(self.rng, len(self))


def test_sweeps_in_random_orders_do_not():
    """The paper draws each sweep's order anew: a drift of A then stays in the estimate."""
    A = rng_of(0).uniform(-.5, 1, (4, 4)) * 1e-3
    turn = rng_of(1).uniform(-.5, 1, (4, 4)) * 1e-3
    middle = 4 * (A + turn * (2 * 4 - 1) / 2)
    same(measure(Linear(A, turn=turn), 4), middle, atol=1e-10)

    h, world = history(4, 12), Linear(A, turn=turn, batch=12)
    h.rng = SimpleNamespace(permutation=functools.partial(AnyOrder, rng_of(5)))
    h.add(Train(h.uniform, 0), **world(Train(h.uniform, 0)))
    found = drive(aioli.learn_params(h, np.arange(4)), world, h)
    probed = [int(row.request.p.argmax()) for row in h.trained() if row.request.probe]
    assert probed[4:] != probed[:4][::-1] and sorted(probed) == sorted(2 * list(range(4)))
    assert np.abs(found - middle).max() > 1e-4


@given(st.data(), st.integers(1, 4))
def test_groups_that_may_not_be_trained_on_are_not_and_have_no_column(data, absent):
    """As out of distribution: A over the others is exact."""
    A = data.draw(matrices(m=data.draw(st.integers(3, 8)), scale=1e-3))
    m = len(A)
    arms = np.sort(rng_of(data.draw(seeds)).permutation(m)[:max(2, m - absent)])
    trained_on = []
    world = Linear(A, batch=4 * (len(arms) - 1))

    def spy(request):
        if request.steps:
            trained_on.append(request.p)
        return world(request)
    found = measure(spy, m, arms=arms, batch=world.batch)
    same(found[:, arms], 4 * A[:, arms], atol=1e-11)
    others = np.setdiff1d(np.arange(m), arms)
    assert not found[:, others].any() and not np.array(trained_on)[:, others].any()


# ---- budgets ----

A4 = np.array([[3., .2, -.4, .3], [.1, 2., .5, -.2], [-.2, .3, 1., .4], [.6, -.1, .2, .8]]) * 1e-3
SWEEP = {f"sweep-{number}": 1 for number in range(9)}
EXTRA = dict(               # extra runs of the shipped methods, in full lengths, as documented
    stratified={}, fixed={}, natural={}, unimax={}, grid=SWEEP, dml=SWEEP, power=SWEEP,
    olmix=SWEEP, regmix=SWEEP,
    skillit={f"only-{group}": 1 for group in NAMES[:4]}, doremi=dict(reference=1, proxy=1),
    doge=dict(proxy=1), aioli_rounds={}, aioli_published={}, aioli_static={}, aioli_diagonal={},
    aioli_ood={}, perplexity_weighted={}, odm={}, grape={}, aioli={}, horizon={}, ado={})


def run(method, T, m=4, world=None, scratch=1.0, **settings):
    h = history(m, scratch=scratch)
    drive(METHODS[method](h, T, **settings), world or Linear(A4[:m, :m]), h)
    return h


def quickly():
    """The fits cut short: what they find does not matter to a budget."""
    def start(build, guess, P, L, *_):
        return build(np.array([next(iter(guess(P, y))) for y in L.T]))
    return swapped(fit=start)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(T=st.integers(330, 900), scratch=st.sampled_from([1., 1., 1 / 4, 1 / 7]))
def test_every_method_trains_the_main_run_for_exactly_T_steps(method, T, scratch):
    """And its scratch runs for as many as its docstring says, or for the share that is asked."""
    with quickly():
        h = run(method, T, scratch=scratch)
    steps = steps_of(h)
    assert steps.pop("main") == T
    if method in EXTRA:
        assert steps == {name: n * round(scratch * T) for name, n in EXTRA[method].items()}
    for p in [row.request.p for row in h.rows]:
        assert np.min(p) >= 0
        same(np.sum(p), 1)


@pytest.mark.parametrize("method", ["doremi", "doge"])
@pytest.mark.parametrize("scratch, n", [(1., 7), (.3, 2), (.01, 1)])
def test_a_proxy_knows_from_its_first_batch_how_long_it_will_be(method, scratch, n):
    """Its learning rate depends on it."""
    h = run(method, 7, scratch=scratch)
    asked = [row.request for row in h.rows if isinstance(row.request, Peek)]
    assert len(asked) == n and {request.total_steps for request in asked} == {n}
    same(h.last.request.p, weights_of(h).mean(0))


@given(st.integers(2, 4), st.integers(1, 9), st.integers(0, 500), st.integers(1, 3),
       st.integers(1, 5))
def test_aiolis_budget_is_exact_for_any_rounds_sweeps_and_probes(m, rounds, more, sweeps, probe):
    probing = dict(rounds=rounds, sweeps=sweeps, probe=probe)
    least, h = rounds * m * sweeps * probe, history(m)
    drive(aioli.aioli_rounds(h, least + more, **probing), Linear(A4[:m, :m]), h)
    assert steps_of(h) == {"main": least + more}
    probed = [row.request for row in h.trained() if row.request.probe]
    assert len(probed) == rounds * sweeps * m and {request.steps for request in probed} == {probe}
    assert len(mixtures_of(h)) <= rounds and len(h.rows) == 1 + rounds * (sweeps * m + 1)
    with pytest.raises(ValueError, match=f"raise --steps to {least}"):
        next(aioli.aioli_rounds(history(m), least - 1, **probing))


@given(st.integers(1, 2000), st.integers(1, 60))
def test_rounds_add_up_and_differ_by_one_step_at_most(steps, rounds):
    if rounds > steps:
        with pytest.raises(ValueError, match="cannot be cut"):
            aioli.split(steps, rounds)
    else:
        parts = aioli.split(steps, rounds)
        assert sum(parts) == steps and len(parts) == rounds and max(parts) - min(parts) <= 1


@given(st.integers(1, 60))
def test_doremi_and_doge_peek_and_update_once_a_step_at_the_uniform_mixture(T):
    for method in ("doremi", "doge"):
        h = run(method, T)
        verbs = [type(row.request) for row in h.rows if not isinstance(row.request, Train)]
        assert verbs == [Peek, Update] * T
        same([row.request.p for row in h.rows if isinstance(row.request, Peek)], .25)


@given(seeds)
def test_the_mixtures_of_a_sweep_do_not_depend_on_the_seed(seed):
    """So that grid, dml and power, and all their seeds, see the same runs."""
    found = []
    for s in (0, seed):
        h = history(3, seed=s)
        drive(aioli.grid(h, 5), Linear(A4[:3, :3]), h)
        found.append([row.request.p for row in h.rows])
    assert np.array_equal(*found)
    assert len({tuple(p) for p in found[0][:-1]}) == 9
    h = history(2)
    drive(aioli.grid(h, 5), Linear(A4[:2, :2]), h)
    same([row.request.p[0] for row in h.rows[:9]], np.arange(1, 10) / 10)


# ---- settings ----


def settings_of(method):
    """{setting: default} of a method's keyword arguments."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def outside(name):
    """Values of a setting that no method takes."""
    least, most = aioli.LIMITS[name]
    return least - 1, most + 1, np.nan, np.inf, -np.inf


LIMITED = [(method, name) for method in EXTRA for name, default in settings_of(method).items()
           if name in aioli.LIMITS and not isinstance(default, bool)]     # published --ema: on, off


def test_every_number_that_is_a_setting_has_limits():
    for method in EXTRA:
        numbers = {name for name, default in settings_of(method).items()
                   if isinstance(default, (int, float)) and not isinstance(default, bool)}
        assert numbers <= set(aioli.LIMITS)
    assert len(LIMITED) > 25


@pytest.mark.parametrize("method, name", LIMITED)
def test_a_setting_out_of_range_is_refused_before_the_first_request(method, name):
    """In one line that names the flag."""
    for value in outside(name):
        with pytest.raises(ValueError, match=f"^--{name} ") as refusal:
            next(METHODS[method](history(4), 1000, **{name: value}))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method, name", LIMITED)
def test_a_setting_out_of_range_is_refused_before_its_prior_trains(method, name):
    for value in outside(name):
        composed = aioli.with_prior(history(4), 2000, METHODS[method], aioli.grid, **{name: value})
        with pytest.raises(ValueError, match=f"^--{name} "):
            next(composed)


@pytest.mark.parametrize("method, name", LIMITED)
def test_a_setting_at_its_limits_is_not_out_of_range(method, name):
    """What comes of it may still be refused, but as a matter of steps, rounds or windows."""
    for value in aioli.LIMITS[name]:
        if np.isfinite(value):
            try:
                next(METHODS[method](history(4), 1000, **{name: value}))
            except ValueError as refusal:
                assert "out of range" not in str(refusal)


@pytest.mark.parametrize("method", [name for name in EXTRA if "objective" in settings_of(name)])
def test_an_unknown_objective_is_refused_before_the_first_request(method):
    for objective, says in (("bleu", "is neither loss, perplexity nor bits, nor weights"),
                            ("1+1+-1+1", "is neither"), ("0+0+0+0", "is neither"),
                            ("1+nan+1+1", "is neither"), ("1+inf+1+1", "is neither"),
                            ("2+1+1", "is not 4 shares"), ("2", "is not 4 shares"),
                            ("bits", "is per byte: say how many")):
        with pytest.raises(ValueError, match=f"^--objective '?{re.escape(objective)}'? {says}"):
            next(METHODS[method](history(4), 1000, objective=objective))
        with pytest.raises(ValueError, match="^--objective "):
            next(aioli.with_prior(history(4), 2000, METHODS[method], aioli.grid,
                                  objective=objective))
    with_bytes = History("abcd", [1, 1, 1, 1], 8, bytes_per_token=[1, 2, 3, 4], window=16)
    for known in ("bits", "2+1+1+0"):
        next(METHODS[method](with_bytes, 1000, objective=known))
        next(aioli.with_prior(with_bytes, 2000, METHODS[method], aioli.grid, objective=known))
        on_same = functools.partial(METHODS[method], objective=known)
        next(aioli.with_prior(with_bytes, 2000, aioli.aioli, on_same))


@pytest.mark.parametrize("b", [[1, 0], [1, -1], [1, np.nan], [1, np.inf], [1], [1, 2, 3]])
def test_bytes_of_a_token_are_above_0_and_as_many_as_there_are_groups(b):
    with pytest.raises(ValueError):
        History("ab", [1, 1], 8, bytes_per_token=b)


def test_a_floor_that_leaves_no_choice_is_refused_before_the_first_request():
    for floor in (.25, .5, 1):
        with pytest.raises(ValueError, match="lower it below 1/4"):
            next(aioli.horizon(history(4), 1000, floor=floor))
        with pytest.raises(ValueError, match="lower it below 1/4"):
            next(aioli.with_prior(history(4), 2000, aioli.horizon, aioli.grid, floor=floor))


@pytest.mark.parametrize("value", [-.1, 1.1, np.nan])
def test_the_share_of_a_prior_is_between_nothing_and_all_of_the_run(value):
    composed = aioli.with_prior(history(4), 2000, aioli.aioli, aioli.grid, first=value)
    with pytest.raises(ValueError, match="^--first "):
        next(composed)
    composed = aioli.with_prior(history(4), 2000, aioli.aioli, aioli.grid, restart="anew")
    with pytest.raises(ValueError, match="^--restart 'anew' is neither uniform nor prior"):
        next(composed)


# ---- priors ----


@pytest.mark.parametrize("prior", METHODS)
@settings(max_examples=4)
@given(T=st.integers(664, 1200), first=st.sampled_from([0., .25, .5]),
       restart=st.sampled_from(["uniform", "prior"]), scratch=st.sampled_from([1., .99]))
def test_a_prior_is_learnt_on_half_length_scratch_runs_and_the_main_run_stays_at_T(
        prior, T, first, restart, scratch):
    """The paper's restricted setting; both restart rules."""
    h = history(4, scratch=scratch)
    half = round(scratch * (T // 2))
    with quickly():
        drive(aioli.with_prior(h, T, aioli.aioli, METHODS[prior], first, restart), Linear(A4), h)
    steps = steps_of(h)
    assert steps.pop("main") == T
    assert all(name.startswith("prior-") for name in steps)
    if prior in EXTRA:
        assert set(steps) >= {f"prior-{name}" for name in EXTRA[prior]}
        for name, n in steps.items():
            assert n == half * EXTRA[prior].get(name.removeprefix("prior-"), 1)
    main = [row.request for row in h.trained()]
    assert main[0].steps == round(first * T)
    same(main[1].p, .25 if restart == "uniform" else main[0].p)     # where Aioli starts
    asked = [row.request for row in h.trained("prior-main")]
    assert all(request.total_steps == half for request in asked)


@pytest.mark.parametrize("prior", ["stratified", "natural", "grid", "doremi", "doge"])
def test_the_prior_of_a_method_that_settles_is_its_mixture(prior):
    alone, h = run(prior, 400), history(4)
    drive(aioli.with_prior(h, 800, aioli.aioli, METHODS[prior]), Linear(A4), h)
    same(h.trained()[0].request.p, alone.last.request.p)
    assert "prior-main" not in steps_of(h)


@pytest.mark.parametrize(
    "prior", ["skillit", "aioli_rounds", "aioli_published", "aioli_diagonal", "aioli_static",
              "aioli_ood", "perplexity_weighted", "aioli"])
def test_the_prior_of_a_method_that_moves_is_its_average_over_the_run(prior):
    """Probes included, as realised in whole windows."""
    alone, h = run(prior, 400), history(4)
    drive(aioli.with_prior(h, 800, aioli.aioli, METHODS[prior]), Linear(A4), h)
    windows = sum(row.windows for row in alone.trained())
    same(h.trained()[0].request.p, windows / windows.sum())
    assert steps_of(h)["prior-main"] == 400


@given(st.data())
def test_restarting_from_the_prior_and_from_uniform_differ_by_the_prior_only(data):
    """The same steps from another start, as the law is fixed; the released rule forgets the
    prior."""
    A = data.draw(matrices(4, scale=1e-3))
    found = {}
    for restart in ("uniform", "prior"):
        h = history(4, 12)
        method = aioli.with_prior(h, 800, aioli.aioli_rounds, aioli.natural, restart=restart)
        drive(method, Linear(A, batch=12), h)
        found[restart] = mixtures_of(h)
    natural = np.arange(1, 5) / 10
    same(found["uniform"][0], natural)
    odds = np.log(found["prior"][1:]) - np.log(found["uniform"][1:])
    same(odds - odds[:, :1], np.tile(np.log(natural / natural[0]), (len(odds), 1)), rtol=1e-6)


# ---- resume ----


def equal(a, b):
    return type(a) is type(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(data=st.data())
def test_a_method_given_its_past_goes_on_as_if_never_stopped(method, data):
    """Replay: all that a method remembers is in the History, so any cut will do."""
    T = 340 if method not in ("doremi", "doge") else 25
    with quickly():
        whole_run = run(method, T)
        cut = data.draw(st.integers(0, len(whole_run.rows)))
        h = history(4)
        drive(METHODS[method](h, T), Linear(A4), h, past=whole_run.rows[:cut])
    assert len(h.rows) == len(whole_run.rows)
    assert all(equal(a.request, b.request) for a, b in zip(h.rows, whole_run.rows))


@settings(max_examples=16)
@given(st.sampled_from(["skillit", "doremi", "grid", "aioli_diagonal"]), st.data())
def test_a_method_on_top_of_a_prior_resumes_anywhere_too(prior, data):
    def composed(past=()):
        h, half = history(4), METHODS[prior]
        if prior == "aioli_diagonal":
            half = functools.partial(freely(half), rounds=2)
        drive(aioli.with_prior(h, 160, aioli.aioli_static, half, first=.3), Linear(A4), h, past)
        return h.rows
    rows = composed()
    cut = data.draw(st.integers(0, len(rows)))
    assert all(equal(a.request, b.request) for a, b in zip(composed(rows[:cut]), rows, strict=True))


@settings(max_examples=10)
@given(seeds)
def test_the_order_of_the_probes_comes_from_the_seed_alone(seed):
    def order(seed):
        rows = aioli_on(A4, 400, rounds=5, seed=seed).trained()
        return [int(row.request.p.argmax()) for row in rows if row.request.probe]
    found = order(seed)
    assert found == order(seed)
    there = [found[t:t + 4] for t in range(0, 40, 8)]
    assert [found[t + 4:t + 8] for t in range(0, 40, 8)] == [sweep[::-1] for sweep in there]
    assert all(sorted(sweep) == [0, 1, 2, 3] for sweep in there)
    assert len(set(map(tuple, there))) > 1
    assert any(order(other) != found for other in (seed + 1, seed + 2))


def test_numbers_beyond_all_bounds_are_refused_in_one_line():
    for name, value, says in (("rounds", 10 ** 23, "cannot be cut into"),
                              ("sweeps", 10 ** 23, "probing takes"),
                              ("probe", 10 ** 19, "out of range")):
        with pytest.raises(ValueError, match=says):
            next(aioli.aioli_rounds(history(2), 1000, **{name: value}))
    with pytest.raises(ValueError, match="--points 1000 is out of range"):
        next(aioli.grid(history(2), 1000, points=1000))
    for method in (aioli.aioli, aioli.aioli_rounds):
        with pytest.raises(ValueError, match="--eta inf is out of range"):
            next(method(history(2), 1000, eta=np.inf))


def test_a_prior_needs_half_a_run_to_be_learnt_on():
    with pytest.raises(ValueError, match="a prior is learnt on half of --steps 1"):
        next(aioli.with_prior(history(2), 1, aioli.stratified, aioli.doge))
