"""Data mixing for language models: Aioli (arXiv 2411.05735, ICLR 2025) and every method it unifies, in one file.

A model is trained on m groups of text (code, law, maths, ...); data mixing chooses their proportions p. The paper
shows that the known methods solve one problem, Linear Mixing Optimization (LMO):

    minimise  sum_i L_i^{T+1}   over mixtures p^1 .. p^T   subject to a mixing law
    L_i^{t+1}(p) = c_i + b_i sigma(-sum_j A^t_ij p_j),     sigma = identity or exp

and differ only in where A^t comes from and in how they solve. A method here is a short generator: it yields a request
(train on this mixture, measure this signal), receives what was measured, and is otherwise the paper's pseudocode in
order. The training loop is elsewhere (train.py, or yours); this file needs numpy alone, and torch only to fit a law.

    history = History(groups=["code", "law"], sizes=[9e6, 4e6], batch=8)
    method = aioli(history, steps=1000)
    request = next(method)                      # Train(p=[.5, .5], steps=0): "measure, please"
    history.add(request, loss=[7.0, 6.9])       # what your model measured, nats per token
    request = method.send(history.reply)        # and so on until StopIteration

`x = yield request` hands out a request and goes on with its reply as x; `x = yield from other(...)` runs another
generator in place and takes what it returns.

How to read it: requests and History, `egd` (the step all online methods share), the laws, what makes an A right, then the
methods, from those that measure nothing (`stratified`) to those that measure within the run (`aioli`); `horizon`, the last, is
ours. Notation:

    m      groups of text; index j is the group trained on (columns), i the group evaluated (rows)
    p      mixture, (m,), on the simplex: share of training windows taken from each group
    L      validation loss, (m,), nats per token
    A      (m, m), A[i, j] > 0: training on group j lowers loss i
    s      scores, (m,): column sums of A, what one more unit of group j takes off the total loss
    eta    step size of the exponentiated-gradient step, 1 / (unit of s)
"""
from typing import NamedTuple

import numpy as np

# --- What a method may ask for. `on` names the run: "main", or any other name for a scratch model, which starts from
# --- main's initial weights and counts as extra cost.

class Train(NamedTuple):
    """Train `steps` steps on mixture p, then validate -> L, (m,) nats per token. steps = 0 only validates."""
    p: np.ndarray
    steps: int
    on: str = "main"
    of: int = 0                 # a scratch run's full length, for its learning-rate schedule; 0: this request is all
    probe: bool = False         # these steps are there to measure A (they still train the model)
    A: np.ndarray = None        # the matrix behind p, for the record

class Peek(NamedTuple):
    """Draw one batch at mixture p and measure without stepping -> a dict of signals, NaN for groups it lacks. of: the
    scratch run's full length in steps, as in Train.

    against="run": {"excess": (m,)}, mean over the group's tokens of max(loss - loss of that run, 0).
    otherwise:     {"A": (m, m), "norm": (m,), "target_norm": float}: A[i, j] = <gradient of loss i on validation text,
                   gradient of loss j on this batch>, the norms of the latter, and that of the mean of the former.
    """
    p: np.ndarray
    of: int
    on: str
    against: str = ""

class Update(NamedTuple):
    """One optimiser step on the batch just peeked at, group j's mean loss weighted by w_j -> None."""
    w: np.ndarray
    on: str

class Row(NamedTuple):
    """One answered request."""
    request: object
    reply: object               # what the method receives: L for Train, signals for Peek, None for Update
    share: np.ndarray           # (m,) the mixture realised in whole windows (where none were, the one asked for); fits use it
    windows: np.ndarray         # (m,) training windows this request consumed, per group
    lr: float = 0.0             # learning rate of the step to come
    seconds: float = 0.0

class History:
    """Everything measured so far, shared by all methods: one Row per request, in order.

    groups: the m names; sizes: (m,) training tokens there are; batch: windows per step; seed: of the method's own
    choices (probe order), drawn from `rng` so that a method replayed makes the same ones; runs: finished runs to fit
    laws to, mixtures (R, m) and losses (R, n), instead of a sweep.
    """

    def __init__(self, groups, sizes, batch, seed=0, runs=None):
        self.groups, self.sizes, self.batch, self.seed = list(groups), np.asarray(sizes, float), batch, seed
        self.m, self.runs, self.rows, self.rng = len(self.groups), runs, [], np.random.default_rng(seed)
        self.uniform = np.full(self.m, 1 / self.m)

    def add(self, request, loss=None, signals=None, windows=None, **measured):
        """Record the answer to a request. Without `windows` the asked mixture counts as exactly realised."""
        p = np.asarray(request[0], float)
        if windows is None:
            steps = getattr(request, "steps", isinstance(request, Peek))      # an Update's batch was drawn by its Peek
            windows = steps * self.batch * p
        windows = np.asarray(windows)
        share = windows / windows.sum() if windows.sum() else p
        self.rows.append(Row(request, signals if loss is None else np.asarray(loss, float), share, windows, **measured))

    @property
    def last(self):
        return self.rows[-1]

    @property
    def reply(self):
        return self.last.reply

    def trained(self, on="main"):
        """Rows of the Train requests on one run, oldest first."""
        return [row for row in self.rows if isinstance(row.request, Train) and row.request.on == on]

    def losses(self, on="main"):
        """(t, m) validation losses of a run, nats per token, oldest first."""
        return np.array([row.reply for row in self.trained(on)])

    def windows(self, on="main"):
        """(t, m) training windows seen by a run up to each of its measurements, per group."""
        return np.cumsum([row.windows for row in self.trained(on)], axis=0)

