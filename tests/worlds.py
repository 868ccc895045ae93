"""Toy worlds in which the mixing laws hold exactly, and the loop that drives a method through one.

A world is a function from a request to what History.add takes. `Linear` obeys the linear dynamic
law, `Static` any static law, and `Scripted` gives the answers of its script; no model is trained
here. Last come the strategies that draw mixtures, scores and matrices.
"""
import contextlib
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

import aioli
from aioli import History, Peek, Train, Update

NAMES = "abcdefghijklmnopqrstuvwxyz"


def history(m, batch=8, sizes=None, seed=0, warmup=.1, window=16, scratch=1.0):
    sizes = np.arange(1., m + 1) if sizes is None else sizes
    return History(NAMES[:m], sizes, batch, seed, warmup=warmup, window=window, scratch=scratch)


def drive(method, world, h, past=()):
    """Run a method to its end -> what it returns. It is given the `past` rows again, instead of
    what the world says, while there are any."""
    past, reply = list(past), None
    while True:
        try:
            request = method.send(reply)
        except StopIteration as end:
            return end.value
        answer = world(request)
        if past:
            h.rows.append(past.pop(0)._replace(request=request))
        else:
            h.add(request, **answer)
        reply = h.reply


def mixtures_of(h, on="main", probes=False):
    """The mixtures that a run was trained on, (rounds, m), oldest first."""
    requests = [row.request for row in h.trained(on) if row.request.steps]
    return np.array([request.p for request in requests if probes or not request.probe])


def weights_of(h):
    """The weights of every Update, (steps, m)."""
    return np.array([row.request.w for row in h.rows if isinstance(row.request, Update)])


def steps_of(h):
    """{run: optimiser steps it has taken}."""
    total = {}
    for row in h.rows:
        n = {Train: getattr(row.request, "steps", 0), Peek: 0, Update: 1}[type(row.request)]
        total[row.request.on] = total.get(row.request.on, 0) + n
    return total


def whole(p, n):
    """n windows in the shares p -> integers (m,): floors, and the largest remainders get one."""
    exact = np.asarray(p) * n
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[:n - counts.sum()]] += 1
    return counts


class Linear:
    """One step on mixture p takes (A + turn * segment) p + drift off the losses; a segment is one
    Train with steps.

    Mixtures are realised in whole windows, and it is the realised ones that act. Also answers Peek
    as a model would whose gradients have the products A and norm 1.
    """

    def __init__(self, A, L0=None, batch=8, drift=0.0, turn=0.0):
        self.A, self.batch, self.drift, self.turn = A, batch, drift, turn
        self.L0 = np.linspace(6, 8, len(A)) if L0 is None else L0
        self.runs, self.segment = {}, {}

    def __call__(self, request):
        L = self.runs.setdefault(request.on, self.L0)
        if isinstance(request, Peek):
            return dict(signals=self.signals(L, request.against), lr=1e-3)
        if isinstance(request, Update):
            self.runs[request.on] = L - self.A @ request.w
            return {}
        windows = self.windows(request)
        if request.steps:
            at = self.segment[request.on] = self.segment.get(request.on, -1) + 1
            share = windows / windows.sum()
            fall = (self.A + self.turn * at) @ share + self.drift
            self.runs[request.on] = L - request.steps * fall
        return dict(loss=self.runs[request.on], windows=windows)

    def windows(self, request):
        return whole(request.p, request.steps * self.batch)

    def signals(self, L, against):
        if against:
            return dict(excess=np.maximum(L - self.runs[against], 0))
        return dict(A=self.A, norm=np.ones(len(L)), target_norm=1.0)


class Exact(Linear):
    """Mixtures are realised exactly, in parts of windows, so that no rounding is seen."""

    def windows(self, request):
        return request.steps * self.batch * request.p


class Planes:
    """LightGBM for tests, which need no package then: planes by least squares instead of trees."""

    def __init__(self):
        self.asked = None

    @staticmethod
    def Dataset(P, y, params):
        assert not {"num_threads", "min_data_in_bin"} - set(params)
        return P, y

    def train(self, settings, data, trees):
        self.asked = dict(settings, trees=trees)
        P, y = data
        slope = np.linalg.lstsq(P, y)[0]
        return SimpleNamespace(predict=lambda Q: Q @ slope)


class Static:
    """A run of any length ends at law(p), p its mixture: the static laws."""

    def __init__(self, law):
        self.law = law

    def __call__(self, request):
        return dict(loss=self.law(request.p))


class Scripted:
    """Answers in order of its script: losses of the main run, signals, rates; and with the final
    losses of scratch runs, by name."""

    def __init__(self, losses=(), scratch=None, signals=(), lr=()):
        self.losses, self.scratch = list(losses), scratch or {}
        self.signals, self.lr = list(signals), list(lr)

    def __call__(self, request):
        if isinstance(request, Update):
            return {}
        if isinstance(request, Peek):
            return dict(signals=self.signals.pop(0), lr=self.lr.pop(0) if self.lr else 0.0)
        if request.on == "main":
            return dict(loss=self.losses.pop(0) if self.losses else np.ones(len(request.p)))
        return dict(loss=self.scratch.get(request.on, np.ones(len(request.p))))


def gradient_signals(G, V):
    """What a Peek says of gradients G, (m, d), NaN rows absent, and target gradients V, (n, d)."""
    target_norm = float(np.linalg.norm(V.mean(0)))
    return dict(A=V @ G.T, norm=np.linalg.norm(G, axis=1), target_norm=target_norm)


# ---- short ways to drive one method ----

