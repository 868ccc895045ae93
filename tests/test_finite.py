"""Finite or stop: no method decides with a number that is not finite, whatever it is answered."""
import functools
import inspect
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aioli
from aioli import METHODS, History, Peek, Train, Update
from test_laws import a_law, cover
from worlds import (Exact, Linear, Scripted, Static, drive, history, rng_of, same, seeds,
                    swapped)

NAN, INF = np.nan, np.inf
ODD = np.array([NAN, INF, -INF, 1e308, 1e99, -1e99, 1e4, 710., 5., 2., 0., -5., 1e-320, 5e-324])
A3 = np.array([[3., .2, -.4], [.1, 2., .5], [-.2, .3, 1.]]) * 1e-3


# ---- the property: a mixture, or one line


class Hostile:
    """Answers plausible numbers of some scale, each of them an odd one with some probability; and
    looks at every mixture that it is asked for."""

    def __init__(self, seed):
        self.rng = rng_of(seed)
        self.scale = 10. ** self.rng.choice([0, 0, 0, 3, -3, 90, -200])
        self.often = self.rng.choice([0, .01, .1, .5])
        self.odd = ODD if self.rng.random() < .3 else ODD[aioli.finite(ODD)]

    def numbers(self, *shape):
        usual, odd = self.scale * self.rng.uniform(1, 9, shape), self.rng.choice(self.odd, shape)
        return np.where(self.rng.random(shape) < self.often, odd, usual)

    def __call__(self, request):
        p, m = np.asarray(request.p), len(request.p)
        assert np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1) < 1e-9
        assert getattr(request, "A", None) is None or np.isfinite(request.A).all()
        if isinstance(request, Update):
            return {}
        if isinstance(request, Train):
            return dict(loss=self.numbers(m))
        windows = self.rng.integers(0, 3, m) if self.rng.random() < .5 else None
        signals = dict(excess=self.numbers(m)) if request.against else dict(
            A=self.numbers(m, m), norm=abs(self.numbers(m)), target_norm=self.numbers(1)[0])
        return dict(signals=signals, windows=windows, lr=1e-3)


def briefly(build, guess, mixtures, losses, delta, fit=aioli.fit):
    return fit(build, guess, mixtures, losses, delta, iterations=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(m=st.integers(2, 5), seed=seeds, eta=st.sampled_from([None, .1, 1e3, 1e300]),
       objective=st.sampled_from(["loss", "perplexity"]), prior=st.booleans())
def test_every_request_has_a_mixture_or_the_method_stops_with_one_line(
        method, m, seed, eta, objective, prior):
    takes, asked = inspect.signature(METHODS[method]).parameters, dict(objective=objective)
    if eta:
        asked["eta"] = eta
    chosen = {name: value for name, value in asked.items() if name in takes}
    h, T = history(m), 12 if method in ("doremi", "doge") else 700
    program = METHODS[method](h, T, **chosen)
    if prior:
        program = aioli.with_prior(h, T, METHODS[method], aioli.grid, **chosen)
    with np.errstate(all="ignore"), swapped(fit=briefly):
        try:
            drive(program, Hostile(seed), h)
        except ValueError as refusal:
            assert "\n" not in str(refusal)


# ---- the main run


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e300])
def test_a_main_run_that_diverges_is_refused_by_run_step_and_group_with_the_losses_before(value):
    h = history(3)
    method = aioli.perplexity_weighted(h, 100, rounds=5)
    with pytest.raises(ValueError, match="^main diverged at step 40: what was measured of b "
                       r"is not finite \(losses before: a 4, b 3, c 2.5\); lower the learning"):
        drive(method, Scripted([[9, 9, 9], [4, 3, 2.5], [2, value, 1]]), h)
    assert len(h.rows) == 2                                         # it is not kept


def test_the_first_validation_of_a_run_may_be_the_one_that_is_refused():
    with pytest.raises(ValueError, match="^main diverged at step 0: .* of a, c is not finite; "):
        history(3).add(Train(np.ones(3) / 3, 0), loss=[NAN, 2, NAN])


def answered(request, **answer):
    h = history(2)
    h.add(request, **answer)
    return h.last


HALF = np.array([.5, .5])
AT_MAIN, PEEK = Train(HALF, 10), Peek(HALF, 10, on="proxy", against="reference")
GRADIENTS = Peek(HALF, 10, on="proxy")