# --- Shared mathematics.

def egd(p, s, eta):
    """The exponentiated-gradient step, LMO's online solver: q_j = p_j exp(eta s_j) / Z.

    It is the q that maximises <s, q> - KL(q || p) / eta. p, s: (m,) -> (m,). A group at p_j = 0 stays there.

    >>> egd([.5, .5], [1., 0.], eta=.2).round(4)
    array([0.5498, 0.4502])
    """
    with np.errstate(divide="ignore"):
        z = np.log(p) + eta * np.asarray(s)
    q = np.exp(z - z.max())
    return q / q.sum()

def split(steps, rounds):
    """`steps` in `rounds` whole parts that add up to it exactly: split(10, 3) -> [3, 3, 4].

    Raises ValueError if there are more rounds than steps."""
    if not 1 <= rounds <= max(steps, 1):
        raise ValueError(f"{steps} steps cannot be cut into {rounds} rounds; raise --steps or lower --rounds")
    return np.diff(np.arange(rounds + 1) * steps // rounds).tolist()

def normalise(A):
    """Aioli's scale-free A: lift so that no entry is negative, divide by the sum; all 0 then -> zeros ("no update").

    The lift keeps the order of the column sums but not their ratios; the division makes them sum to 1, so that one
    step moves log-odds by at most eta. (The release divides 0 by 0 in the degenerate case.)
    """
    A = A - min(A.min(), 0)
    return A / A.sum() if A.sum() > 0 else np.zeros_like(A)

def fit_linear_dynamic(mixtures, drops):
    """The linear law L^{t+1} = L^t - A p by least squares: mixtures (R, m), loss drops (R, n) -> A (n, m).

    No intercept: as shares sum to 1, a constant is the same number added to every entry of a row of A. With R = m
    mixtures this is the paper's solve. Raises ValueError when the mixtures do not tell the groups apart.
    """
    P = np.asarray(mixtures, float)
    if np.linalg.matrix_rank(P) < P.shape[1]:
        raise ValueError(f"{len(P)} mixtures do not determine A for {P.shape[1]} groups; add different ones")
    return np.linalg.lstsq(P, np.asarray(drops, float), rcond=None)[0].T

def weigh(L, objective):
    """What is averaged over groups: the losses L themselves, or their perplexities exp(L). Raises ValueError."""
    if objective not in ("loss", "perplexity"):
        raise ValueError(f"objective {objective!r} is neither loss nor perplexity")
    return np.exp(L) if objective == "perplexity" else L

def solve_static(law, weights=None, objective="loss", starts=1, floor=0.0, steps=2000):
    """min over the simplex of sum_i w_i L_i(p), or of sum_i w_i exp(L_i(p)) for objective="perplexity" -> p (m,).

    EGD with the law's own gradient, the step doubled while it helps and halved when it does not. For a convex law
    the start does not matter; for laws that are not, `starts` > 1 adds some near the first starts - 1 corners. floor:
    least share.
    """
    m = law[-1].shape[-1]
    if floor * m >= 1:
        raise ValueError(f"a floor of {floor} leaves {m} groups nothing to choose; lower it below 1/{m}")
    w = np.ones(len(law.c)) if weights is None else np.asarray(weights, float)

    def value(p):
        return w @ weigh(law(p), objective)

    def descend(p):
        eta, f = 1.0, value(p)
        for _ in range(steps):
            slope = (w * np.exp(law(p)) if objective == "perplexity" else w) @ law.gradient(p)     # (m,)
            while eta > 1e-14:
                q = floor + (1 - m * floor) * egd((p - floor) / (1 - m * floor), -slope, eta)
                if (g := value(q)) < f:
                    break
                eta /= 2
            else:                                        # no step, however small, goes down: this is the bottom
                return f, p
            p, f, eta = q, g, eta * 2
        return f, p

    corners = [floor + (1 - m * floor) * (.9 * only + .1 / m) for only in np.eye(m)[:starts - 1]]
    return min((descend(p) for p in [np.full(m, 1 / m), *corners]), key=lambda found: found[0])[1]

# --- Static laws (T = 1): final losses of whole runs as a function of their mixture. Fitted on arrays alone, mixtures
# --- (R, m) and final losses (R, n); called on any (..., m) array of mixtures.

class LogLinear(NamedTuple):
    """L_i(p) = c_i + exp(sum_j t_ij p_j): LMO with sigma = exp, b = 1, A = -t (Ye et al., arXiv 2403.16952).

    Their factor k_i is exp of a constant, and a constant is the same number added to a whole row of t (the p_j sum
    to 1), so it lives in t: one gauge, and k > 0 by construction, which makes every L_i convex in p.
    """
    c: np.ndarray               # (n,) irreducible loss, >= 0
    t: np.ndarray               # (n, m)

    def __call__(self, P):
        return self.c + np.e ** (P @ self.t.T)                                # (..., n)

    def gradient(self, p):
        return self.t * (self(p) - self.c)[:, None]                           # (n, m); minus this is the local A

class Power(NamedTuple):
    """L_i(p) = c_i + 1 / (eps_i + sum_j a_ij p_j^g_ij), all positive (Shukor et al., arXiv 2507.09404).

    Diminishing returns per group, and finite at p_j = 0. Convex in p where all g <= 1.
    """
    c: np.ndarray               # (n,)
    eps: np.ndarray             # (n,)
    a: np.ndarray               # (n, m)
    g: np.ndarray               # (n, m)

    def __call__(self, P):
        return self.c + 1 / (self.eps + (self.a * P[..., None, :] ** self.g).sum(-1))     # (..., n)

    def gradient(self, p):
        p = np.maximum(p, 1e-12)                                              # g < 1: infinitely steep at 0
        return -self.a * self.g * p ** (self.g - 1) * ((self(p) - self.c) ** 2)[:, None]  # (n, m)

def fit(build, starts, mixtures, losses, delta=.02, iterations=1000):
    """The law build(x), x (n, d), with the least Huber error: torch's L-BFGS in float64, the best start per loss.

    delta, nats: errors beyond it count linearly, so that one run that went wrong does not bend the law.
    """
    import torch
    P, L = torch.tensor(mixtures, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    best, best_error = np.array(starts[0]), np.full(L.shape[1], np.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                  # arrays this small only lose by sharing
    for start in starts:
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)      # (n, d)
        solver = torch.optim.LBFGS([x], max_iter=iterations, history_size=30, tolerance_grad=1e-10,
                                   tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def errors():
            return torch.nn.functional.huber_loss(build(x)(P), L, delta=delta, reduction="none").sum(0)     # (n,)

        def closure():
            solver.zero_grad()
            total = errors().sum()
            total.backward()
            return total

        solver.step(closure)
        found, error = x.detach().numpy(), errors().detach().numpy()
        better = error < best_error
        best[better], best_error[better] = found[better], error[better]
    torch.set_num_threads(threads)
    return build(best)

def check_runs(mixtures, losses, need):
    """Finished runs as arrays, mixtures (R, m) scaled to sum 1 and losses (R, n). Raises ValueError."""
    P, L = np.array(mixtures, float), np.array(losses, float)
    if P.ndim != 2 or L.ndim != 2 or not need <= len(P) == len(L):
        raise ValueError(f"mixtures {P.shape} and losses {L.shape}: this law needs (runs, groups), at least {need} runs")
    if not (np.isfinite(P).all() and np.isfinite(L).all() and (P >= 0).all() and (P.sum(1) > 0).all() and (L > 0).all()):
        raise ValueError("mixtures must be finite, >= 0 and not all 0, and losses finite and > 0")
    return P / P.sum(1, keepdims=True), L

def fit_log_linear(mixtures, losses, delta=.02):
    """Fit LogLinear to R finished runs: mixtures (R, m), losses (R, n), R >= m + 1. Deterministic.

    For a fixed c the law is linear, log(L - c) = t . p, so the starts are least squares at 30 values of c, and
    L-BFGS polishes three of the best nine. On data made by the law its predictions are recovered.
    """
    P, L = check_runs(mixtures, losses, np.shape(mixtures)[1] + 1)
    n, starts, errors = L.shape[1], [], []
    for share in 1 - np.geomspace(1e-3, 1, 30):                               # c as a share of the lowest loss
        c = share * L.min(0)
        t = np.linalg.lstsq(P, np.log(L - c), rcond=None)[0].T                # (n, m)
        starts.append(np.column_stack((np.log(np.maximum(c, 1e-6)), t)))
        errors.append(((LogLinear(c, t)(P) - L) ** 2).sum(0))
    order = np.argsort(errors, axis=0)                                        # (30, n), best first
    starts = [np.array([starts[order[rank, i]][i] for i in range(n)]) for rank in (0, 3, 8)]
    return fit(lambda x: LogLinear(np.e ** x[:, 0], x[:, 1:]), starts, P, L, delta)

def fit_power_law(mixtures, losses, delta=.02):
    """Fit Power to R finished runs: mixtures (R, m), losses (R, n). Deterministic, two starts.

    All parameters are fitted as logarithms, which keeps them positive.
    """
    P, L = check_runs(mixtures, losses, 3)
    n, m = L.shape[1], P.shape[1]
    starts = []
    for c, g in ((.5, .7), (.7, .5)):                                         # c as a share of the lowest loss
        c = c * L.min(0)
        x = np.log([c, .9 / (L.max(0) - c)]).T                                # (n, 2): c, eps
        a = np.tile(np.log(.5 / (L.mean(0) - c))[:, None], (1, m))
        starts.append(np.hstack((x, a, np.full((n, m), np.log(g)))))

    def build(x):
        x = np.e ** x
        return Power(x[:, 0], x[:, 1], x[:, 2:2 + m], x[:, 2 + m:])
    return fit(build, starts, P, L, delta)

class Forecast(NamedTuple):
    """Losses at the end of a run that goes on at mixture p, from what the run has shown so far (our own law, README):

        L_i(p) = c_i + b_i / sqrt(E_i(p)),     E_i(p) = (1 - o_i) (n_i + (1 - d) p_i) + o_i p_i,     d = sum of n

    n_i is what the run has seen of group i, and d of all, as a share of the whole run. A law of tokens alone forgets that
    models forget: a part o_i of what is known lasts only while the group keeps its share, as if all of the run had had
    the present mixture. b >= 0 and 0 <= o <= 1, so every L_i is convex in p.
    """
    c: np.ndarray               # (m,) irreducible loss, >= 0
    b: np.ndarray               # (m,)
    o: np.ndarray               # (m,)
    n: np.ndarray               # (m,)

    def seen(self, p):
        return (1 - self.o) * (self.n + (1 - self.n.sum()) * p) + self.o * p  # E (..., m)

    def __call__(self, P):
        return self.c + self.b * self.seen(P) ** -.5                          # (..., m)

    def gradient(self, p):
        per_share = (1 - self.o) * (1 - self.n.sum()) + self.o
        return np.diag(-.5 * self.b * self.seen(p) ** -1.5 * per_share)       # (m, m)

def fit_forecast(n, share, losses):
    """Fit Forecast to one run: n (t, m) seen up to each validation, as shares of the run, share (t, m) the mixture just
    before it, losses (t, m), nats per token. Deterministic; raises ValueError for fewer than three validations.

    For a given o the law is linear in c and b >= 0, so eleven values of o are tried, per group. While the mixture does
    not change, o cannot be told: a prior, ((o - .3) / .3)^2, is added to the squared errors in units of their noise. The
    noise, one number for all groups, comes from the median of squared second differences of the losses, which the few
    that a change of mixture makes do not move; it is at least .01 nats.
    """
    n, share, L = (np.asarray(a, float) for a in (n, share, losses))          # (t, m) each
    if len(L) < 3:
        raise ValueError(f"a forecast needs three validations or more, not {len(L)}; raise --rounds or --wait")
    o = np.linspace(0, 1, 11)[:, None, None]                                  # (11, 1, 1)
    E = (1 - o) * n + o * n.sum(1, keepdims=True) * share                     # (11, t, m)
    F = np.maximum(E, 1e-4) ** -.5
    f, y = F - F.mean(1, keepdims=True), L - L.mean(0)
    b = np.maximum((f * y).sum(1) / np.maximum((f * f).sum(1), 1e-12), 0)     # (11, m)
    c = L.mean(0) - b * F.mean(1)
    b = np.where(c < 0, (F * L).sum(1) / (F * F).sum(1), b)                   # no negative floor: through the origin
    c = np.maximum(c, 0)
    noise = max(np.median(np.diff(L, n=2, axis=0) ** 2) / 6, 1e-4)            # nats^2; 6 = 1 + 4 + 1
    error = ((c[:, None] + b[:, None] * F - L) ** 2).sum(1) / noise + ((o[:, 0] - .3) / .3) ** 2          # (11, m)
    best, i = error.argmin(0), np.arange(L.shape[1])
    return Forecast(c[best, i], b[best, i], o[best, 0, 0], n[-1])

def ranks(x):
    """Ranks of x (R,), ties averaged."""
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[where]

def quality(law, mixtures, losses):
    """How well a law predicts runs: R^2, mean squared error, Spearman's rank correlation, each (n,) per loss."""
    P, L = check_runs(mixtures, losses, 2)
    error, spread = ((law(P) - L) ** 2).mean(0), L.var(0)
    rho = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(law(P).T, L.T)]
    return 1 - error / spread, error, np.array(rho)

# --- Fidelity: is a method's A the right one? (The paper's section 5.)

def standard_errors(mixtures, drops, A):
    """Of fit_linear_dynamic's A, from its residuals: mixtures (R, m), drops (R, n), A (n, m) -> (n, m), R > m."""
    P, error = np.asarray(mixtures, float), np.asarray(drops, float) - mixtures @ A.T             # (R, m), (R, n)
    variance = (error ** 2).sum(0) / (len(P) - P.shape[1])                                        # (n,)
    return np.sqrt(np.outer(variance, np.diag(np.linalg.inv(P.T @ P))))

def similarity(A, B, centred=False):
    """The paper's sim: (cosine + Spearman) / 2 of two matrices' column sums, in [-1, 1]; Spearman is 0 where one of them
    is constant, and so is the centred cosine.

    A number added to a whole row moves all column sums alike and no egd step, but it moves the cosine: matrices that
    disagree in every step can be alike. centred=True takes each side's mean off first, and only differences count.
    """
    a, b = (np.sum(X, axis=0) for X in (A, B))                                # (m,) each
    order = [ranks(x) - ranks(x).mean() for x in (a, b)]
    a, b = (x - x.mean() for x in (a, b)) if centred else (a, b)
    return sum(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300) for x, y in ((a, b), order)) / 2

# --- The methods, in the order of a lecture. Keyword arguments are settings; train.py makes command-line flags of them.

def stratified(h, steps):
    """Equal shares: the baseline. A^t = 0. Extra cost: none.

    Any method here whose column sums are equal, or whose eta is 0, is this one.
    """
    yield Train(h.uniform, steps)

def fixed(h, steps, mixture=""):
    """A mixture of your own, for the whole run. A^t = 0. Extra cost: none.

    mixture: shares joined by +, in the order of the groups, scaled to sum 1 (default: equal).
    """
    try:
        p = np.array([float(share) for share in mixture.split("+")]) if mixture else h.uniform
    except ValueError:
        p = np.zeros(0)
    if len(p) != h.m or not (np.isfinite(p).all() and (p >= 0).all() and p.sum() > 0):
        raise ValueError(f"--mixture {mixture!r} is not {h.m} shares joined by +, one for each of {', '.join(h.groups)}")
    yield Train(p / p.sum(), steps)

def natural(h, steps, alpha=1.0):
    """Token shares, p_j = n_j^alpha / Z: alpha = 1 repeats all groups equally often, 0 is stratified.

    In LMO: A^t = 0 and the prior is not uniform; egd(uniform, log n, alpha). Extra cost: none.
    alpha: temperature form, 1 / T (multilingual models use .3 to .7).

    >>> egd([.5, .5], np.log([9., 1.]), eta=.5)
    array([0.75, 0.25])
    """
    yield Train(egd(h.uniform, np.log(h.sizes), alpha), steps)

def cover(m, runs, rng):
    """`runs` mixtures spread over the simplex, (runs, m): evenly spaced for m = 2, else Dirichlet(1.5) draws, one of the
    closest two dropped until `runs` are left (as the paper's sweeps)."""
    if m == 2:
        first = np.arange(1, runs + 1) / (runs + 1)
        return np.column_stack((first, 1 - first))
    P = rng.dirichlet(np.full(m, 1.5), 8 * runs)
    while len(P) > runs:
        gap = np.linalg.norm(P[:, None] - P, axis=2) + np.eye(len(P)) * 9
        P = np.delete(P, gap.argmin() // len(P), axis=0)
    return P

def sweep(h, steps, runs, objective):
    """Full-length scratch runs on a cover of the simplex -> mixtures (runs, m), final losses (runs, m).

    The mixtures do not depend on the seed, so grid, dml and power, and all their seeds, see the same ones."""
    weigh(0, objective)                                                       # complain now, not after the runs
    if h.runs is not None:
        return h.runs
    P = cover(h.m, runs, np.random.default_rng(0))
    L = []
    for r, p in enumerate(P):
        L.append((yield Train(p, steps, on=f"sweep-{r}")))
    return P, np.array(L)

def grid(h, steps, points=9, objective="loss"):
    """Grid search: train on a cover of the simplex, keep the best. Its law is a table, its solver a look-up.

    Extra cost: `points` full runs. Paper: 9 points (.1 to .9) for m = 2, 9 or 10 draws otherwise.
    points: number of scratch runs.  objective: average loss, or average perplexity.
    """
    P, L = yield from sweep(h, steps, points, objective)
    yield Train(P[weigh(L, objective).mean(1).argmin()], steps)

def dml(h, steps, points=9, objective="loss"):
    """Data Mixing Laws (arXiv 2403.16952): L_i(p) = c_i + exp(t_i . p) fitted to a sweep, then minimised.

    A = -t: static, sigma = exp, T = 1. Its linearisation at p is A[i, j] = -t_ij (L_i(p) - c_i).
    Extra cost: `points` full runs, or m + 1 if that is more, as the law needs them; the paper of Aioli uses 10.
    Where the release fits k of either sign and searches with Nelder-Mead, k > 0 is enforced here and the problem is
    convex. Example: with t = [[-1, 0], [0, -1]] and c = 0 the best mixture is (.5, .5).
    points: number of scratch runs.  objective: average loss, or average perplexity.
    """
    P, L = yield from sweep(h, steps, max(points, h.m + 1), objective)
    law = fit_log_linear(P, L)
    yield Train(solve_static(law, objective=objective), steps, A=-law.t)

def power(h, steps, points=9, objective="loss"):
    """As dml, with the additive power law of arXiv 2507.09404, which ranks mixtures better (README, "Laws").

    A = minus the law's gradient at the optimum. No group gets less than the least share that any run gave one (or half
    of 1/m, if that is less): a power law is not to be trusted in a corner that it has not seen. Extra cost: as dml.
    points: number of scratch runs.  objective: average loss, or average perplexity.
    """
    P, L = yield from sweep(h, steps, max(points, h.m + 1), objective)
    law = fit_power_law(P, L)
    p = solve_static(law, objective=objective, starts=1 + h.m, floor=min(P.min(), .5 / h.m))
    yield Train(p, steps, A=-law.gradient(p))

def skill_graph(h, steps):
    """G[i, j]: relative fall of loss i after training on group j alone, from m scratch runs -> (m, m)."""
    before, G = (yield Train(h.uniform, 0)), np.zeros((h.m, h.m))
    for j, only_j in enumerate(np.eye(h.m)):
        after = yield Train(only_j, steps, on=f"only-{h.groups[j]}")
        G[:, j] = (before - after) / before
    return G

def skillit(h, steps, rounds=10, eta=.2, window=3):
    """Skill-It (arXiv 2307.14430): A^t[i, j] = L_i^t G[i, j], G measured once, before the run.

    p^{t+1} = egd(uniform, column sums of A^t + ... + A^{t-window+1}, eta), and p^1 = egd(uniform, column sums of G).
    Only a window over all rounds accumulates; in LMO the windowed form is A^t - A^{t-window} from the last p.
    Extra cost: m full runs. Paper: eta .2, window 3, a round every 500 of 5,000 steps. The window sums losses, as
    the release, and counts rounds; the release counts evaluations.
    rounds: updates of the mixture.  eta: step size.  window: rounds of losses summed.

    >>> egd([.5, .5], (np.eye(2) * [[2.], [1.]]).sum(0), eta=.2).round(2)      # G = I, L = (2, 1)
    array([0.55, 0.45])
    """
    G = yield from skill_graph(h, steps)
    A, seen = G, []
    for n in split(steps, rounds):
        p = egd(h.uniform, A.sum(0), eta)
        seen.append((yield Train(p, n, A=A)))
        A = G * np.sum(seen[-window:], axis=0)[:, None]                       # (m, m)

def doremi(h, steps, eta=1.0, smoothing=1e-3):
    """DoReMi (arXiv 2305.10429): A^t = diag(excess loss of a proxy over a reference run), Group DRO.

    Excess is clipped at 0 token by token, then averaged over the group's tokens. Each proxy step: w <- egd(w, excess,
    eta), w <- (1 - smoothing) w + smoothing / m, a step on sum_j w_j L_j with the new w. The main run samples the
    average of w over all steps. Extra cost: 2 full runs and one more forward pass per proxy step.
    Paper: eta 1, smoothing 1e-3; Aioli's scripts use eta .01 and clip per group. LMO drops smoothing and averaging.
    eta: step size.  smoothing: share of the uniform mixture in w.

    >>> w = egd([.5, .5], [.2, 0.], eta=1.)                                    # group 0 is behind its reference
    >>> (.999 * w + .001 / 2).round(4)
    array([0.5498, 0.4502])
    """
    yield Train(h.uniform, steps, on="reference")
    w, excess, total = h.uniform, np.zeros(h.m), np.zeros(h.m)
    for _ in range(steps):
        seen = (yield Peek(h.uniform, steps, on="proxy", against="reference"))["excess"]
        excess = np.where(np.isnan(seen), excess, seen)                       # an absent group keeps its last score
        A = np.diag(excess)                                                   # (m, m)
        w = (1 - smoothing) * egd(w, A.sum(0), eta) + smoothing * h.uniform
        yield Update(w, on="proxy")
        total += w
    yield Train(total / steps, steps)

def doge(h, steps, mu=.05, cap=5.0):
    """DoGE (arXiv 2310.15393): A^t[i, j] = <gradient of loss i on held-out text, gradient of loss j>, on a proxy.

    Each proxy step, as released: group gradients and the mean target gradient clipped to norm 1, score_j = lr *
    mean_i A[i, j] / (mean norm), cut to [0, cap * lr], w <- egd(w, score, 1 / mu), a step on sum_j w_j gradient_j.
    The main run samples the average of w. LMO keeps egd on A and drops the cuts, the norm and the average.
    Extra cost: 1 full run with twice the gradients; one backward per group over the group's own share of the batch.
    Target text: validation windows (the release holds out training text). Paper: mu .05 (.01 in one config), cap 5.
    mu: inverse step size.  cap: upper cut of a score, in learning rates.

    >>> egd([.5, .5], 3e-3 * np.array([.9, .1]), eta=1 / .05).round(3)          # lr .003, mean norm 1
    array([0.512, 0.488])
    """
    w, total = h.uniform, np.zeros(h.m)
    for _ in range(steps):
        seen = yield Peek(h.uniform, steps, on="proxy")
        norm, lr = np.nan_to_num(seen["norm"]), h.last.lr
        cut = np.minimum(1, 1 / np.maximum(norm, 1e-12)) * min(1, 1 / max(seen["target_norm"], 1e-12))
        A = np.nan_to_num(seen["A"]) * cut / h.m                              # (m, m), an absent group's column 0
        s = lr * A.sum(0) / (np.minimum(norm, 1).mean() + 1e-6)
        w = egd(w, np.clip(s, 0, cap * lr), 1 / mu)
        yield Update(w, on="proxy")
        total += w
    yield Train(total / steps, steps)

def probe_counts(arms, m, f, windows):
    """Whole windows for each probe mixture: about f of them on the probed group, the rest spread over the others.

    arms: the groups that may be trained on -> (len(arms), m) integers, rows sum to `windows`. Raises ValueError for
    f <= 1/len(arms) (the probe would not favour its group) or too few windows to tell them apart.
    """
    k, own = len(arms), round(f * windows)
    if not 1 / k < f <= 1 or own <= -(-(windows - own) // (k - 1)):
        raise ValueError(f"aioli: f = {f} with {k} groups and {windows} windows per probe does not favour the probed "
                         f"group; choose 1/{k} < f <= 1, or raise --probe")
    counts = np.zeros((k, m), int)
    for row, j in enumerate(arms):
        others = np.roll([a for a in arms if a != j], -row)                   # who gets the odd window rotates
        counts[row, others] = np.diff(np.arange(k) * (windows - own) // (k - 1))
        counts[row, j] = own
    return counts

def learn_params(h, arms, f=.75, sweeps=2, probe=4, diagonal=False):
    """LearnParams (the paper's Algorithm 2): measure A by training on skewed mixtures -> A (m, m), nats per probe.

    For each probe: `probe` steps of the run itself on about f of group j, then the fall of every loss. A is the
    least-squares solution over the mixtures as realised in whole windows; if the law is linear it is exact. Nothing
    is rolled back, so measuring costs only validations. Order: a random permutation of the groups, then the same one
    backwards, and so on (the paper draws each anew): a steady drift of A over the sweeps then cancels.
    Columns of groups outside `arms` are 0. diagonal: as if no group affected another, A_jj = fall of L_j / own share.
    """
    counts, shares, drops = probe_counts(arms, h.m, f, probe * h.batch), [], []
    for again in range(sweeps):
        order = order[::-1] if again % 2 else h.rng.permutation(len(arms))
        for row in order:
            before = h.losses()[-1]
            after = yield Train(counts[row] / counts[row].sum(), probe, probe=True)
            shares.append(h.last.share[arms])
            drops.append(before - after)
    if diagonal:
        shares = np.where(np.equal(shares, np.max(shares, axis=1, keepdims=True)), shares, 0)
    A = np.zeros((h.m, h.m))
    A[:, arms] = fit_linear_dynamic(shares, drops)
    return np.diag(np.diag(A)) if diagonal else A

def adjust(h, steps, rounds, eta, ema=0.0, start=None, rows=None, objective="loss", **probing):
    """Aioli's outer loop (the paper's Algorithm 1): estimate A, one egd step, train the rest of the round.

    start (m,): the first mixture (default: uniform); its groups at 0 are not trained on. rows: the losses that count
    (default: all). Others: as aioli."""
    p = h.uniform if start is None else start
    arms, blend, score = np.flatnonzero(p), None, np.zeros(h.m)
    rows = list(range(h.m)) if rows is None else rows
    probe_counts(arms, h.m, probing["f"], probing["probe"] * h.batch)         # complain now, not after a validation
    cost = probing["sweeps"] * probing["probe"] * len(arms)
    if (shortest := min(split(steps, rounds))) < cost:
        raise ValueError(f"aioli: {steps} steps in {rounds} rounds leave {shortest} a round, but probing takes sweeps "
                         f"* probe * groups = {cost}; raise --steps or lower --rounds, --sweeps or --probe")
    weigh(0, objective)                                                       # complains now, too
    yield Train(p, 0)
    for n in split(steps, rounds):
        A = yield from learn_params(h, arms, **probing)                       # (m, m)
        w = np.exp(h.losses()[-1]) if objective == "perplexity" else np.ones(h.m)
        scaled = normalise((w[:, None] * A)[np.ix_(rows, arms)])              # entries sum to 1
        if ema:                                  # the release: average A, and start from uniform every round
            blend = scaled if blend is None else (1 - ema) * scaled + ema * blend
            score[arms] = blend.sum(0)
            p = egd(p > 0, score, eta)           # from uniform over the groups trained on
        else:                                    # the paper: steps add up
            score[arms] = scaled.sum(0)
            p = egd(p, score, eta)
        yield Train(p, n - cost, A=A)

def aioli(h, steps, rounds=10, eta=.2, ema=0.0, f=.75, sweeps=2, probe=4, objective="loss", start=None):
    """Aioli (arXiv 2411.05735): A^t measured inside the run by LearnParams, once a round, and a step on it.

    p^t = egd(p^{t-1}, column sums of normalise(A^t), eta), p^0 is uniform, and the rest of round t trains on p^t. Probe steps
    are part of the budget; extra cost: sweeps * m + 1 validations a round, one before. Paper: 20 rounds, eta .2, .1 or 1,
    f .625, .5 or .75 (m = 2, 3, 7), sweeps 4 or 2, probe 4, 6 or 10. With --ema the released variant, which cannot leave
    [1 / (m - 1 + e^eta), e^eta / (m - 1 + e^eta)] whatever it measures: for m = 2 and eta .2, [.45, .55].
    rounds: T, updates of the mixture.  eta: step size.  ema: weight of the past in the released average of A (0: off).
    f: share of the probed group.  sweeps: probes per group and round.  probe: steps per probe.
    objective: loss, or perplexity (row i of A times exp(L_i)).

    >>> egd([.5, .5], normalise(np.array([[3., -1.], [0., 1.]])).sum(0), eta=.2).round(3)
    array([0.521, 0.479])
    """
    yield from adjust(h, steps, rounds, eta, ema, start, objective=objective, f=f, sweeps=sweeps, probe=probe)

def aioli_static(h, steps, eta=.2, f=.75, sweeps=2, probe=4):
    """Ablation: A measured once, at the start, and never again; one-round Aioli. Settings as aioli."""
    yield from adjust(h, steps, 1, eta, f=f, sweeps=sweeps, probe=probe)

def aioli_diagonal(h, steps, rounds=10, eta=.2, f=.75, sweeps=2, probe=4):
    """Ablation: off-diagonal entries of A are not measured but taken as 0, as DoReMi does. Settings as aioli."""
    yield from adjust(h, steps, rounds, eta, f=f, sweeps=sweeps, probe=probe, diagonal=True)

def aioli_ood(h, steps, rounds=10, eta=.2, f=.75, sweeps=2, probe=4, target=""):
    """Aioli for a group that is not trained on: only row `target` of A counts, and p_target = 0 throughout.

    Compare it with uniform over the others. Settings as aioli.
    target: name of the group to do well on (default: the last).
    """
    if (target := target or h.groups[-1]) not in h.groups:
        raise ValueError(f"no group {target!r} to aim at; there are {', '.join(h.groups)}")
    if h.m < 3:
        raise ValueError("aioli_ood needs a group to aim at and at least two to train on; give three groups")
    i = h.groups.index(target)
    start = (np.arange(h.m) != i) / (h.m - 1)
    yield from adjust(h, steps, rounds, eta, start=start, rows=[i], f=f, sweeps=sweeps, probe=probe)

WARM = .08 - 1e-9             # share of a run in which the rate is (nearly) still warming up: no forecast is fitted to it

def forecast(h, total):
    """The Forecast for a run of `total` windows, from what the main run has shown so far."""
    seen = h.windows() / total                                                # (t, m)
    ready = seen.sum(1) > WARM
    return fit_forecast(seen[ready], np.array([row.share for row in h.trained()])[ready], h.losses()[ready])

def horizon(h, steps, rounds=25, wait=.16, last=.4, reach=.5, floor=.02, objective="loss"):
    """Ours, in the same frame: what the whole rest of the run does for each loss, forecast and minimised each round.

    Aioli's A is what the next few steps do, and much of that is recency: a group helps itself, and it is soon forgotten.
    Here the law is a Forecast for the end of the run, fitted to its own validation losses; the solver is direct, over
    the simplex, and a step moves no log share by more than `reach` before they are scaled to sum 1 (which also keeps one
    bad forecast from mattering, and shows the law a mixture that it has not seen). A^t = minus the law's gradient at p. No
    probes, no extra runs: extra cost rounds * last validations. Training is uniform at first and stays where it is at
    the end, where the falling learning rate hides what tokens do.
    rounds: validations in a run, were they to go on to its end.  wait: share of the run before the first forecast.
    last: share of the run after which the mixture stays.  reach: largest change of a log share per round.
    floor: least share of a group in a plan.  objective: average loss, or average perplexity.
    Raises ValueError if fewer than three validations come between the warm-up and the first forecast.
    """
    weigh(0, objective)
    before = [row.windows.sum() for row in h.trained()]                       # with a prior, some of the run is over
    total, p, A, parts = sum(before) + steps * h.batch, h.uniform, None, split(steps, rounds)
    ends = np.cumsum(parts)
    first, held = sum(ends < wait * steps), sum(ends <= last * steps)
    at = np.cumsum([*before, *np.multiply(parts[:first + 1], h.batch)]) / total            # where the run is validated
    if first < held and sum(at > WARM) < 3:                                   # complain now, not in the midst of the run
        raise ValueError(f"horizon: {rounds} rounds give {sum(at > WARM)} validations up to the first forecast, which needs 3 "
                         f"(those in the warm-up do not count); raise --rounds or --wait")
    for done, n in zip(ends, parts[:held]):
        yield Train(p, n, A=A)
        if done >= wait * steps:
            law = forecast(h, total)
            plan = solve_static(law, objective=objective, floor=floor)
            p = egd(p, np.clip(np.log(plan / p), -reach, reach), 1.0)
            A = -law.gradient(p)
    yield Train(p, steps - sum(parts[:held]), A=A)

# --- Composition: the paper's restricted setting, where another method's mixture comes first.

def learn(method, h, steps):
    """The mixture that `method` settles on, learnt on scratch runs of `steps` steps -> p (m,).

    Its main run becomes a scratch run. A method that trains all of it on one mixture is stopped before it, as that
    mixture is known by then; of a method that keeps moving, the average over the run is taken, as the paper does.
    """
    inner, reply = History(h.groups, h.sizes, h.batch, h.seed, h.runs), None
    program = method(inner, steps)
    while True:
        try:
            request = program.send(reply)
        except StopIteration:
            total = inner.windows()[-1]
            return total / total.sum()
        scratch = {field: f"prior-{getattr(request, field)}" for field in ("on", "against") if getattr(request, field, "")}
        if isinstance(request, Train) and request.on == "main":
            if request.steps == steps:
                return request.p
            scratch["of"] = steps
        reply = yield request._replace(**scratch)
        inner.rows.append(h.last._replace(request=request))

def with_prior(h, steps, method, prior, first=.5, restart="uniform", **settings):
    """`method` on top of `prior`: learn a mixture on half-length runs, train on it for the share `first` of the main
    run (1: all of it), then let `method` adjust. restart="uniform": its first p is uniform (the paper); "prior": it is
    the mixture. Raises ValueError.
    """
    if restart not in ("uniform", "prior"):
        raise ValueError(f"restart {restart!r} is neither uniform nor prior")
    if not 0 <= first <= 1:
        raise ValueError(f"first {first} is not a share of the run, 0 to 1")
    p = yield from learn(prior, h, steps // 2)
    n = round(first * steps)
    yield Train(p, n)
    if restart == "prior":
        settings["start"] = p
    if n < steps:
        yield from method(h, steps - n, **settings)

METHODS = {f.__name__: f for f in (stratified, fixed, natural, grid, dml, power, skillit, doremi, doge, aioli, aioli_static,
                                   aioli_diagonal, aioli_ood, horizon)}