def skillit_weights(G, losses, L0=None, **settings):
    """Skill-It's mixtures, (rounds, m), in a world with graph G, (losses, groups), and these losses
    after each round."""
    m, L0 = len(G), np.linspace(2, 3, len(G)) if L0 is None else L0
    scratch = {f"only-{NAMES[j]}": L0 * (1 - G[:, j]) for j in range(m)}
    h = history(m)
    rounds, world = len(losses) + 1, Scripted([L0, *losses], scratch)
    drive(aioli.skillit(h, rounds, rounds=rounds, **settings), world, h)
    return mixtures_of(h)


def doremi_weights(excess, **settings):
    """DoReMi's proxy weights, (steps, m), and its main mixture, for these excess losses (steps, m),
    NaN where absent."""
    h = history(len(excess[0]))
    world = Scripted(signals=[dict(excess=e) for e in excess])
    drive(aioli.doremi(h, len(excess), **settings), world, h)
    return weights_of(h), h.last.request.p


def doge_weights(signals, lr, **settings):
    """DoGE's proxy weights, (steps, m), and its main mixture."""
    h = history(len(signals[0]["norm"]))
    drive(aioli.doge(h, len(signals), **settings), Scripted(signals=signals, lr=lr), h)
    return weights_of(h), h.last.request.p


def grape_mixtures(signals, losses, **settings):
    """GRAPE's mixtures, (rounds, m), for what each Peek says and these losses (rounds + 1, m)."""
    h = history(len(losses[0]))
    world = Scripted(list(losses), signals=signals)
    drive(aioli.grape(h, len(signals), rounds=len(signals), **settings), world, h)
    return mixtures_of(h)


def freely(method):
    """One of the paper's ablations with settings of one's own, where its claim is about any."""
    def form(h, steps, **settings):
        own = {name: settings.pop(name) for name in aioli.published(2, 1000) if name in settings}
        with swapped(published=lambda *_: own):
            yield from method(h, steps, **settings)
    return form


def aioli_on(A, steps=None, method=aioli.aioli_rounds, world=None, seed=0, batch=None, **settings):
    """An Aioli-like method in a linear world -> its History. The batch lets every probe be realised
    exactly."""
    m = len(A)
    h = history(m, batch or 4 * (m - 1), seed=seed)
    steps = steps or settings.get("rounds", 10) * 16 * m
    drive(method(h, steps, **settings), world or Linear(A, batch=h.batch), h)
    return h


@contextlib.contextmanager
def swapped(**functions):
    """aioli.py with some of its functions replaced: what is left shows which part does what."""
    before = {name: getattr(aioli, name) for name in functions}
    for name, function in functions.items():
        setattr(aioli, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(aioli, name, function)


def aioli_given(matrices, eta):
    """Aioli's own loop, neither normalising nor averaging, given each A instead of measuring it
    -> mixtures (rounds, m)."""
    rounds, m = len(matrices), len(matrices[0])
    left, h = list(matrices), history(m)

    def take(*about):
        return left.pop(0)
        yield

    with swapped(learn_params=take, normalise=lambda A: A):
        method = aioli.aioli_rounds(h, rounds * (m + 1), rounds, eta, f=.75, sweeps=1, probe=1)
        drive(method, Scripted(), h)
    return mixtures_of(h)


# ---- strategies: a few drawn numbers each; dense and partly negative arrays from a drawn seed ----

sizes = st.integers(2, 8)
seeds = st.integers(0, 2 ** 32 - 1)
scales = st.integers(-6, 6).map(lambda k: 10.0 ** k)
etas = st.floats(1e-3, 30)


def rng_of(seed):
    return np.random.default_rng(seed)


@st.composite
def mixtures(draw, m, smallest=-9):
    """An interior mixture; shares down to 10 ** smallest."""
    p = 10.0 ** rng_of(draw(seeds)).uniform(draw(st.sampled_from([-.3, -2, smallest])), 0, m)
    return p / p.sum()


@st.composite
def sides(draw, m=None):
    """(p, s, eta): a mixture, scores of any scale from 1e-6 to 1e6, and a suitable step size."""
    m = m or draw(sizes)
    p, scale = draw(mixtures(m)), draw(scales)
    return p, scale * rng_of(draw(seeds)).uniform(-1, 1, m), draw(etas) / scale


@st.composite
def matrices(draw, m=None, n=None, scale=None):
    """(n, m): dense, asymmetric, about a third of the entries negative."""
    m = m or draw(sizes)
    scale = draw(scales) if scale is None else scale
    return scale * rng_of(draw(seeds)).uniform(-.5, 1, (n or m, m))


@st.composite
def tables(draw, rows=None, m=None, low=0.5, high=5.0):
    """(rows, m) numbers in [low, high]: losses or scores over rounds."""
    rng, rows = rng_of(draw(seeds)), rows or draw(st.integers(2, 9))
    return rng.uniform(low, high, (rows, m or draw(sizes)))


def softmax(z):
    q = np.exp(z - np.max(z))
    return q / q.sum()


def kl(q, p):
    """KL(q || p), with 0 log 0 = 0."""
    return sum(a * np.log(a / b) for a, b in zip(q, p) if a > 0)


def same(x, y, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def differ(x, y, by=1e-3):
    gap = np.max(np.abs(np.asarray(x) - np.asarray(y)))
    assert gap > by, f"expected a difference of more than {by}, found {gap}"


def measure(world, m, f=.75, sweeps=2, probe=4, batch=None, seed=0, diagonal=False, arms=None):
    """LearnParams alone, at the start of a run -> the A that it finds, in nats per probe."""
    h = history(m, batch or 4 * (m - 1), seed=seed)
    if isinstance(world, Linear):
        world.batch = h.batch
    request = Train(h.uniform, 0)
    h.add(request, **world(request))
    arms = np.arange(m) if arms is None else np.asarray(arms)
    return drive(aioli.learn_params(h, arms, f, sweeps, probe, diagonal), world, h)