@pytest.mark.parametrize("request_, answer", [
    (AT_MAIN, dict(loss=[1, NAN])), (AT_MAIN, dict(loss=None)), (AT_MAIN, dict(loss=[1, 2, 3])),
    (AT_MAIN, dict(loss=5.)), (AT_MAIN, dict(loss=["a", "b"])), (AT_MAIN, dict(loss=[[1], []])),
    (AT_MAIN, dict(loss=[1, 2], windows=[NAN, 1])), (AT_MAIN, dict(loss=[1, 2], windows=[-1, 2])),
    (AT_MAIN, dict(loss=[1, 2], windows=[80])), (AT_MAIN, dict(loss=[1, 2], windows=[0, 0])),
    (AT_MAIN, dict(loss=[1, 2], windows=[INF, 2])),
    (Train(HALF, 10, on="x"), dict(loss=[1, 2, 3])),
    (PEEK, dict(signals=dict(excess=[NAN, 1]), windows=[4, 4])),            # it was in the batch
    (PEEK, dict(signals=dict(excess=[INF, 1]))), (PEEK, dict(signals=dict(excess=[NAN, NAN]))),
    (PEEK, dict(signals=dict(excess=[1, 2, 3]))), (PEEK, dict(signals={})),
    (GRADIENTS, dict(signals=dict(A=np.eye(2), norm=[1, 1], target_norm=NAN))),
    (GRADIENTS, dict(signals=dict(A=[[1, INF], [1, 1]], norm=[1, 1], target_norm=1.))),
    (GRADIENTS, dict(signals=dict(A=[[1, NAN], [1, 1]], norm=[1, 1], target_norm=1.))),
    (GRADIENTS, dict(signals=dict(A=[[1, NAN], [1, NAN]], norm=[1, NAN], target_norm=1.),
                     windows=[1, 7])),
])
def test_an_answer_that_is_no_number_for_each_group_is_refused_in_one_line(request_, answer):
    with pytest.raises(ValueError) as refusal:
        answered(request_, **answer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("loss", [[3, 4], (3, 4), np.array([3, 4], np.float32),
                                  np.array([[3], [4]]), np.array([3, 4], np.uint8)])
def test_losses_may_be_of_any_kind_and_are_kept_as_they_were(loss):
    row = answered(AT_MAIN, loss=loss)
    if isinstance(loss, np.ndarray):
        loss *= 0                                               # the trainer's buffer is its own
    assert row.reply.dtype == float and row.reply.tolist() == [3, 4]


def test_a_group_that_is_not_in_the_batch_has_nan_in_a_peek():
    A = np.array([[1, NAN], [2, NAN]])
    for windows in ([8, 0], None):
        answered(PEEK, signals=dict(excess=np.array([.5, NAN])), windows=windows)
        answered(GRADIENTS, signals=dict(A=A, norm=np.array([1, NAN]), target_norm=1.),
                 windows=windows)


@pytest.mark.parametrize("groups, sizes", [("ab", [0, 1]), ("ab", [NAN, 1]), ("ab", [-1, 1]),
                                           ("ab", [1, 2, 3]), ("ab", [INF, 1]), ("", []),
                                           ("aa", [1, 2])])
def test_sizes_are_tokens_of_each_group_by_its_name(groups, sizes):
    with pytest.raises(ValueError):
        History(groups, sizes, batch=8)


# ---- scratch runs


class Diverging(Exact):
    """A linear world in which some scratch runs end without finite losses."""

    def __init__(self, A, runs, value=NAN):
        super().__init__(A)
        self.lost, self.value = runs, value

    def __call__(self, request):
        answer = super().__call__(request)
        if request.on in self.lost and "loss" in answer:
            answer["loss"] = np.where(np.arange(len(self.A)) > 0, self.value, answer["loss"])
        return answer


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("objective", ["loss", "perplexity"])
def test_grid_takes_the_best_of_the_runs_that_did_not_diverge(objective, value):
    h, lost = history(2), ["sweep-0", "sweep-8"]
    with pytest.warns(UserWarning) as told:
        drive(aioli.grid(h, 100, objective=objective), Diverging(A3[:2, :2], lost, value), h)
    assert [str(each.message) for each in told] == [
        "sweep-0 (a 0.1, b 0.9) diverged and is left out",
        "sweep-8 (a 0.9, b 0.1) diverged and is left out"]
    left = {f"sweep-{k}": h.losses(f"sweep-{k}")[0] for k in range(9) if f"sweep-{k}" not in lost}
    best = {on: (L if objective == "loss" else np.exp(L)).mean() for on, L in left.items()}
    [row] = h.trained(min(best, key=best.get))
    assert np.array_equal(h.last.request.p, row.request.p)
    assert not finite_of(h, "sweep-0") and not finite_of(h, "sweep-8")      # kept as they were


def finite_of(h, on):
    return np.isfinite(h.losses(on)).all()


@pytest.mark.parametrize("method, fit", [("dml", "fit_log_linear"), ("power", "fit_power_law")])
def test_a_law_is_fitted_to_the_runs_that_did_not_diverge(method, fit):
    h, law, seen = history(2), a_law(1, 2), []

    def spy(P, L):
        seen.append((P, L))
        return law

    def world(request):
        return dict(loss=law(request.p) * (NAN if request.on == "sweep-3" else 1))
    with swapped(**{fit: spy}), pytest.warns(UserWarning, match="sweep-3 .a 0.4, b 0.6."):
        drive(METHODS[method](h, 100), world, h)
    [(P, L)] = seen
    expected = np.delete(cover(2, 9, None), 3, axis=0)
    assert np.array_equal(P, expected)
    same(L, law(expected))


@pytest.mark.parametrize("method, lost, says", [
    ("grid", range(9), "sweep-8 .* diverged: 0 of 9 runs are left where 1 are needed"),
    ("dml", range(7), "sweep-6 .* diverged: 2 of 9 runs are left where 3 are needed"),
    ("power", range(7), "2 of 9 runs are left where 3 are needed"),
    ("skillit", ["only-b"], "^only-b .a 0, b 1. diverged: 0 of 1 runs"),
    ("doremi", ["reference"], "^reference .a 0.5, b 0.5. diverged: 0 of 1 runs"),
])
def test_where_too_few_runs_are_left_the_method_says_so_and_stops(method, lost, says):
    h = history(2)
    runs = [run if isinstance(run, str) else f"sweep-{run}" for run in lost]
    with pytest.raises(ValueError, match=says), warnings.catch_warnings():
        warnings.simplefilter("error")                              # nothing is left out before
        drive(METHODS[method](h, 10), Diverging(A3[:2, :2], runs), h)


@pytest.mark.parametrize("prior, lost", [("perplexity_weighted", "prior-main"),
                                         ("skillit", "only-a"), ("doremi", "reference")])
def test_a_prior_is_not_learnt_from_a_run_that_diverged(prior, lost):
    h, world = history(2), Diverging(A3[:2, :2], [lost, f"prior-{lost}"])
    with pytest.raises(ValueError, match=f"^{lost} .* diverged: 0 of 1 runs are left"):
        drive(aioli.with_prior(h, 100, aioli.stratified, METHODS[prior]), world, h)


def test_a_prior_leaves_out_the_runs_of_its_sweep_that_diverged():
    h = history(2)
    with pytest.warns(UserWarning, match="^sweep-8 "):
        drive(aioli.with_prior(h, 100, aioli.stratified, aioli.grid, first=1),
              Diverging(A3[:2, :2], ["prior-sweep-8"]), h)
    assert h.last.request.p[0] == pytest.approx(.8)


def test_a_proxy_that_diverges_stops_the_method_by_name_and_step():
    h = history(2)
    script = Scripted(signals=[dict(excess=[.1, .2]), dict(excess=[NAN, NAN])])
    with pytest.raises(ValueError, match="^proxy diverged at step 2: .* of a, b is not finite"):
        drive(aioli.doremi(h, 9), script, h)


# ---- large numbers are compared, not overflowed


def test_importance_keeps_its_ratios_where_perplexities_are_no_numbers():
    L = np.array([3., 2., 5.])
    for shift in (0, 300, 710, 1e5):
        weight = aioli.importance(L + shift, "perplexity")
        same(weight / weight.sum(), np.exp(L) / np.exp(L).sum(), rtol=1e-9)
    assert np.array_equal(aioli.importance(L, "perplexity"), np.exp(L))


@pytest.mark.parametrize("method", ["perplexity_weighted", "aioli", "horizon", "aioli_rounds"])
def test_a_group_with_a_loss_of_a_thousand_nats_is_no_reason_to_stand_still(method):
    h, before = history(2), history(2)
    for each, level in ((h, 1000), (before, 290)):
        world = Linear(A3[:2, :2], L0=np.array([level, level - 1.]))
        objective = {} if method == "perplexity_weighted" else dict(objective="perplexity")
        drive(METHODS[method](each, 1000, **objective), world, each)
    assert h.last.request.p[0] > .55 and before.last.request.p[0] > .55


@pytest.mark.parametrize("losses, best", [
    ([[5, 1000], [4, 999], [6, 1001]], 1), ([[1, 1e4], [5, 5], [3, 3]], 2),
    ([[1e6, 1], [2e6, 1], [9e5, 1]], 2), ([[700, 700], [650, 690], [1, 720]], 1),
    ([[1, 1e90], [2, 1e90], [3, 8e89]], 2), ([[5, 5], [5, 5], [5, 5]], 0),
])
def test_grid_compares_perplexities_that_are_no_numbers(losses, best):
    h = history(2)
    world = Scripted(scratch={f"sweep-{k}": losses[k] for k in range(3)})
    drive(aioli.grid(h, 10, points=3, objective="perplexity"), world, h)
    assert np.array_equal(h.last.request.p, h.rows[best].request.p)


def test_an_A_that_is_not_finite_is_no_step_in_silence():
    for bad in (NAN, INF, -INF):
        A = np.array([[1., bad], [0, 1]])
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not finite"):
            aioli.lmo_step(np.array([.5, .5]), aioli.normalise(A), .2)
    with pytest.raises(ValueError, match="not finite"), np.errstate(over="ignore"):
        aioli.lmo_step(np.array([.5, .5]), 10 * np.eye(2), 1e308)


@pytest.mark.parametrize("losses", [[5, 5], [1e90, 1e90], [1e-300, 1e-320], [0, 0], [7e4, 3.]])
@pytest.mark.parametrize("method", ["aioli", "horizon", "aioli_rounds", "perplexity_weighted"])
def test_losses_that_do_not_change_are_no_reason_to_stop(method, losses):
    h = history(2)
    drive(METHODS[method](h, 1000), Scripted([losses] * 999), h)
    assert len(h.rows) > 5 and aioli.finite(h.last.request.p).all()


def test_methods_that_cannot_use_a_loss_of_nothing_or_less_say_so():
    for method, losses, says in (("skillit", [0, 5], "^skillit needs losses above 0"),
                                 ("skillit", [-5, 5], "^skillit needs losses above 0"),
                                 ("aioli", [-5, 5], "losses, 0 or more, not of -5"),
                                 ("dml", [-5, 5], "losses finite and > 0")):
        h = history(2)
        with pytest.raises(ValueError, match=says):
            drive(METHODS[method](h, 1000), Static(lambda p, L=losses: L), h)


# ---- what is known before anything trains


@pytest.mark.parametrize("method", ["aioli", "horizon"])
@pytest.mark.parametrize("wrong", [dict(wait=.4), dict(wait=.9), dict(last=.1), dict(rounds=2),
                                   dict(wait=.39, last=.399), dict(last=0)])
def test_rounds_of_which_none_has_a_forecast_are_refused(method, wrong):
    with pytest.raises(ValueError, match="no round ends from --wait to --last|validations up to"):
        next(METHODS[method](history(2), 1000, **(dict(rounds=24) | wrong)))


def test_a_law_of_more_groups_than_a_sweep_has_runs_is_refused():
    h = History([f"group {j}" for j in range(200)], np.ones(200), 8)
    for method in ("dml", "power"):
        with pytest.raises(ValueError, match="201 is out of range"):
            next(METHODS[method](h, 10))


@pytest.mark.parametrize("mixture", ["1e308+1e308", "nan+1", "inf+1", "-1+2", "0+0", "1", "1+x"])
def test_a_mixture_of_ones_own_is_finite(mixture):
    with pytest.raises(ValueError, match="is not 2 shares joined by"):
        next(aioli.fixed(history(2), 10, mixture=mixture))


@pytest.mark.parametrize("answer, says", [
    (dict(windows=[24., 8.]), "windows must be .* 16 in all .2 steps of 8., not a 24, b 8"),
    (dict(windows=[512., 512.]), "windows must be what was drawn"),             # tokens
    (dict(windows=[16.]), "windows must be 2 numbers, one for each of a, b"),
    (dict(loss=[1., 2., 3.]), "loss must be 2 numbers, one for each of a, b"),
    (dict(loss={"a": 1., "b": 2.}), "loss must be 2 numbers"),
    (dict(loss=None), "a Train is answered by loss="),
])
def test_an_answer_in_other_units_or_of_other_shape_is_refused(answer, says):
    h = history(2)
    with pytest.raises(ValueError, match=says):
        h.add(Train(h.uniform, 2), **{"loss": [1., 2.], **answer})
    assert not h.rows


@pytest.mark.parametrize("batch", [0, -8, NAN, np.inf])
def test_a_batch_is_windows(batch):
    with pytest.raises(ValueError, match="batch must be windows of a step, above 0"):
        history(2, batch=batch)


@pytest.mark.parametrize("warmup", [-.1, 1., NAN])
def test_a_warm_up_is_a_share_of_the_run(warmup):
    with pytest.raises(ValueError, match="warmup must be a share of the run"):
        history(2, warmup=warmup)


def test_a_request_is_answered_once_and_before_the_next_one_is_asked_for():
    h, request = history(2), Train(np.array([.5, .5]), 2)
    with pytest.raises(ValueError, match="nothing was measured yet; answer the request first"):
        len(h.reply)
    h.add(request, loss=[2., 1.])
    with pytest.raises(ValueError, match="this request has its answer"):
        h.add(request, loss=[2., 1.])
    h.add(Train(np.array([.5, .5]), 2), loss=[2., 1.])          # as much again is another request
    assert len(h.rows) == 2


@pytest.mark.parametrize("request_, answer", [
    (Train(np.array([.5, .5]), 2), dict(loss=np.array([2., 1.]))),
    (Peek(np.array([.5, .5]), 2, "x"), dict(signals=dict(A=np.eye(2), norm=np.ones(2))))])
def test_a_method_may_change_its_reply_and_equal_shares_without_changing_the_history(
        request_, answer):
    h = history(2)
    h.add(request_, **answer)
    kept = repr(h.rows)
    reply, p = h.reply, h.uniform
    for array in (p, *(reply.values() if isinstance(reply, dict) else [reply])):
        array *= 7
    assert repr(h.rows) == kept and h.uniform.tolist() == [.5, .5]


@pytest.mark.parametrize("A", [[1., 2.], [[1.], [2.]], 3., [[1., 2., 3.]]])
def test_a_step_on_what_has_no_column_for_each_group_is_refused(A):
    """Column sums of a vector are one number, which would move nothing."""
    with pytest.raises(ValueError, match="A must be a matrix with a column for each of 2 groups"):
        aioli.lmo_step([.5, .5], A, eta=1.)


def test_a_method_hears_of_its_rounds_before_its_prior_trains():
    h = history(2)
    with pytest.raises(ValueError, match="cannot be cut into 12 rounds"):
        next(aioli.with_prior(h, 20, aioli.perplexity_weighted, aioli.doremi, rounds=12))


def test_a_mixture_that_a_method_cannot_start_from_is_refused_before_the_main_run():
    """aioli_rounds has to have two groups to tell apart."""
    only = functools.partial(aioli.fixed, mixture="1+0+0")
    with pytest.raises(ValueError, match="aioli needs at least two groups"):
        next(aioli.with_prior(history(3), 1000, aioli.aioli_rounds, only, restart="prior"))


@pytest.mark.parametrize("method", ["doremi", "doge"])
def test_a_proxy_of_no_steps_leaves_equal_shares(method):
    h = history(2)
    drive(METHODS[method](h, 0), Linear(A3[:2, :2]), h)
    assert h.last.request.p.tolist() == [.5, .5]


P2 = cover(2, 5, None)


@pytest.mark.parametrize("fit", [aioli.fit_log_linear, aioli.fit_power_law])
@pytest.mark.parametrize("P", [np.tile([[.5, .5]], (5, 1)), np.tile([[1., 0.]], (5, 1)),
                               np.array([[.2, .2, .6]] * 3 + [[.4, .4, .2]] * 3)])
def test_mixtures_that_do_not_tell_the_groups_apart_determine_no_law(fit, P):
    with pytest.raises(ValueError, match="mixtures do not tell"):
        fit(P, rng_of(0).uniform(2, 3, P.shape))


def test_a_law_that_can_be_fitted_nowhere_is_not_made_up():
    def build(x):
        return lambda P: x.sum() * NAN + P
    with pytest.raises(ValueError, match="no finite fit"):
        aioli.fit(build, lambda P, y: [np.ones(3)], P2, P2)
