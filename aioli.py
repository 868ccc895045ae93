"""Data mixing for language models: Aioli (arXiv 2411.05735, ICLR 2025) and every method it unifies.

A model is trained on m groups of text (code, law, maths, ...). Data mixing chooses their
proportions p. The paper shows that the known methods solve one problem, Linear Mixing
Optimization (LMO):

    minimise  sum_i L_i^{T+1}   over mixtures p^1 .. p^T,   subject to a mixing law
    L_i^{t+1}(p) = c_i + b_i sigma(-sum_j A^t_ij p_j),      sigma = identity or exp

They differ in where A^t comes from and in how they solve. Here a method is a short generator: it
yields a request (train on this mixture, measure this signal), receives what was measured, and is
otherwise the paper's pseudocode in order. The training loop is elsewhere (train.py, or yours). This
file needs numpy; the fits of `dml`, `power` and `olmix` need torch, `regmix` LightGBM.

    history = History(groups=["code", "law"], sizes=[9e6, 4e6], batch=8)
    method = aioli(history, steps=1000)
    request = next(method)                      # Train(p=[.5, .5], steps=40)
    history.add(request, loss=[7.0, 6.9])       # what your model measured, nats per token
    request = method.send(history.reply)        # and so on until StopIteration

`x = yield request` hands out a request and goes on with its reply as x. `x = yield from other(...)`
runs another generator in place and takes what it returns. "The release" is the authors' own code.

How to read it. Part one is the paper, and `aioli`, top to bottom: requests and History; the update,
`egd` and `lmo_step`; then where A comes from: nowhere (`stratified`), whole runs (`grid` and `dml`,
which fits a law to them), extra runs (`skillit`, `doremi`, `doge`), probes inside the run
(`aioli_rounds`, Aioli as published), a law of the run's own losses (`aioli`, the default). Part two
has methods beyond the paper, each on its own. Part three is what they share: settings, caps, how
laws are minimised and fitted, and one method on top of another. Notation:

    h      the History: all that was measured so far
    m      groups of text; index j is the group trained on (columns), i the group evaluated (rows)
    p      mixture, (m,), on the simplex: share of training windows (pieces of text of equal length
           in tokens) taken from each group
    L      validation loss, (m,), nats per token
    A      (m, m), A[i, j] > 0: training on group j lowers loss i
    s      scores, (m,): column sums of A, what one more unit of group j takes off the total loss
    eta    step size of the exponentiated-gradient step, 1 / (unit of s)
    w      weights: of losses in an objective, or of groups in the loss of a proxy
    n      steps of a round or of a scratch run
    K, R   in shapes: losses, where they need not be m; finished runs
"""
import copy
import importlib
import warnings
from typing import NamedTuple

import numpy as np

# === Part one: the framework, the methods of the paper, and aioli, ours.

# --- What a method may ask for. `on` names the run: "main", or any other name for a scratch model,
# --- which starts from main's initial weights and counts as extra cost.


class Train(NamedTuple):
    """Train `steps` steps on mixture p, then validate -> L, (m,) nats per token.

    steps = 0 only validates.
    """
    p: np.ndarray
    steps: int
    on: str = "main"
    total_steps: int = 0        # length of a scratch run, for its learning rate; 0: this request
    probe: bool = False         # these steps are there to measure A (they still train the model)
    A: np.ndarray = None        # A^t behind p, before an objective weighs its rows, for the record


class Peek(NamedTuple):
    """Draw one batch at mixture p and measure without stepping -> a dict of signals.

    against="run": {"excess": (m,)}, mean over a group's tokens of max(loss - loss of that run, 0).
    otherwise:     {"A": (m, m), "norm": (m,), "target_norm": float}. A[i, j] = <gradient of loss i
                   on validation text, gradient of loss j on this batch>; the norms of the latter;
                   the norm of the mean of the former.
    A group that is not in the batch has NaN. total_steps: as in Train.
    """
    p: np.ndarray
    total_steps: int
    on: str
    against: str = ""


class Update(NamedTuple):
    """One optimiser step of a scratch run on the batch peeked at, group j's mean loss weighted by
    w_j -> None."""
    w: np.ndarray
    on: str

    @property
    def p(self):
        """The weights, so that what reads `request.p` takes all three requests."""
        return self.w


class Row(NamedTuple):
    """One answered request."""
    request: object
    reply: object               # what the method receives: L for Train, signals for Peek, or None
    share: np.ndarray           # (m,) the mixture as realised in whole windows; fits use it
    windows: np.ndarray         # (m,) training windows that this request consumed, per group
    lr: float = 0.0             # learning rate of the step to come
    seconds: float = 0.0


def finite(x):
    """Where x is a number to reckon with: not NaN, and not so large that its square overflows."""
    return np.abs(np.asarray(x, float)) < 1e100


class History:
    """Everything measured so far, shared by all methods: one Row per request, in order.

    groups: the m names.  sizes: (m,) training tokens of each.  batch: windows per step.
    seed: of the method's own choices (probe order), drawn from `rng`, so that a method replayed
    makes the same ones.  warmup: share of the run's steps in which the learning rate rises.
    window: tokens of a window, for methods that count epochs.  bytes_per_token: (m,) of the
    validation text, UTF-8, for the objective bits.  scratch: length of a scratch run, and share of
    each group's text that it may read, as a share of the main run's (arXiv 2606.07597).
    """

    def __init__(self, groups, sizes, batch, seed=0, warmup=.1, window=None, bytes_per_token=None,
                 scratch=1.0):
        self.groups = list(groups)
        self.m = len(self.groups)
        self.sizes = self.per_group("sizes", sizes)
        self.batch = batch
        self.seed = seed
        self.warmup = warmup
        self.window = window
        self.bytes_per_token = bytes_per_token
        self.scratch = scratch
        if not self.m or len(set(self.groups)) < self.m:
            raise ValueError(f"groups must be names, each once, not {self.groups}")
        if not (finite(self.sizes) & (self.sizes > 0)).all():
            raise ValueError(f"sizes must be above 0, not {self.listing(self.sizes)}")
        if not 0 < batch < np.inf:
            raise ValueError(f"batch must be windows of a step, above 0, not {batch}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be a share of the run, 0 to below 1, not {warmup}")
        if bytes_per_token is not None:
            self.bytes_per_token = b = self.per_group("bytes_per_token", bytes_per_token)
            if not (finite(b) & (b > 0)).all():
                raise ValueError(f"bytes_per_token must be above 0, not {self.listing(b)}")
        self.rng = np.random.default_rng(seed)
        self.rows = []

    def per_group(self, what, values):
        """A number for each group as an array (m,). Raises ValueError."""
        try:
            return np.array(values, float).reshape(self.m)
        except (TypeError, ValueError):
            raise ValueError(f"{what} must be {self.m} numbers, one for each of "
                             f"{', '.join(map(str, self.groups))}, not {values!r}") from None

    def empty(self, share=1.0):
        """A History of nothing measured, of this share of the text; its scratch runs are whole."""
        return History(self.groups, share * self.sizes, self.batch, self.seed, self.warmup,
                       self.window, self.bytes_per_token)

    def scratch_steps(self, steps):
        """Length of a scratch run beside a run of `steps`."""
        return min(steps, max(1, round(self.scratch * steps)))

    def add(self, request, loss=None, signals=None, windows=None, **measured):
        """Record an answer. Without `windows` the mixture counts as realised exactly.

        loss: (m,) nats per token, after a Train.  signals: the dict that a Peek describes.
        windows: (m,) drawn of each group, `batch` a step.  measured: further fields of a Row.
        Raises ValueError for numbers that are not finite. Only a scratch run may have diverged,
        which `finished` sees to, and a Peek has NaN for groups that are not in its batch.
        """
        if self.rows and request is self.last.request:
            raise ValueError("this request has its answer; the next comes from "
                             "method.send(history.reply)")
        p = np.asarray(request.p, float)
        batches = {Train: getattr(request, "steps", 0), Peek: 1, Update: 0}[type(request)]
        counted, drawn = windows is not None, batches * self.batch
        windows = self.per_group("windows", windows if counted else drawn * p)
        if not (finite(windows) & (windows >= 0)).all() or not abs(windows.sum() - drawn) <= 1:
            raise ValueError(f"windows must be what was drawn of each group, {drawn} in all "
                             f"({batches} steps of {self.batch}), not {self.listing(windows)}")
        reply = signals if loss is None else self.per_group("loss", loss)
        if isinstance(request, Train) and loss is None:
            raise ValueError("a Train is answered by loss=, the validation losses after it")
        self.require_finite(request, reply, windows, counted)
        share = windows / windows.sum() if windows.sum() else p
        self.rows.append(Row(request, reply, share, windows, **measured))

    def require_finite(self, request, reply, windows, counted):
        """Raise ValueError where an answer is not what `add` takes; counted: it had windows."""
        good = np.ones(self.m, bool)
        if isinstance(request, Train):
            good &= finite(reply) | (request.on != "main")
        elif isinstance(request, Peek):
            table = np.vstack([signal for signal in reply.values() if np.ndim(signal)])
            absent = windows == 0 if counted else np.isnan(table).all(0)
            good &= (finite(table).all(0) | absent) & ~absent.all()
            good &= finite(reply.get("target_norm", 0))
        if good.all():
            return

        before = [row for row in self.rows if row.request.on == request.on]
        read = windows.sum() + sum(row.windows.sum() for row in before)
        known = self.trained(request.on)
        last = f" (losses before: {self.listing(known[-1].reply)})" if known else ""
        groups = ", ".join(np.array(self.groups)[~good])
        raise ValueError(f"{request.on} diverged at step {read / self.batch:.0f}: what was "
                         f"measured of {groups} is not finite{last}; lower the learning rate")

    @property
    def uniform(self):
        """Equal shares, (m,)."""
        return np.full(self.m, 1 / self.m)

    @property
    def last(self):
        """The newest row."""
        return self.rows[-1]

    @property
    def reply(self):
        """What the method receives next: a copy, that it may change."""
        if not self.rows:
            raise ValueError("nothing was measured yet; answer the request first: history.add(...)")
        return copy.deepcopy(self.last.reply)

    def trained(self, on="main"):
        """Rows of the Train requests on one run, oldest first."""
        return [row for row in self.rows if isinstance(row.request, Train) and row.request.on == on]

    def losses(self, on="main"):
        """(t, m) validation losses of a run, nats per token, oldest first."""
        return np.array([row.reply for row in self.trained(on)])

    def read(self, on="main"):
        """(t, m) training windows that a run had read by each of its validations, per group."""
        return np.cumsum([row.windows for row in self.trained(on)], axis=0)

    def finished(self, runs, least=1):
        """Which of these scratch runs did not diverge, (R,) booleans, and their losses at the end.

        Each that did is named in a warning. Raises ValueError if fewer than `least` did not.
        """
        rows = [self.trained(on)[-1] for on in runs]
        kept = np.array([finite(row.reply).all() for row in rows])
        lost = [f"{row.request.on} ({self.listing(row.request.p)})"
                for row, is_kept in zip(rows, kept) if not is_kept]
        if kept.sum() < least:
            raise ValueError(f"{' and '.join(lost)} diverged: {kept.sum()} of {len(rows)} runs are "
                             f"left where {least} are needed; lower the learning rate")
        for run in lost:
            warnings.warn(f"{run} diverged and is left out", stacklevel=2)
        return kept, np.array([row.reply for row in rows])[kept]

    def listing(self, values):
        """The groups and their values, (m,), for a message."""
        return ", ".join(f"{group} {value:.4g}" for group, value in zip(self.groups, values))


# --- The update of the online methods, and small tools.


def egd(p, s, eta):
    """The exponentiated-gradient step, LMO's online solver: q_j = p_j exp(eta s_j) / Z.

    It is the q that maximises <s, q> - KL(q || p) / eta. p, s: (m,) -> (m,). A group at p_j = 0
    stays there.

    >>> egd([.5, .5], [1., 0.], eta=.2).round(4)
    array([0.5498, 0.4502])
    """
    with np.errstate(divide="ignore"):
        z = np.log(p) + eta * np.asarray(s)
    q = np.exp(z - z.max())
    return q / q.sum()


def lmo_step(p, A, eta):
    """The framework's update: a step of size eta on the column sums of A, (K, m) -> p (m,).

    Skill-It, DoReMi, DoGE and Aioli are choices of A; the rest is this line. Raises ValueError for
    an A that is no such matrix (a method without transfer gives a diagonal one) or not finite.

    >>> lmo_step([.5, .5], np.array([[.7, .1], [.3, -.1]]), eta=.2).round(4)
    array([0.5498, 0.4502])
    """
    A = np.asarray(A, float)
    if A.ndim != 2 or A.shape[1] != len(p):
        raise ValueError(f"A must be a matrix with a column for each of {len(p)} groups, as "
                         f"np.diag(L), not of shape {A.shape}")
    if not np.isfinite(eta * A.sum(0)).all():
        raise ValueError("the scores of the groups are not finite; lower eta, or the learning rate")
    return egd(p, A.sum(0), eta)


def split(steps, rounds):
    """`steps` in `rounds` whole parts that add up to it exactly: split(10, 3) -> [3, 3, 4].

    Raises ValueError if there are more rounds than steps.
    """
    if not 1 <= rounds <= max(steps, 1):
        raise ValueError(f"{steps} steps cannot be cut into {rounds} rounds; "
                         f"choose 1 to {max(steps, 1)}, or raise --steps")
    return np.diff(np.arange(rounds + 1) * steps // rounds).tolist()


# --- What is made small: an average of the losses, or of the perplexities.

FORMS = ("loss", "perplexity")  # what is averaged, with weights; other objectives are weights


def what_counts(h, objective):
    """An --objective as one of FORMS and the weights of the groups, (m,), of mean 1.

    `loss` and `perplexity` weigh all alike. `bits`, per byte, are L_i / (ln 2 * bytes per token of
    group i): a loss with weights in inverse proportion to these bytes. 2+1+1 are weights of the
    losses, in the order of the groups. Raises ValueError, also for bits where the History does not
    know the bytes.

    >>> what_counts(History("ab", sizes=[1, 1], batch=8), "3+1")
    ('loss', array([1.5, 0.5]))
    """
    check(objective=objective)
    if objective in FORMS:
        return objective, np.ones(h.m)
    if objective != "bits":
        w = parse_mixture(objective, h.groups, "--objective")
    elif h.bytes_per_token is None:
        raise ValueError("--objective bits is per byte: say how many a token has in each group, "
                         "History(bytes_per_token=...)")
    else:
        w = 1 / h.bytes_per_token
    return "loss", w / w.mean()


def goal(L, form, w):
    """What is made small: sum_i w_i L_i, or log sum_i w_i exp(L_i), which is least where the sum of
    perplexities is, and does not overflow. L, w: (K,) -> a number."""
    return w @ L if form == "loss" else L.max() + np.log(w @ np.exp(L - L.max()))


def importance(L, form, w=1.0):
    """What a fall of each loss is worth, the slope of `goal` but for a factor, (m,) -> (m,)."""
    tame = L - max(np.max(L) - 300, 0)                  # exp(710) is no number; only ratios matter
    return w * (np.exp(tame) if form == "perplexity" else np.ones_like(L))


# --- The methods; first, the one that measures nothing. Keyword arguments are settings; train.py
# --- makes command-line flags of them.


def stratified(h, steps):
    """Equal shares: the baseline. A^t = 0. Extra cost: none.

    Any method here whose column sums are equal, or whose eta is 0, is this one.
    """
    yield Train(h.uniform, steps)


# --- Static methods (T = 1): a sweep of whole runs, then the best of them, or the minimum of a law
# --- of their final losses. A law is called on any (..., m) array of mixtures, and `gradient(p)` is
# --- minus its A at p, as if sigma were the identity.


def cover(m, runs, rng):
    """`runs` mixtures spread over the simplex, (runs, m), as the paper's sweeps.

    Evenly spaced for m = 2; else Dirichlet(1.5) draws, one of the closest two dropped until `runs`
    are left.
    """
    if m == 2:
        first = np.arange(1, runs + 1) / (runs + 1)
        return np.column_stack((first, 1 - first))
    P = rng.dirichlet(np.full(m, 1.5), 8 * runs)
    distance = np.array([np.linalg.norm(P - p, axis=1) for p in P])
    np.fill_diagonal(distance, np.inf)
    kept = np.ones(len(P), bool)
    while kept.sum() > runs:
        dropped, _ = np.unravel_index(distance.argmin(), distance.shape)
        distance[dropped] = distance[:, dropped] = np.inf
        kept[dropped] = False
    return P[kept]


def sweep(h, steps, points, least=1):
    """Scratch runs on a cover of the simplex, `points` but at least `least`.

    Returns mixtures and final losses, (points, m) each, of those that did not diverge: at least
    `least`, or ValueError. The mixtures do not depend on the seed, so all seeds share them, and up
    to 8 groups all methods with as many points.
    """
    check(points=points)
    check(points=least)
    P = cover(h.m, max(points, least), np.random.default_rng(0))
    names = [f"sweep-{number}" for number in range(len(P))]
    for name, p in zip(names, P):
        yield Train(p, h.scratch_steps(steps), on=name)
    kept, losses = h.finished(names, least)
    return P[kept], losses


def grid(h, steps, points=9, objective="loss"):
    """Grid search: train on a cover of the simplex, keep the best. Its law is a table.

    A^t: none; the solver looks it up. Extra cost: `points` full runs. Paper: 9 points (.1 to .9)
    for m = 2, 9 or 10 draws otherwise.
    points: number of scratch runs.
    objective: average loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    """
    form, w = what_counts(h, objective)
    P, L = yield from sweep(h, steps, points)
    best = np.argmin([goal(losses, form, w) for losses in L])
    yield Train(P[best], steps)


class LogLinear(NamedTuple):
    """L_i(p) = c_i + exp(sum_j t_ij p_j): LMO with sigma = exp, b = 1, A = -t (arXiv 2403.16952).

    The factor k_i of the paper is exp of a constant, and a constant is the same number added to a
    whole row of t (shares sum to 1). So it lives in t: k > 0 by construction, L_i is convex in p.
    """
    c: np.ndarray               # (K,) irreducible loss, >= 0
    t: np.ndarray               # (K, m)

    @property
    def m(self):
        """Groups trained on."""
        return self.t.shape[1]

    def __call__(self, P):
        return self.c + np.e ** (P @ self.t.T)                          # (..., K)

    def gradient(self, p):
        """dL_i/dp_j, (K, m); minus this is the local A."""
        return self.t * (self(p) - self.c)[:, None]


def dml(h, steps, points=9, objective="loss", kl=0.0, mixture_prior=""):
    """Data Mixing Laws (arXiv 2403.16952): fit L_i(p) = c_i + exp(t_i . p) to a sweep, minimise.

    A = -t: static, sigma = exp, T = 1. Its linearisation at p is A[i, j] = -t_ij (L_i(p) - c_i).
    Extra cost: `points` full runs, or m + 1 if that is more, as the law needs them; the paper of
    Aioli uses 10. Where the release fits k of either sign and searches with Nelder-Mead, k > 0 is
    enforced here and the problem is convex; and the proposal stays where runs have been (see
    `propose`).
    points: number of scratch runs.
    objective: average loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    kl: weight of KL(mixture || prior) against the average loss, nats; Olmix has .05.
    mixture_prior: natural, uniform, or shares joined by + (default with kl: natural).

    >>> solve_static(LogLinear(c=np.zeros(2), t=-np.eye(2))).round(6)
    array([0.5, 0.5])
    """
    law, p = yield from by_law(h, steps, fit_log_linear, points, objective, kl, mixture_prior)
    yield Train(p, steps, A=-law.t)


def by_law(h, steps, fit_law, points, objective, kl, mixture_prior):
    """A sweep, the law fitted to it, and the mixture that this proposes."""
    package("torch")                                # before anything trains
    check(kl=kl)
    check_prior_counts(kl, mixture_prior)
    prior = prior_of(h, mixture_prior or "natural")
    form, w = what_counts(h, objective)
    P, L = yield from sweep(h, steps, points, least=h.m + 1)
    law = fit_law(P, L)
    return law, propose(law, P, form, w, kl=kl, prior=prior)


def propose(law, P, objective, weights, kl=0.0, prior=None):
    """The best mixture by a law fitted to runs P (R, m), of those where runs have been -> p (m,).

    No share is above the largest that its group had in any run, nor below the smallest share of all
    (or half of 1/m, if that is less): beyond, a law says what nobody has seen.
    weights: (K,) of the losses, scaled here so that kl is in nats of their average.
    objective, kl, prior: as for solve_static.
    """
    w = np.asarray(weights, float)
    floor = min(P.min(), .5 / law.m)
    return solve_static(law, w / np.abs(w).sum(), objective, starts=1 + law.m, floor=floor,
                        prior=prior, kl=kl, caps=P.max(0))


# --- Online methods that take A from extra runs: Skill-It, DoReMi, DoGE.


def skill_graph(h, steps):
    """G[i, j]: relative fall of loss i after training on group j alone, from m scratch runs."""
    before = yield Train(h.uniform, 0)
    if not all(before > 0):
        raise ValueError(f"skillit needs losses above 0, not {h.listing(before)}")
    G = np.zeros((h.m, h.m))
    for j, only_j in enumerate(np.eye(h.m)):
        after = yield Train(only_j, h.scratch_steps(steps), on=f"only-{h.groups[j]}")
        h.finished([f"only-{h.groups[j]}"])
        G[:, j] = (before - after) / before
    return G


def skillit(h, steps, rounds=10, eta=.2, window=3):
    """Skill-It (arXiv 2307.14430): A^t[i, j] = L_i^t G[i, j], G measured once, before the run.

    p^{t+1} = lmo_step(uniform, A^t + ... + A^{t-window+1}, eta), and p^1 = lmo_step(uniform, G,
    eta). A window of all rounds is the step that adds up; a shorter one is, in LMO, a step from the
    last p with A^t - A^{t-window}. Extra cost: m full runs. Paper: eta .2, window 3, a round every
    500 of 5,000 steps. The window sums losses, as the release, and counts rounds; the release
    counts evaluations, and evaluates after the first step of a round where we do after its last:
    ours are one round fresher, which moves a share by up to .14.
    rounds: updates of the mixture.  eta: step size.  window: rounds of losses summed.

    >>> G, L = np.eye(2), np.array([2., 1.])
    >>> lmo_step([.5, .5], G * L[:, None], eta=.2).round(2)
    array([0.55, 0.45])
    """
    check(rounds=rounds, eta=eta, window=window)
    parts = split(steps, rounds)
    G = yield from skill_graph(h, steps)                                # (m, m)
    A, losses = G, []
    for n in parts:
        p = lmo_step(h.uniform, A, eta)
        L = yield Train(p, n, A=A)
        losses.append(L)
        A = G * np.sum(losses[-window:], axis=0)[:, None]               # the docstring's sum


def doremi(h, steps, eta=1.0, smoothing=1e-3):
    """DoReMi (arXiv 2305.10429): A^t = diag(excess loss of a proxy over a reference).

    The reference is a scratch model trained at equal shares; the proxy is another, trained on a
    weighted loss. Excess is clipped at 0 token by token, then averaged over the group's tokens.
    Each proxy step: w <- lmo_step(w, A, eta), w <- (1 - smoothing) w + smoothing / m, then a step
    on sum_j w_j L_j with the new w. The main run samples the average of w over all steps. LMO
    drops smoothing and averaging. Extra cost: 2 full runs and one more forward pass per proxy
    step. Paper: eta 1, smoothing 1e-3; Aioli's scripts use eta .01 and clip per group. The
    release differs: it scores a group not met yet with log(vocabulary) (here 0), has the first,
    uniform w in its average too, and weighs the loss by tokens, not by the mean of each group.
    At 1,000 steps the second is worth 1/1,000 of w.
    eta: step size.  smoothing: share of the uniform mixture in w.

    >>> w = lmo_step([.5, .5], np.diag([.2, 0.]), eta=1.)             # group 0 is behind
    >>> (.999 * w + .001 / 2).round(4)
    array([0.5498, 0.4502])
    """
    check(eta=eta, smoothing=smoothing)
    n = h.scratch_steps(steps)
    yield Train(h.uniform, n, on="reference")
    h.finished(["reference"])
    w, excess, total = h.uniform, np.zeros(h.m), np.zeros(h.m)
    for _ in range(n):
        signals = yield Peek(h.uniform, n, on="proxy", against="reference")
        absent = np.isnan(signals["excess"])
        excess = np.where(absent, excess, signals["excess"])            # it keeps its last score
        A = np.diag(excess)                                             # (m, m)
        w = (1 - smoothing) * lmo_step(w, A, eta) + smoothing * h.uniform
        yield Update(w, on="proxy")
        total += w
    yield Train(total / n if n else w, steps)


def doge(h, steps, mu=.05, cap=5.0):
    """DoGE (arXiv 2310.15393): A^t[i, j] = <gradient of held-out loss i, of loss j>.

    Each step of a proxy run, as released: the group gradients and the mean target gradient are
    clipped to norm 1; score_j = lr * mean_i A[i, j] / (mean clipped norm), cut to [0, cap * lr];
    w <- egd(w, score, 1 / mu). The main run samples the average of w. LMO keeps the step on A and
    drops the cuts, the norm and the average. Extra cost: 1 full run with twice the gradients, a
    backward pass per group over its own share of the batch.

    Where the release differs. (1) Its proxy steps on sum_j w_j times the *clipped* gradients; ours
    on sum_j w_j gradient_j, the gradient of the weighted loss, as in the paper. The two part while
    gradients are longer than 1 (perplexity 28.08 there, 27.88 here; python+csv, one seed). (2) A
    group that is not in the batch keeps its last gradient there; it counts as 0 here, as in
    Aioli's port. (3) It holds out training text as target; ours is validation windows. (4) Its
    settings come in pairs, mu .05 with clipping at norm 1 (here) and mu .01 with clipping at 5;
    --mu .01 alone is neither.
    mu: inverse step size.  cap: upper cut of a score, in learning rates.

    >>> A = 3e-3 * np.array([[.9, .1]])                               # one loss: the mean; lr .003
    >>> lmo_step([.5, .5], A, eta=1 / .05).round(3)
    array([0.512, 0.488])
    """
    check(mu=mu, cap=cap)
    n = h.scratch_steps(steps)
    w, total = h.uniform, np.zeros(h.m)
    for _ in range(n):
        signals = yield Peek(h.uniform, n, on="proxy")
        lr, norm = h.last.lr, np.nan_to_num(signals["norm"])
        target_norm = signals["target_norm"]

        clipped = np.minimum(1, 1 / np.maximum(norm, 1e-12))            # (m,), to norm 1
        target_clipped = min(1, 1 / max(target_norm, 1e-12))
        A = np.nan_to_num(signals["A"]) * (clipped * target_clipped) / h.m       # absent columns 0
        score = lr * A.sum(0) / (np.minimum(norm, 1).mean() + 1e-6)
        row = np.clip(score, 0, cap * lr)[None]                         # of the mean loss, (1, m)
        w = lmo_step(w, row, 1 / mu)
        yield Update(w, on="proxy")
        total += w
    yield Train(total / n if n else w, steps)


# --- Aioli as published: A is measured inside the run, by short probes.


def normalise(A):
    """Aioli's scale-free A: lift so that no entry is negative, then divide by the sum.

    The lift keeps the order of the column sums but not their ratios. The division makes them sum to
    1, so that one step moves log-odds by at most eta. If all entries are 0 by then, they stay so:
    "no update" (the release divides 0 by 0).
    """
    A = A - min(A.min(), 0)
    return A / A.sum() if A.sum() != 0 else np.zeros_like(A)            # NaN stays: see lmo_step


def fit_linear_dynamic(mixtures, drops):
    """Fit L^{t+1} = L^t - A p by least squares: mixtures (R, m), drops (R, K) -> A (K, m).

    No intercept: as shares sum to 1, a constant is the same number added to every entry of a row of
    A. With R = m mixtures this is the paper's solve. Raises ValueError when the mixtures do not
    tell the groups apart.
    """
    P = np.asarray(mixtures, float)
    if np.linalg.matrix_rank(P) < P.shape[1]:
        raise ValueError(f"{len(P)} mixtures do not tell {P.shape[1]} groups apart; add different "
                         "ones")
    solution, *_ = np.linalg.lstsq(P, np.asarray(drops, float), rcond=None)
    return solution.T


def probe_counts(arms, m, f, windows):
    """Whole windows of each probe: about f of them on the probed group, the rest spread evenly.

    arms: (k,) the groups that may be trained on -> (k, m) integers, rows sum to `windows`. Raises
    ValueError for f <= 1/k (the probe would not favour its group) or too few windows for that.
    """
    k = len(arms)
    probed = round(f * windows)
    rest = windows - probed
    largest_other = -(-rest // (k - 1))
    if not 1 / k < f <= 1 or probed <= largest_other:
        raise ValueError(f"probes: f = {f} with {k} groups and {windows} windows per probe does "
                         f"not favour the probed group; choose 1/{k} < f <= 1, or raise --probe "
                         "or --batch")
    counts = np.zeros((k, m), int)
    for row, j in enumerate(arms):
        others = np.roll([a for a in arms if a != j], -row)             # the odd window rotates
        counts[row, others] = np.diff(np.arange(k) * rest // (k - 1))
        counts[row, j] = probed
    return counts


def learn_params(h, arms, f=.75, sweeps=2, probe=4, diagonal=False):
    """LearnParams (the paper's Algorithm 2): measure A by training on skewed mixtures -> A (m, m).

    For each probe: `probe` steps of the run itself with about f of group j, then the fall of every
    loss, nats per probe. A is the least-squares solution over the mixtures as realised in whole
    windows; if the law is linear it is exact. Nothing is rolled back, so measuring costs
    validations only. Order: a random permutation of the groups, then the same one backwards, and
    so on (the paper draws each anew), so that a steady drift of A over the sweeps cancels. Columns
    of groups outside `arms` are 0. diagonal: as if no group affected another, A_jj = fall of L_j /
    its own share.
    """
    counts = probe_counts(arms, h.m, f, probe * h.batch)                # (k, m)
    shares, drops = [], []
    order, before = None, h.losses()[-1]
    for sweep_number in range(sweeps):
        forwards = sweep_number % 2 == 0
        order = h.rng.permutation(len(arms)) if forwards else order[::-1]
        for row in order:
            after = yield Train(counts[row] / counts[row].sum(), probe, probe=True)
            shares.append(h.last.share[arms])
            drops.append(before - after)
            before = after

    if diagonal:
        probed = np.equal(shares, np.max(shares, axis=1, keepdims=True))
        shares = np.where(probed, shares, 0)
    A = np.zeros((h.m, h.m))
    A[:, arms] = fit_linear_dynamic(shares, drops)
    return np.diag(np.diag(A)) if diagonal else A


def aioli_rounds(h, steps, rounds=10, eta=.2, ema=0.0, f=.75, sweeps=2, probe=4, diagonal=False,
                 objective="loss", start=None, rows=None):
    """The paper's Algorithm 1 (arXiv 2411.05735), with every knob: measure A, step, train; repeat.

    p^t = lmo_step(p^{t-1}, normalise(A^t), eta), with A^t from learn_params; the rest of round t
    trains on p^t. Probe steps are part of the budget. Extra cost: sweeps * m + 1 validations a
    round. The release accumulates as here. Its option --ema averages A and starts from uniform
    every round: for m = 2 and eta .2 no share can then leave [.45, .55], in general
    [1 / (m - 1 + e^eta), e^eta / (m - 1 + e^eta)].
    start (m,): the first mixture (default: uniform); its groups at 0 are not trained on. rows: the
    losses that count (default: all). Raises ValueError for probes that do not fit into a round.
    rounds: T, updates of the mixture.  eta: step size.  ema: weight of the past (0: steps add up).
    f: share of the probed group.  sweeps: probes per group and round.  probe: steps per probe.
    diagonal: no group affects another.
    objective: loss, perplexity (row i of A times exp(L_i)), bits (per byte), or weights as 2+1+1.

    >>> A = np.array([[3., -1.], [0., 1.]])
    >>> lmo_step([.5, .5], normalise(A), eta=.2).round(3)
    array([0.521, 0.479])
    """
    check(rounds=rounds, eta=eta, ema=ema, f=f, sweeps=sweeps, probe=probe)
    form, w = what_counts(h, objective)
    p = h.uniform if start is None else start
    rows = np.arange(h.m) if rows is None else rows
    arms = np.flatnonzero(p)
    uniform = (p > 0) / len(arms)                                       # over these
    probe_steps = check_probes(h, arms, steps, rounds, f, sweeps, probe)

    average = None
    yield Train(p, 0)
    for n in split(steps, rounds):
        A = yield from learn_params(h, arms, f, sweeps, probe, diagonal)            # (m, m)
        weighted = importance(h.losses()[-1], form, w)[:, None] * A
        scaled = np.zeros((len(rows), h.m))
        scaled[:, arms] = normalise(weighted[np.ix_(rows, arms)])       # entries sum to 1

        if ema:
            average = scaled if average is None else (1 - ema) * scaled + ema * average
            p = lmo_step(uniform, average, eta)
        else:
            p = lmo_step(p, scaled, eta)
        yield Train(p, n - probe_steps, A=A)


PUBLISHED = {                   # by groups; a round is 5,000 steps / 20, for seven 40,000 / 200
    2: dict(round=250, eta=.2, ema=.1, f=.625, sweeps=4, probe=4),
    3: dict(round=250, eta=.1, ema=.5, f=.5, sweeps=4, probe=6),
    7: dict(round=200, eta=1.0, ema=.1, f=.75, sweeps=2, probe=10),
}


def published(m, steps, ema=False):
    """Settings of the paper's scripts for the nearest number of groups, with rounds as long as
    theirs, or as a round's probes where these take longer -> keyword arguments of aioli_rounds."""
    settings = dict(PUBLISHED[min(PUBLISHED, key=lambda known: abs(known - m))])
    probes = settings["sweeps"] * settings["probe"] * m
    settings["rounds"] = max(1, steps // max(settings.pop("round"), probes))
    return settings | ({} if ema else {"ema": 0.0})


def aioli_published(h, steps, ema=False, objective="loss", start=None):
    """Aioli as published: aioli_rounds with the settings of its scripts, by number of groups.

    A run of 4,000 steps has 16 rounds for two or three groups and 20 for seven; probes take 13, 29
    and 70 per cent of it.
    ema: average A, as the release can.
    objective: loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    """
    yield from aioli_rounds(h, steps, start=start, objective=objective,
                            **published(h.m, steps, ema))


def aioli_static(h, steps):
    """Ablation: A measured once, at the start; aioli_published with one round."""
    yield from aioli_rounds(h, steps, **published(h.m, steps) | {"rounds": 1})


def aioli_diagonal(h, steps):
    """Ablation of aioli_published: off-diagonal entries of A are 0, as in DoReMi."""
    yield from aioli_rounds(h, steps, **published(h.m, steps), diagonal=True)


def aioli_ood(h, steps, target=""):
    """aioli_published for a group not trained on: only row `target` of A counts, p_target = 0.

    Compare it with uniform over the others.
    target: name of the group to do well on (default: the last).
    """
    target = target or h.groups[-1]
    if target not in h.groups:
        raise ValueError(f"no group {target!r} to aim at; there are {', '.join(h.groups)}")
    if h.m < 3:
        raise ValueError("aioli_ood needs a group to aim at and at least two to train on; "
                         "give three groups")
    i = h.groups.index(target)
    start = (np.arange(h.m) != i) / (h.m - 1)
    yield from aioli_rounds(h, steps, start=start, rows=[i], **published(h.m - 1, steps))


# --- Aioli as it is here by default: A from a law of the run's own losses.


class Forecast(NamedTuple):
    """Losses at the end of a run that goes on at mixture p, from what the run has shown so far:

        L_i(p) = c_i + b_i / sqrt(E_i(p))
        E_i(p) = (1 - o_i) (read_i + (1 - d) p_i) + o_i p_i,    d = sum of read

    read_i is what the run has read of group i, d of all, as shares of the whole run. Tokens alone
    do not decide a loss, as models forget: a part o_i of what is known lasts only while the group
    keeps its share, as if all of the run had had the present mixture. b >= 0 and 0 <= o <= 1, so
    every L_i is convex in p. Why this form: paper/README.md, "How horizon works".
    """
    c: np.ndarray               # (m,) irreducible loss, >= 0
    b: np.ndarray               # (m,)
    o: np.ndarray               # (m,)
    read: np.ndarray            # (m,)

    @property
    def m(self):
        """Groups trained on."""
        return len(self.read)

    def effective(self, p):
        """E, (..., m)."""
        left = 1 - self.read.sum()
        return np.maximum((1 - self.o) * (self.read + left * p) + self.o * p, 1e-4)

    def __call__(self, P):
        return self.c + self.b * self.effective(P) ** -.5               # (..., m)

    def gradient(self, p):
        """dL_i/dp_j, (m, m), diagonal."""
        per_share = (1 - self.o) * (1 - self.read.sum()) + self.o
        return np.diag(-.5 * self.b * self.effective(p) ** -1.5 * per_share)


def fit_forecast(read, share, losses):
    """Fit Forecast to one run. Deterministic; ValueError for fewer than three validations.

    read: (t, m) what the run had read by each validation, as shares of the whole run.  share:
    (t, m) the mixture just before it.  losses: (t, m), nats per token.

    For a given o the law is linear in c and b >= 0, so eleven values of o are tried, per group.
    While the mixture does not change, o cannot be told: a prior, ((o - .3) / .3)^2, is added to
    the squared errors in units of their noise.
    """
    read, share, L = (np.asarray(array, float) for array in (read, share, losses))
    if len(L) < 3:
        raise ValueError(f"a forecast needs three validations or more, not {len(L)}; "
                         "raise --rounds or --wait")
    if L.min() < 0:
        raise ValueError(f"a forecast is of losses, 0 or more, not of {L.min():.4g}")
    o = np.linspace(0, 1, 11)[:, None, None]                            # (11, 1, 1)
    effective = (1 - o) * read + o * read.sum(1, keepdims=True) * share             # (11, t, m)
    c, b, squared_errors = fit_line(np.maximum(effective, 1e-4) ** -.5, L)          # (11, m) each
    misfit = squared_errors / validation_noise(L) + ((o[:, 0] - .3) / .3) ** 2
    best, group = misfit.argmin(0), np.arange(L.shape[1])
    return Forecast(c[best, group], b[best, group], o[best, 0, 0], read[-1])


def fit_line(F, L):
    """L = c + b F by least squares over t validations, b and c >= 0: F (k, t, m) or (k, t, 1), L
    (t, m) -> c, b and the squared errors, (k, m) each."""
    f, y = F - F.mean(1, keepdims=True), L - L.mean(0)
    b = np.maximum((f * y).sum(1) / np.maximum((f * f).sum(1), 1e-12), 0)
    c = L.mean(0) - b * F.mean(1)
    through_origin = (F * L).sum(1) / (F * F).sum(1)                    # where c would be negative
    b, c = np.where(c < 0, through_origin, b), np.maximum(c, 0)
    return c, b, ((c[:, None] + b[:, None] * F - L) ** 2).sum(1)


def validation_noise(L):
    """Size of the noise in validation losses L (t, m), nats^2, one number for all groups.

    From the median of squared second differences, which the few that a change of mixture makes do
    not move (so about half of a variance). At least .01 nats, squared.
    """
    second_differences = np.diff(L, n=2, axis=0)                     # 1 + 4 + 1 times as noisy
    return max(np.median(second_differences ** 2) / 6, 1e-4)


def past_warmup(warmup, read):
    """Which validations, after shares `read` of the run, a forecast may be fitted to.

    Those from four fifths of the warm-up on: before, the rising rate decides the loss, not tokens.
    """
    return (read > 0) & (read > .8 * warmup - 1e-9)


def forecast_end(h, total_windows):
    """The Forecast for a run of `total_windows`, from what the main run has shown so far."""
    read = h.read() / total_windows                                     # (t, m)
    share = np.array([row.share for row in h.trained()])
    ready = past_warmup(h.warmup, read.sum(1))
    return fit_forecast(read[ready], share[ready], h.losses()[ready])


def aioli(h, steps, rounds=25, wait=.16, last=.4, eta=.5, objective="perplexity", start=None):
    """Aioli with an A that lasts: train a round, fit A to the run so far, step on its column sums.

    The loop of the paper, p^t = lmo_step(p^{t-1}, normalise(exp(L) A^t), eta m). Three things are
    not as published. (1) A probe of a few steps shows mostly recency: a group helps itself, and it
    is soon forgotten. Here every stretch of training is a measurement, and one law is fitted to
    them all by least squares: a Forecast, which tells what stays from what is forgotten. A^t is
    minus its slope at p: what more of a group in the rest of the run is worth at its end, to that
    group's own loss, so that A is diagonal. (2) Row i of A counts exp(L_i) times, L_i being the
    forecast, as perplexity is what is reported. (3) The step is eta * m, as column sums are 1/m in
    the mean, and rounds are shares of the run, so that nothing depends on m or the length.
    Training is uniform until `wait` and stays where it is after `last`, where the falling
    learning rate hides what tokens do. No probes, no extra runs: extra cost rounds * last
    validations.
    rounds: parts of the run; the mixture changes until `last`.
    wait: share of the run before a forecast.
    last: share of the run after which the mixture is fixed.  eta: step size, per group.
    objective: perplexity, loss, bits (per byte), or weights of the groups, as 2+1+1.
    Raises ValueError unless some round ends between `wait` and `last`, with three validations by
    then after four fifths of the warm-up.
    """
    check(rounds=rounds, wait=wait, last=last, eta=eta)
    form, w = what_counts(h, objective)
    start = h.uniform if start is None else start                       # groups at 0 stay there

    def update(law, p):
        A = -law.gradient(p) * (p > 0)                                  # (m, m), diagonal
        weighted = importance(law(p), form, w)[:, None] * A
        return lmo_step(p, normalise(weighted), eta * (p > 0).sum()), A

    yield from forecasting(h, steps, rounds, wait, last, update, start)


def forecasting(h, steps, rounds, wait, last, update, p):
    """The rounds of a method with a Forecast: train, forecast, `update` p by it; then stay."""
    parts = split(steps, rounds)
    ends = np.cumsum(parts)                                         # (rounds,) steps done by then
    planned = sum(ends <= last * steps)
    check_validations(h, steps, parts, first=sum(ends < wait * steps), planned=planned)

    windows_before = sum(row.windows.sum() for row in h.trained())      # where with_prior trained
    total_windows = windows_before + steps * h.batch
    A = None
    for done, n in zip(ends[:planned], parts[:planned]):
        yield Train(p, n, A=A)
        if done >= wait * steps:
            law = forecast_end(h, total_windows)
            p, A = update(law, p)
    yield Train(p, steps - sum(parts[:planned]), A=A)


# === Part two: methods beyond the paper, each on its own.

# --- That measure nothing: a mixture by hand, or by the size of the groups.


def fixed(h, steps, mixture=""):
    """A mixture of your own, for the whole run. A^t = 0. Extra cost: none.

    mixture: shares joined by +, in the order of the groups, scaled to sum 1 (default: equal).
    """
    yield Train(parse_mixture(mixture, h.groups) if mixture else h.uniform, steps)


def natural(h, steps, alpha=1.0):
    """Token shares, p_j = n_j^alpha / Z: alpha = 1 repeats all groups equally often, 0 is uniform.

    In LMO: A^t = 0 and the prior is not uniform; egd(uniform, log n, alpha). Extra cost: none.
    alpha: temperature form, 1 / T (multilingual models use .3 to .7).

    >>> egd([.5, .5], np.log([9., 1.]), eta=.5)
    array([0.75, 0.25])
    """
    check(alpha=alpha)
    yield Train(egd(h.uniform, np.log(h.sizes), alpha), steps)


def unimax(h, steps, epochs=4.0):
    """UniMax (arXiv 2304.09151): as equal as repetition allows, no group read over `epochs` times.

    p = project(uniform, caps), cap_j = epochs n_j / tokens of the run: text is shared out equally,
    and what a group at its cap leaves goes to the others. In LMO: A^t = 0, and caps on p. A run too
    long for all text together (caps sum to less than 1) is natural, and repeats more often. Extra
    cost: none. The paper counts characters, and fills the groups in the order of their size.
    epochs: how often a group may be read; as a --prior, in each half run that it is learnt on.
    Raises ValueError where the History does not know how many tokens a window has.

    >>> project([.25] * 4, caps=[.1, .2, 5., 9.])
    array([0.1 , 0.2 , 0.35, 0.35])
    """
    check(epochs=epochs)
    yield Train(project(h.uniform, caps_of(h, steps, epochs)), steps)


# --- Online, without extra runs: A from losses, from gradients, or from a law of the losses.


def perplexity_weighted(h, steps, rounds=10, eta=.5):
    """A control that measures no A: more of the groups whose perplexity is high, round by round.

    A^t = normalise(diag(exp(L^t))): as if a group helped itself only, and all alike. What measures
    A has to do better. No source; such weights are folklore. Extra cost: a validation a round.
    rounds: updates of the mixture.  eta: step size.
    """
    check(rounds=rounds, eta=eta)
    p, parts = h.uniform, split(steps, rounds)
    L = yield Train(p, 0)
    for n in parts:
        A = normalise(np.diag(importance(L, "perplexity")))
        p = lmo_step(p, A, eta)
        L = yield Train(p, n, A=A)


def odm(h, steps, rounds=50, ema=.9, released=False):
    """Online Data Mixing (arXiv 2312.02406): a bandit, Exp3, whose reward for a group is its loss.

    A^t = diag(R), R <- ema R + (1 - ema) L / p. With m groups and e_t = min(1 / m, sqrt(log m /
    (m t))), p^t = (1 - m e_t) lmo_step(uniform, A^t, e_{t-1}) + e_t: no group has less than e_t,
    and p is uniform while t <= m log m. As e_t falls and R does not grow, p goes back to uniform in
    the end: at ema .9, and while losses stay, log-odds are at most m e_{t-1} (max L - min L). Extra
    cost: a validation a round.

    The release (--released) rewards perplexity, exp(L), undivided, and is proportional, not
    exponential: p^t = (1 - m e_t) R / sum R + e_t, in LMO egd(uniform, log R, 1), so that a factor
    on R does not matter; it keeps adapting. Its e_t is a step older. Both are rules of a bandit,
    which sees, step by step, the training losses of what was drawn. Here t counts rounds, and each
    shows validation losses of all groups, so that L / p, which corrects for groups that are seldom
    drawn, only holds large shares back.
    rounds: updates of the mixture.  ema: weight of the past.  released: the rule of the release.

    >>> R, floor = np.exp([2., 1.]), .1
    >>> ((1 - 2 * floor) * R / R.sum() + floor).round(3)
    array([0.685, 0.315])
    """
    check(rounds=rounds, ema=ema)
    R, floor = np.zeros(h.m), 1 / h.m
    for t, n in enumerate(split(steps, rounds), start=1):
        eta, floor = floor, min(1 / h.m, np.sqrt(np.log(h.m) / (h.m * t)))
        A = np.diag(R)
        if released:
            p = R / R.sum() if R.any() else h.uniform
        else:
            p = lmo_step(h.uniform, A, eta)
        p = (1 - h.m * floor) * p + floor
        L = yield Train(p, n, A=A)
        reward = importance(L, "perplexity") if released else L / p
        R = ema * R + (1 - ema) * reward


def grape(h, steps, rounds=25, eta=1.5, robust=5.0, smoothing=1e-3):
    """GRAPE (arXiv 2505.20380): DoGE inside the run, and a second player who weighs the losses.

    With G[i, j] = <gradient of log loss i, gradient of loss j>: z <- egd(z, -G p, robust), then
    smoothed, gives more weight to the losses that p lowers least, relative to their size;
    A^t = diag(z) G, and p <- lmo_step(p, A^t, eta). Elsewhere rows count alike, or as --objective
    says; here an opponent weighs them, so that none lags. Extra cost, each round: a validation, and
    on a batch that is not trained on the gradients of all groups and targets. The release: eta 1.5,
    robust 5 or 10, a round every 100 steps.

    Where the release differs. (1) For the step of p it draws the target batch at z, and takes the
    gradient of the log of its mean loss, sum_i z_i gradient_i / sum_i z_i L_i; here each gradient
    is divided by its own loss in both steps. (2) L_i is there the loss of the batch, here that of
    the last validation. (3) It draws 32 windows of each group and target; here all groups share
    one batch, and one that is not in it counts as 0, as in `doge`. (4) It clips each gradient to
    norm 1 or 2 before the products, which its step sizes are for; here they are as they are.
    rounds: updates of the mixture.  eta: step size.  robust: step size of the second player.
    smoothing: share of the uniform weights in z.

    >>> G = np.array([[.3, .1], [0., .1]])
    >>> z = egd([.5, .5], -G @ [.5, .5], eta=5.)                    # loss 1 falls less
    >>> z.round(3)
    array([0.321, 0.679])
    >>> lmo_step([.5, .5], z[:, None] * G, eta=1.5).round(3)
    array([0.499, 0.501])
    """
    check(rounds=rounds, eta=eta, robust=robust, smoothing=smoothing)
    parts = split(steps, rounds)
    p = z = h.uniform
    L = yield Train(p, 0)
    for n in parts:
        if not all(L > 0):
            raise ValueError(f"grape needs losses above 0, not {h.listing(L)}")
        signals = yield Peek(h.uniform, steps, on="main")
        G = np.nan_to_num(signals["A"]) / L[:, None]                    # absent columns 0
        z = (1 - smoothing) * egd(z, -G @ p, robust) + smoothing * h.uniform
        A = z[:, None] * G
        p = lmo_step(p, A, eta)
        L = yield Train(p, n, A=A)


def horizon(h, steps, rounds=25, wait=.16, last=.4, reach=.5, floor=.02, objective="loss"):
    """Ours: what the whole rest of the run does for each loss, forecast and minimised each round.

    The law and the rounds are those of `aioli`; the solver is direct. A step moves no log share by
    more than `reach` before they are scaled to sum 1 (which also keeps one bad forecast from
    mattering, and shows the law a mixture that it has not met). A^t = minus the law's gradient at
    p. Extra cost: rounds * last validations. Settings as aioli.
    reach: largest change of a log share.  floor: least share of a group in a plan.
    objective: average loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    Raises ValueError as aioli does.
    """
    check(rounds=rounds, wait=wait, last=last, reach=reach)
    check_floor(floor, h.m)
    form, w = what_counts(h, objective)

    def update(law, p):
        plan = solve_static(law, w, form, floor=floor)
        move = np.clip(np.log(plan / p), -reach, reach)
        p = egd(p, move, 1.0)                                           # p e^move, scaled
        return p, -law.gradient(p)

    yield from forecasting(h, steps, rounds, wait, last, update, h.uniform)


def ado(h, steps, rounds=25, wait=.16, floor=.01):
    """ADO (arXiv 2410.11820): more of the groups that, by a law of their own losses, learn fastest.

    The law is L_i = c_i + b_i n^-a_i, n all that the run has read. A^t = diag(s), s_i = max(a_i,
    .05) (L_i - c_i): its fall per log n. The solver is proportional: rho = s * natural *
    sqrt(read of late), scaled, raised to `floor`, scaled again, and p = .9 mean + .1 rho, with the
    mean over all steps before of rho, which is natural until `wait`. Extra cost: a validation a
    round. Its nearest relative is `aioli`, which looks to the end of the run, and at a group's own
    tokens. A law of all tokens does not: a group with less learns less, and so gets less still.

    As the release does, and the paper does not, it scales after the floor, which leaves less than
    that; and it averages rho. The paper's mean of p, of which .9 is the mean itself, hardly moves:
    to go half of the way takes it 1,000 times the steps so far. Where the release differs. (1) It
    fits the training losses of all steps, smoothed, every 1,000 steps, with log c >= .5; here it is
    validation losses, each round, and rho stays within a round. With rounds of one step and the
    release's law the mixtures would be the release's. (2) Its first fit, at step 1,000, leaves out
    1,000 steps and so has a point or none; here, three.
    rounds: validations in a run.  wait: share of the run on natural shares.
    floor: least share before averaging.
    Raises ValueError as aioli does.
    """
    check(rounds=rounds, wait=wait, floor=floor)
    parts = split(steps, rounds)
    first = sum(np.cumsum(parts) < wait * steps)
    check_validations(h, steps, parts, first=first, planned=rounds)

    total_windows = sum(row.windows.sum() for row in h.trained()) + steps * h.batch
    by_size = p = mean = late = h.sizes / h.sizes.sum()
    A, done = None, 0
    for number, n in enumerate(parts):
        if number > first:
            s = learning_speed(h, total_windows)
            A, rho = np.diag(s), s * by_size * np.sqrt(late)
            rho = np.maximum(rho / rho.sum(), floor) if rho.any() else by_size
            rho = rho / rho.sum()
            p = .9 * mean + .1 * rho
            mean = (done * mean + n * rho) / (done + n)                 # by the end of this round
        yield Train(p, n, A=A)
        late = .9 ** n * late + (1 - .9 ** n) * h.last.share
        done += n


def learning_speed(h, total_windows):
    """-dL_i / d log n now, (m,), by L_i = c_i + b_i n^-a_i fitted to validations after the warm-up.

    For a given a the law is linear in c and b >= 0, so 80 values of a are tried, per group. The
    slope is a b n^-a; as in ADO, a below .05 counts as .05. Raises ValueError for losses below 0.
    """
    n, L = h.read().sum(1), h.losses()                                  # (t,), (t, m)
    ready = past_warmup(h.warmup, n / total_windows)
    if L[ready].min() < 0:
        raise ValueError(f"ado needs losses of 0 or more, not of {L[ready].min():.4g}")
    a = np.linspace(.01, .8, 80)[:, None, None]
    _, b, squared_errors = fit_line((n[ready, None] / n[-1]) ** -a, L[ready])       # (80, m) each
    best, group = squared_errors.argmin(0), np.arange(h.m)
    return np.maximum(a[best, 0, 0], .05) * b[best, group]                          # n^-a is 1 now


# --- Static: other laws, and other ways to their minimum.


class Power(NamedTuple):
    """L_i(p) = c_i + 1 / (eps_i + sum_j a_ij p_j^g_ij), all positive (arXiv 2507.09404).

    Diminishing returns per group, and finite at p_j = 0. Convex in p where all g <= 1.
    """
    c: np.ndarray               # (K,)
    eps: np.ndarray             # (K,)
    a: np.ndarray               # (K, m)
    g: np.ndarray               # (K, m)

    @property
    def m(self):
        """Groups trained on."""
        return self.a.shape[1]

    def __call__(self, P):
        learnt = (self.a * P[..., None, :] ** self.g).sum(-1)           # (..., K)
        return self.c + 1 / (self.eps + learnt)

    def gradient(self, p):
        """dL_i/dp_j, (K, m)."""
        p = np.maximum(p, 1e-12)                                    # g < 1: infinitely steep at 0
        reducible = (self(p) - self.c)[:, None]                         # (K, 1)
        return -self.a * self.g * p ** (self.g - 1) * reducible ** 2


def power(h, steps, points=9, objective="loss", kl=0.0, mixture_prior=""):
    """As dml, with the additive power law of arXiv 2507.09404, which ranks mixtures better.

    A = minus the law's gradient at the optimum. Extra cost: as dml. Settings as dml.
    """
    law, p = yield from by_law(h, steps, fit_power_law, points, objective, kl, mixture_prior)
    yield Train(p, steps, A=-law.gradient(p))


def olmix(h, steps, points=9, objective="loss", kl=.05, mixture_prior="natural", epochs=4.0):
    """Olmix (arXiv 2602.12237): dml near a prior, and no group is read over `epochs` times.

    A = -t, as in dml; p is the least average loss + kl KL(p || prior) where p_j <= cap_j = epochs
    n_j / tokens of the run. Of a run too long for all text together (caps sum to less than 1) the
    caps are the natural mixture, as in UniMax. Extra cost: as dml. The release solves the same
    problem with a cone solver, for bits per byte of tasks, and refuses a run that is too long. Its
    runs are small and many, hundreds of 30M parameters; here they are those of the other laws. Only
    the prior keeps the proposal where they have been; a warning says where it leaves them.
    points: number of scratch runs.
    objective: average loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    kl: weight of KL(mixture || prior) against the average loss.
    epochs: how often a group may be read.
    mixture_prior: natural, uniform, or shares joined by +.
    Raises ValueError where the History does not know how many tokens a window has.
    """
    package("torch")
    check(kl=kl, epochs=epochs)
    caps, prior = caps_of(h, steps, epochs), prior_of(h, mixture_prior)
    form, w = what_counts(h, objective)

    P, L = yield from sweep(h, steps, points, least=h.m + 1)
    law = fit_log_linear(P, L)
    p = solve_static(law, w / h.m, form, prior=prior, kl=kl, caps=caps)
    for group, share, most in zip(h.groups, p, P.max(0)):
        if share > most * (1 + 1e-9):
            warnings.warn(f"olmix proposes {share:.3f} of {group}, of which no run had more than "
                          f"{most:.3f}; raise --kl or --points", stacklevel=2)
    yield Train(p, steps, A=-law.t)


class Trees(NamedTuple):
    """L_i(p) = mean_i + deviation_i (a sum of regression trees): the law of RegMix, no slope."""
    models: list                # K boosters of LightGBM
    mean: np.ndarray            # (K,) nats per token
    deviation: np.ndarray       # (K,)

    def __call__(self, P):
        scores = [model.predict(P) for model in self.models]
        return self.mean + self.deviation * np.column_stack(scores)     # (R, K)


def regmix(h, steps, points=9, objective="loss", mixture_prior="natural"):
    """RegMix (arXiv 2407.01492): trees fitted to a sweep's objective, minimised by random search.

    A^t: none; the law is a table, of the boxes into which trees cut the simplex. The solver is the
    mean of the best of 100,000 draws (see `search`), which may lie in another box than they. Extra
    cost: `points` full runs. Needs LightGBM (pip install lightgbm).

    Where the release differs. (1) It has 512 runs of 1M parameters; here they are those of the
    other laws. (2) It wants 20 runs in each leaf of a tree: with fewer than 40 no tree can split.
    Here a leaf has one run in 25, and up to 49 runs that is a single one. With nine runs such trees
    repeat the losses of the runs and promise nothing below the best, and the proposal is about the
    middle of its box: what `grid` takes, blurred, and with seven groups often worse. (3) It stops
    adding trees by the loss of the runs that it is tested on; here they are all fitted. (4) It
    searches all of the simplex; here where runs have been. (5) Its objective is the loss of one
    group, Pile-CC.
    points: number of scratch runs.
    objective: average loss, perplexity, bits (per byte), or weights of the groups, as 2+1+1.
    mixture_prior: what the draws are around: natural, uniform, or shares joined by +.
    Raises ValueError without LightGBM, before anything trains.
    """
    package("lightgbm")
    prior = prior_of(h, mixture_prior)
    form, w = what_counts(h, objective)
    P, L = yield from sweep(h, steps, points, least=2)
    yield Train(search(P, L, prior, form, w / h.m), steps)


def search(P, L, prior, objective="loss", weights=None, draws=100_000, best=128):
    """The mean of the `best` mixtures, by trees fitted to runs P (R, m), L (R, K) -> p (m,).

    They are of the runs and of `draws` draws from Dirichlet(prior), as in RegMix, scaled to be
    above the least share of any run (or half of 1/m). Draws with more of a group than any run had
    are left out; if few are left, the best are one in a hundred. The draws are always the same.
    prior: (m,), all above 0, sum 1.  weights: (K,) of the losses, default equal.  objective: as
    for solve_static. Warns where the trees tell no two mixtures apart. Raises ValueError as
    fit_trees.
    """
    w = np.full(L.shape[1], 1 / L.shape[1]) if weights is None else np.asarray(weights, float)
    check_form(objective, w)
    values = np.array([goal(losses, objective, w) for losses in L])
    law = fit_trees(P, values[:, None])

    floor = min(P.min(), .5 / P.shape[1])
    Q = floor + (1 - P.shape[1] * floor) * np.random.default_rng(0).dirichlet(prior, draws)
    Q = np.vstack((Q[(Q <= P.max(0)).all(1)], P))
    predicted = law(Q)[:, 0]
    if not np.ptp(predicted):
        warnings.warn(f"the trees predict {predicted[0]:.4g} for all of {len(Q)} mixtures, as "
                      f"{len(P)} runs give them nothing to split, so that the proposal is a mean "
                      "of draws; give them more runs", stacklevel=2)
    few = min(best, 1 + len(Q) // 100)
    return Q[predicted.argsort(kind="stable")[:few]].mean(0)            # of equals the first


# === Part three: what methods share. (Skip it at first.)

# --- Settings of methods.

LIMITS = {                      # least and largest value of a setting, whichever method has it
    "alpha": (-100, 100), "points": (1, 200), "rounds": (1, np.inf), "window": (1, np.inf),
    "eta": (0, np.inf), "smoothing": (0, 1), "mu": (1e-9, np.inf), "cap": (0, np.inf),
    "ema": (0, 1), "f": (0, 1), "sweeps": (1, np.inf), "probe": (1, 10 ** 6), "wait": (0, 1),
    "last": (0, 1), "reach": (0, np.inf), "floor": (0, 1), "first": (0, 1),
    "kl": (0, np.inf), "epochs": (1e-9, np.inf), "robust": (0, np.inf),
}


def check(**settings):
    """Raise ValueError for a setting out of range. Methods call it before anything trains."""
    for name, value in settings.items():
        if name == "objective" and value not in (*FORMS, "bits") and not len(shares_in(value)):
            raise ValueError(f"--objective {value!r} is neither loss, perplexity nor bits, nor "
                             "weights of the groups joined by +, as 2+1+1")
        if name not in LIMITS:
            continue
        least, most = LIMITS[name]
        if not (least <= value <= most and value < np.inf):             # NaN is neither
            allowed = f"at least {least}" if most == np.inf else f"from {least} to {most}"
            raise ValueError(f"--{name} {value} is out of range; it must be {allowed}")


def check_probes(h, arms, steps, rounds, f, sweeps, probe):
    """Raise ValueError where probes do not fit into a round, or do not tell groups apart.

    Returns the steps of a round that are probes.
    """
    if len(arms) < 2:
        raise ValueError("aioli needs at least two groups to train on; give more, or a mixture to "
                         "start from that leaves more of them in")
    probe_counts(arms, h.m, f, probe * h.batch)
    probe_steps = sweeps * probe * len(arms)
    shortest = min(split(steps, rounds))
    if shortest < probe_steps:
        raise ValueError(f"probes: {steps} steps in {rounds} rounds leave {shortest} a round, but "
                         f"probing takes {sweeps * probe} for each of {len(arms)} groups; "
                         f"raise --steps to {rounds * probe_steps}")
    return probe_steps


def check_validations(h, steps, parts, first, planned):
    """Raise ValueError if the first forecast, after round `first`, is too late or too early."""
    if first >= planned:
        raise ValueError("no round ends from --wait to --last, so that nothing is forecast; raise "
                         "--rounds or --last")
    windows = [row.windows.sum() for row in h.trained()]                # where with_prior trained
    total_windows = sum(windows) + steps * h.batch
    windows += [n * h.batch for n in parts[:first + 1]]
    count = past_warmup(h.warmup, np.cumsum(windows) / total_windows).sum()
    if count < 3:
        raise ValueError(f"{len(parts)} rounds give {count} validations up to the first "
                         "forecast, which needs 3 (none in four fifths of the warm-up counts); "
                         "raise --rounds or --wait, or lower --warmup")


def shares_in(text):
    """Numbers joined by +, of any scale, at least 0 and one above 0 -> (k,); else none, (0,)."""
    try:
        shares = np.array([float(share) for share in text.split("+")])
    except ValueError:
        return np.zeros(0)
    return shares if (shares >= 0).all() and 0 < shares.sum() < np.inf else np.zeros(0)


def parse_mixture(text, groups, flag="--mixture"):
    """Shares joined by +, in the order of the groups -> a mixture (m,). Raises ValueError."""
    p = shares_in(text)
    if len(p) != len(groups):
        raise ValueError(f"{flag} {text!r} is not {len(groups)} shares joined by +, "
                         f"one for each of {', '.join(groups)}")
    return p / p.sum()


def prior_of(h, mixture_prior):
    """natural, uniform, or shares joined by + -> a mixture (m,), all above 0. ValueError."""
    named = {"natural": h.sizes, "uniform": h.uniform}
    if mixture_prior in named:
        return check_prior(named[mixture_prior], h.m)
    return check_prior(parse_mixture(mixture_prior, h.groups, "--mixture-prior"), h.m)


def check_prior(prior, m):
    """A mixture to stay near as an array (m,) that sums to 1. Raises ValueError."""
    prior = np.asarray(prior, float)
    if prior.shape != (m,) or not (finite(prior) & (prior > 0)).all():
        raise ValueError(f"a prior must be {m} shares above 0, not {prior}")
    return prior / prior.sum()


def check_prior_counts(kl, mixture_prior):
    """Raise ValueError for a prior that would change nothing."""
    if mixture_prior and not kl:
        raise ValueError("--mixture-prior changes nothing without --kl; give it, .05 say")


# --- Caps on how often a group may be read.


def project(p, caps):
    """The mixture nearest to p under caps, argmin KL(q || p) with q <= caps: min(caps, C p), (m,).

    p, caps: (m,), caps >= 0, or inf. What is cut off the capped groups goes to the others in
    their proportions, until none is over its cap; at most m rounds, and exact. From uniform this is
    UniMax (arXiv 2304.09151). Raises ValueError where the caps do not add up to 1.

    >>> project([.5, .3, .2], caps=[.3, .4, 1.]).round(2)
    array([0.3, 0.4, 0.3])
    """
    p, caps = np.asarray(p, float), np.asarray(caps, float)
    room = caps[p > 0].sum()
    if not (caps >= 0).all() or not room >= 1 - 1e-9:
        raise ValueError(f"caps must be 0 or more and add up to 1 or more, not to {room:.4g}; "
                         "raise them, or train for fewer steps")
    if room <= 1 + 1e-12:                                           # there is no other
        return np.where(p > 0, caps, 0) / room
    capped = np.zeros(len(p), bool)
    while True:
        left = 1 - caps[capped].sum()
        q = np.where(capped, caps, p * left / p[~capped].sum())
        over = q > caps
        if not over.any():
            return q
        capped |= over


def caps_of(h, steps, epochs):
    """The largest share of each group in the `steps` to come of the main run, (m,), with which the
    whole of it reads the group at most `epochs` times.

    A run that is too long for that repeats all groups equally: then the caps sum to 1, and are the
    only mixture left. Raises ValueError where the History does not know the tokens of a window.
    """
    if not h.window:
        raise ValueError("epochs are of tokens: say how many a window has, History(window=...)")
    read = sum((row.windows for row in h.rows if row.request.on == "main"), np.zeros(h.m))
    windows = max(steps, 1) * h.batch                                   # to come
    least = (read.sum() + windows) * h.window / h.sizes.sum()           # epochs of all text
    left = max(epochs, least) * h.sizes / h.window - read               # (m,)
    caps = np.maximum(left, 0) / windows
    return caps / min(caps.sum(), 1)


def capped(h, steps, program, epochs):
    """A method, `program`, whose main run reads no group over `epochs` times: it trains on the
    mixture nearest to the one asked for (`project`) under the caps of what is left of each group,
    spread over the rest of the run.

    The method goes on from the mixture that it asked for, and its History has what was trained on:
    in LMO a lazy projection of the online step. `unimax` is capped(stratified). Probes, and batches
    that are only peeked at, have to be as they are: they are not capped, but count as read. Nor are
    extra runs. Raises ValueError as caps_of, and for a mixture whose groups do not last.
    """
    reply = None
    while True:
        try:
            request = program.send(reply)
        except StopIteration:
            return
        is_main = isinstance(request, Train) and request.on == "main"
        if is_main and request.steps and not request.probe:
            left = steps - sum(row.request.steps for row in h.trained())
            caps = caps_of(h, left, epochs)
            p = h.per_group("a mixture", request.p)
            if not caps[p > 0].sum() > 1 - 1e-9:
                raise ValueError(f"the mixture {h.listing(p)} needs more than {epochs:g} epochs of "
                                 "its groups; raise --max-epochs, or mix in others")
            if abs(p.sum() - 1) < 1e-6:                             # others the trainer refuses
                request = request._replace(p=project(p, caps))
        reply = yield request


# --- How a law is minimised.


def check_form(objective, w=1.0):
    """Raise ValueError for an objective that needs to know the groups, which a law does not, or for
    perplexity with a weight below 0: their sum has no logarithm."""
    if objective not in FORMS:
        raise ValueError(f"--objective {objective!r} is neither loss nor perplexity, which are all "
                         "that a law knows; give weights of the losses")
    if objective == "perplexity" and np.min(w) < 0:
        raise ValueError("a weight below 0 is for losses; minimise --objective loss")


def check_floor(floor, m):
    """Raise ValueError where least shares of `floor` leave m groups nothing to choose."""
    check(floor=floor)
    if floor * m >= 1:
        raise ValueError(f"a floor of {floor} leaves {m} groups nothing to choose; "
                         f"lower it below 1/{m}")


def solve_static(law, weights=None, objective="loss", starts=1, floor=0.0, prior=None, kl=0.0,
                 caps=None):
    """argmin over mixtures of f(p) + kl * KL(p || prior), floor <= p_j <= caps_j -> p (m,).

    f is sum_i w_i L_i(p), or for perplexity log sum_i w_i exp(L_i(p)), which is least where the
    sum is. With caps and KL this is the solver of Olmix (arXiv 2602.12237); there p = project(prior
    * exp(-df/dp / kl), caps).
    law: with `m`, law(p) (K,) and law.gradient(p) (K, m).  weights: (K,), default 1 each; a loss
    that should rise has a weight below 0.  objective: loss or perplexity.  starts: for a convex law
    the start does not matter; for others, `starts` > 1 adds some near the first starts - 1 corners
    and keeps the best.  prior: (m,), all above 0, default uniform.  caps: (m,), default none.
    Raises ValueError, also where the caps do not add up to 1.
    """
    check(kl=kl)
    check_floor(floor, law.m)
    w = np.ones(len(law.c)) if weights is None else np.asarray(weights, float)
    check_form(objective, w)
    prior = np.full(law.m, 1 / law.m) if prior is None else check_prior(prior, law.m)
    room = 1 - law.m * floor                                            # p = floor + room * share
    caps = (np.full(law.m, np.inf) if caps is None else np.asarray(caps, float) - floor) / room
    caps = np.where(caps == 0, 1e-200, caps)                            # 0 log 0 is no number

    def total(p, L):
        height = goal(L, objective, w)
        return height + kl * p @ np.log(p / prior) if kl else height

    def value(share):                                                # arcsinh: tame, same minimum
        p = floor + room * share
        return np.arcsinh(total(p, law(p)))

    def slope(share):
        p = floor + room * share
        L = law(p)
        pull = w if objective == "loss" else egd(w, L, 1.0)             # (K,) d goal / dL
        g = room * pull @ law.gradient(p)
        if kl:
            g += room * kl * np.log(p / prior)                          # but for a constant
        return g / np.hypot(1, total(p, L))                             # (m,)

    corners = [project(.9 * only + .1 / law.m, caps) for only in np.eye(law.m)]
    with np.errstate(over="ignore", invalid="ignore"):
        first = project(np.full(law.m, 1 / law.m), caps)
        if not np.isfinite(value(first)):                               # too steep: begin lower
            first = min(corners, key=value)
        if not np.isfinite(value(first)):
            raise ValueError("the law gives no finite number to minimise; fit it to other runs")
        ends = [descend(value, slope, start, caps) for start in (first, *corners[:starts - 1])]
        return floor + room * min(ends, key=value)


def descend(value, slope, p, caps, iterations=1000):
    """Newton's method with the metric of egd, from p to a minimum under the caps -> p (m,).

    No share reaches 0, so that each can come back. A group at its cap is held there while it
    promises more than those below theirs, or while the step would raise it. It ends when no
    mixture under the caps promises more than p: for a convex objective, <slopes, p - that
    mixture> bounds what it could still gain.
    """
    for _ in range(iterations):
        g = slope(p)                                                    # (m,)
        below = p < caps * (1 - 1e-9)
        slopes = g - g[below] @ p[below] / p[below].sum()           # against those below caps
        gap = slopes @ (p - lowest(slopes, caps))
        if not gap > 1e-11:
            break
        root = np.sqrt(p)
        curvature = root[:, None] * hessian(slope, p, g) * root         # (m, m)
        free, raised = below | (slopes > 0), True
        while np.any(raised):
            change = newton(curvature, root, slopes, gap, free)
            raised = ~below & (change > 0)
            free = free & ~raised
        near = ~below & (slopes < 0)
        change[near] = caps[near] / p[near] - 1                         # what rounding has left
        lower = line_search(value, p, change, caps)
        if np.array_equal(lower, p):
            break
        p = lower
    return p


def lowest(slopes, caps):
    """The mixture under the caps whose <slopes, p> is least: the best groups have all they may."""
    order = slopes.argsort()
    p = np.zeros(len(slopes))
    p[order] = np.diff(np.minimum(np.cumsum(caps[order]), 1), prepend=0)
    return p


def newton(curvature, root, slopes, gap, free):
    """The relative change of each share in one step, (m,): 0 where not `free`, and sums stay.

    curvature: the Hessian in units of root = sqrt(p).  slopes: (m,).  gap: what is left to gain.
    """
    inner = curvature[np.ix_(free, free)]
    eigenvalues, basis = np.linalg.eigh((inner + inner.T) / 2)
    upward = (basis * np.abs(eigenvalues)) @ basis.T                # a saddle must not attract
    damping = np.diag(np.abs(slopes[free]) + gap)               # no share moves by over 1 of it
    root = root[free]
    sides = np.column_stack((-root * slopes[free], root))
    downhill, level = np.linalg.solve(upward + damping, sides).T
    change = np.zeros(len(slopes))
    change[free] = (downhill - level * (root @ downhill) / (root @ level)) / root
    return change


def hessian(slope, p, g):
    """Second derivatives by differences of the slope, (m, m); g: the slope at p."""
    H = np.zeros((len(p), len(p)))
    for j, step in enumerate(1e-6 * p):
        beside = p.copy()
        beside[j] += step
        H[:, j] = (slope(beside) - g) / (beside[j] - p[j])
    return H


def line_search(value, p, change, caps):
    """p * (1 + size * change), size 1 halved until it goes down, or doubled while that is lower.

    No share loses more than 99 per cent, and what is over a cap goes to the others. Returns p
    itself if no size, however small, goes down.
    """
    def at(size):
        q = p * np.maximum(1 + size * change, .01)
        return np.maximum(project(q, caps), 1e-200)

    size, height = 1.0, value(p)
    while not value(at(size)) <= height + 1e-15 * abs(height):
        size /= 2
        if size < 1e-12:
            return p
    while size < 1e6 and value(at(2 * size)) < value(at(size)):
        size *= 2
    return at(size)


# --- Fitting a law to finished runs: arrays alone, mixtures (R, m) and final losses (R, K).


def package(name):
    """A package that only fits need, imported. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"fitting this law needs {name}: pip install {name}") from None


def check_runs(mixtures, losses, need):
    """Finished runs as arrays, mixtures (R, m) scaled to sum 1 and losses (R, K). ValueError."""
    P, L = np.array(mixtures, float), np.array(losses, float)
    if P.ndim != 2 or L.ndim != 2 or not need <= len(P) == len(L):
        raise ValueError(f"mixtures {P.shape} and losses {L.shape}: this law needs (runs, groups), "
                         f"at least {need} runs")
    shares_are_good = (P >= 0).all() and (P.sum(1) > 0).all() and np.isfinite(P.sum(1)).all()
    losses_are_good = finite(L).all() and (L > 0).all()
    if not (shares_are_good and losses_are_good):
        raise ValueError("mixtures must be finite, >= 0 and not all 0, and losses finite and > 0")
    return P / P.sum(1, keepdims=True), L


def fit(build, guess, mixtures, losses, delta=.02, iterations=300):
    """The law build(x), x (K, d), with the least Huber error, each loss fitted on its own.

    guess(P, y) gives the starts (d,) for one loss y (R,), of which the best end is kept. torch's
    L-BFGS in float64. delta, nats: errors beyond it count linearly, so that one run that went wrong
    does not bend the law. Warns where a loss has fewer runs than there are numbers to fit.
    """
    torch = package("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                        # small arrays lose by sharing
    ends = []
    for y in losses.T.copy():                                       # alike in memory, to the bit
        found = [polish(build, x, mixtures, y, delta, iterations) for x in guess(mixtures, y)]
        ends.append(min(found, key=lambda end: end[0]))
    torch.set_num_threads(threads)
    if not np.isfinite([error for error, _ in ends]).all():
        raise ValueError("the law finds no finite fit to these losses; leave out the largest")
    x = np.array([x for _, x in ends])
    if x.shape[1] > len(mixtures):
        warnings.warn(f"{x.shape[1]} numbers of a law are fitted to {len(mixtures)} runs, so that "
                      "it says little of mixtures between them; give it more runs", stacklevel=3)
    return build(x)


def polish(build, start, P, y, delta, iterations):
    """L-BFGS from start (d,) on the Huber error of one loss y (R,) -> error, or inf, and x (d,)."""
    torch = package("torch")
    P, y = torch.tensor(P, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    x = torch.tensor(start[None], dtype=torch.float64, requires_grad=True)          # (1, d)
    solver = torch.optim.LBFGS([x], max_iter=iterations, history_size=30, tolerance_grad=1e-10,
                               tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def error():
        predicted = build(x)(P)[:, 0]
        return torch.nn.functional.huber_loss(predicted, y, delta=delta, reduction="sum")

    def closure():
        solver.zero_grad()
        total = error()
        total.backward()
        return total

    solver.step(closure)
    end = error().item()
    return (end if finite(end) else np.inf), x.detach().numpy()[0]


def fit_log_linear(mixtures, losses, delta=.02):
    """Fit LogLinear to R finished runs: mixtures (R, m), losses (R, K), R >= m + 1. Deterministic.

    For a fixed c the law is linear, log(L - c) = t . p, so the starts are least squares at 30
    values of c, and L-BFGS polishes three of the best nine. On data made by the law its
    predictions are recovered.
    """
    P, L = check_runs(mixtures, losses, np.shape(mixtures)[1] + 1)
    fit_linear_dynamic(P, L)                            # refuses mixtures that determine no law

    def guess(P, y):
        guesses, errors = [], []
        for c in (1 - np.geomspace(1e-3, 1, 30)) * y.min():
            t, *_ = np.linalg.lstsq(P, np.log(y - c), rcond=None)   # (m,)
            guesses.append(np.append(np.log(max(c, 1e-6)), t))
            errors.append(((c + np.exp(P @ t) - y) ** 2).sum())
        order = np.argsort(errors)                                  # best first
        return [guesses[order[rank]] for rank in (0, 3, 8)]

    def build(x):
        return LogLinear(c=np.e ** x[:, 0], t=x[:, 1:])
    return fit(build, guess, P, L, delta)


def fit_power_law(mixtures, losses, delta=.02):
    """Fit Power to R finished runs: mixtures (R, m), losses (R, K). Deterministic, two starts.

    All parameters are fitted as logarithms, which keeps them positive, and the exponents g by their
    log-odds: below 1 the law is convex. (Above 1, a group of which no run had much would promise
    what none has shown.)
    """
    P, L = check_runs(mixtures, losses, 3)
    fit_linear_dynamic(P, L)                            # refuses mixtures that determine no law
    m = P.shape[1]

    def guess(P, y):
        for c_share, g in ((.5, .7), (.7, .5)):                     # c, of the lowest loss
            c = c_share * y.min()
            first = np.log([c, .9 / (y.max() - c)] + m * [.5 / (y.mean() - c)])
            yield np.append(first, m * [np.log(g / (1 - g))])       # (2 + 2 m,)

    def build(x):
        positive, g = np.e ** x[:, :2 + m], 1 / (1 + np.e ** -x[:, 2 + m:])
        return Power(c=positive[:, 0], eps=positive[:, 1], a=positive[:, 2:], g=g)
    return fit(build, guess, P, L, delta)


def fit_trees(mixtures, losses):
    """Boosted trees for each loss, with RegMix's settings (arXiv 2407.01492) -> Trees.

    1,000 trees, learning rate .01. A leaf has 20 runs, as there, or one in 25 if that is less: with
    those defaults, fewer than 40 runs are not split at all. One thread, so that the same runs give
    the same trees. Raises ValueError without LightGBM.
    """
    lightgbm = package("lightgbm")
    P, L = np.asarray(mixtures, float), np.asarray(losses, float)
    leaf = min(20, max(1, len(P) // 25))
    settings = dict(objective="regression", learning_rate=.01, min_data_in_leaf=leaf,
                    min_data_in_bin=min(3, leaf), seed=42, deterministic=True,
                    force_row_wise=True, num_threads=1, verbosity=-1)
    deviation = np.where(L.std(0) > 0, L.std(0), 1)                     # labels are float32
    models = [lightgbm.train(settings, lightgbm.Dataset(P, y, params=settings), 1000)
              for y in ((L - L.mean(0)) / deviation).T]
    return Trees(models, L.mean(0), deviation)


# --- Composition: the paper's restricted setting, where another method's mixture comes first.


def learn_mixture(method, h, steps):
    """The mixture that `method` settles on, learnt on scratch runs of `steps` steps -> p (m,).

    Its main run becomes a scratch run. A method that trains all of it on one mixture is stopped
    before it, as that mixture is known by then. Of a method that keeps moving, the average over
    the run is taken, as the paper does.
    """
    inner = h.empty(h.scratch)              # as much text as scratch runs may read
    program, reply = method(inner, steps), None
    while True:
        try:
            request = program.send(reply)
        except StopIteration:
            windows = inner.read()[-1]
            return windows / windows.sum()
        trains_main = isinstance(request, Train) and request.on == "main"
        if trains_main and request.steps == steps:
            return request.p

        renamed = request._replace(on=f"prior-{request.on}")
        if getattr(request, "against", ""):
            renamed = renamed._replace(against=f"prior-{request.against}")
        if trains_main:
            renamed = renamed._replace(total_steps=steps)
        reply = yield renamed
        if trains_main:
            h.finished([renamed.on])
        inner.rows.append(h.last._replace(request=request))


def with_prior(h, steps, method, prior, first=.5, restart="uniform", **settings):
    """`method` on top of `prior`: learn a mixture on half-length runs, train on it, then adjust.

    first: share of the main run that is trained on the mixture before `method` takes over (1: all).
    restart="uniform": the method's first p is uniform (the paper); "prior": it is the mixture.
    Raises ValueError, before anything trains where it can.
    """
    check(first=first)
    if steps < 2:
        raise ValueError(f"a prior is learnt on half of --steps {steps}, which is none; raise it")
    if restart not in ("uniform", "prior"):
        raise ValueError(f"--restart {restart!r} is neither uniform nor prior")
    n = round(first * steps)
    if restart == "prior":
        settings["start"] = h.uniform
    rehearse(h, steps, n, method, **settings)

    p = yield from learn_mixture(prior, h, h.scratch_steps(steps // 2))
    if restart == "prior":
        settings["start"] = p
        rehearse(h, steps, n, method, **settings)                       # p may lack groups
    yield Train(p, n)
    if n < steps:
        yield from method(h, steps - n, **settings)


def rehearse(h, steps, n, method, **settings):
    """Hear the method's first request after n steps, so that it complains about settings now."""
    if n == steps:
        return
    empty = h.empty()
    empty.add(Train(h.uniform, n), loss=np.ones(h.m))
    next(method(empty, steps - n, **settings))


METHODS = {f.__name__: f for f in (
    stratified, fixed, natural, unimax, skillit, doremi, doge, aioli_rounds, aioli_published,
    aioli_static, aioli_diagonal, aioli_ood, perplexity_weighted, odm, grape, grid, dml,
    power, olmix, regmix, aioli, horizon, ado)}
