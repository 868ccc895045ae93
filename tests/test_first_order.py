"""Claims about real gradient steps: to first order in the learning rate, DoGE's A is the law, and
LearnParams finds it.

A small next-token model in float64, plain SGD on full batches, torch autograd; M groups of random
text with different statistics. Errors are of second order: halving the learning rate must quarter
them.
"""
import numpy as np
import pytest
import torch

import aioli
from aioli import Peek, Train
from worlds import drive, freely, gradient_signals, history, measure, rng_of, same, weights_of

torch.set_num_threads(1)
M, VOCAB = 3, 7


class Tiny:
    """embedding -> tanh -> softmax over a vocabulary of 7; `theta` is one flat float64 vector."""
    shapes = (VOCAB, 4), (4, 5), (5, VOCAB)

    def __init__(self, seed=0):
        rng = rng_of(seed)
        self.theta = torch.from_numpy(rng.normal(0, .7, sum(a * b for a, b in self.shapes)))
        rows = [rng.dirichlet(np.full(VOCAB, .3), VOCAB) for _ in range(M)]
        rows[2] = (rows[0] + rows[2]) / 2                           # it shares half of group 0

        def text(j, n):
            x = rng.integers(0, VOCAB, n)
            y = np.array([rng.choice(VOCAB, p=rows[j][token]) for token in x])
            return torch.from_numpy(x), torch.from_numpy(y)
        self.train = [text(j, 60) for j in range(M)]
        self.val = [text(j, 40) for j in range(M)]

    def loss(self, theta, x, y):
        parts = theta.split([a * b for a, b in self.shapes])
        E, W, U = (part.view(shape) for part, shape in zip(parts, self.shapes))
        return torch.nn.functional.cross_entropy(torch.tanh(E[x] @ W) @ U, y)

    def losses(self, theta, texts):
        return np.array([self.loss(theta, x, y).item() for x, y in texts])

    def gradients(self, theta, texts):
        theta = theta.clone().requires_grad_()
        losses = [self.loss(theta, x, y) for x, y in texts]
        return np.array([torch.autograd.grad(loss, theta)[0].numpy() for loss in losses])

    def A(self):
        """DoGE's at the start: <gradient of validation loss i, gradient of training loss j>."""
        V, G = self.gradients(self.theta, self.val), self.gradients(self.theta, self.train)
        return gradient_signals(G, V)["A"]

    def sgd(self, lr):
        """A world of one run, trained by SGD on full batches from theta."""
        theta = [self.theta.clone()]

        def world(request):
            if isinstance(request, Train):
                for _ in range(request.steps):
                    step = np.asarray(request.p) @ self.gradients(theta[0], self.train)
                    theta[0] = theta[0] - lr * torch.from_numpy(step)
                return dict(loss=self.losses(theta[0], self.val))
            if isinstance(request, Peek):
                G, V = self.gradients(theta[0], self.train), self.gradients(theta[0], self.val)
                return dict(signals=gradient_signals(G, V), lr=lr)
            step = request.w @ self.gradients(theta[0], self.train)
            theta[0] = theta[0] - lr * torch.from_numpy(step)
            return {}
        return world


def quarters(error, lr):
    """error(lr) falls to a quarter when lr is halved, twice in a row."""
    errors = [error(lr / 2 ** k) for k in range(3)]
    for a, b in zip(errors, errors[1:]):
        assert 3.5 < a / b < 4.5, errors


@pytest.mark.parametrize("seed", range(3))
def test_a_step_lowers_each_loss_by_lr_times_A_p_up_to_second_order(seed):
    """A = gradient products, for any mixture."""
    tiny = Tiny(seed)
    A, p = tiny.A(), rng_of(seed).dirichlet(np.ones(M))

    def error(lr):
        after = tiny.sgd(lr)(Train(p, 1))["loss"]
        return np.linalg.norm(tiny.losses(tiny.theta, tiny.val) - after - lr * A @ p)
    quarters(error, 4e-3)
    assert np.linalg.norm(A - A.T) > 1e-2 * np.linalg.norm(A)
    assert error(4e-3) < .1 * np.linalg.norm(4e-3 * A @ p)


@pytest.mark.parametrize("seed", range(2))
def test_the_second_order_term_is_half_the_curvature_along_the_step(seed):
    """lr^2 / 2 d^T H_i d, exactly for a quadratic, here to third order."""
    tiny = Tiny(seed)
    p = np.full(M, 1 / M)
    d = torch.from_numpy(p @ tiny.gradients(tiny.theta, tiny.train))
    bend = []
    for x, y in tiny.val:
        def loss(theta, x=x, y=y):
            return tiny.loss(theta, x, y)
        _, curvature = torch.autograd.functional.hvp(loss, tiny.theta, d)
        bend.append(curvature @ d)
    lr = 1e-3
    fall = tiny.losses(tiny.theta, tiny.val) - tiny.sgd(lr)(Train(p, 1))["loss"]
    same(fall - lr * tiny.A() @ p, -lr ** 2 / 2 * np.array(bend), rtol=3e-2)


@pytest.mark.parametrize("seed, probe, sweeps", [(0, 1, 1), (1, 2, 2), (2, 4, 2)])
def test_learn_params_measures_doges_A_up_to_second_order(seed, probe, sweeps):
    """It is lr times A times steps per probe; probes train the model: later ones see it moved."""
    tiny = Tiny(seed)
    A = tiny.A()

    def error(lr):
        return np.linalg.norm(measure(tiny.sgd(lr), M, probe=probe, sweeps=sweeps) - probe * lr * A)
    quarters(error, 1e-3)
    assert error(1e-4) < .02 * np.linalg.norm(probe * 1e-4 * A)


def test_two_steps_are_two_laws():
    """LMO's law is per step: A^2 is measured where step 1 led; with it the error is again of second
    order."""
    tiny, p, q = Tiny(3), np.array([.7, .2, .1]), np.array([.1, .1, .8])

    def error(lr):
        world, before = tiny.sgd(lr), tiny.losses(tiny.theta, tiny.val)
        A1 = world(Peek(p, 1, "main"))["signals"]["A"]
        world(Train(p, 1))
        A2 = world(Peek(q, 1, "main"))["signals"]["A"]
        return np.linalg.norm(before - world(Train(q, 1))["loss"] - lr * (A1 @ p + A2 @ q))
    quarters(error, 4e-3)


@pytest.mark.parametrize("seed", range(2))
def test_doges_scores_are_one_derivative_of_the_training_losses_towards_the_target(seed):
    """No matrix is needed: s_j = d L_j / d epsilon along the target's gradient."""
    tiny, eps = Tiny(seed), 1e-5
    target = torch.from_numpy(tiny.gradients(tiny.theta, tiny.val).mean(0))
    ahead, back = (tiny.losses(tiny.theta + sign * eps * target, tiny.train) for sign in (1, -1))
    same(tiny.A().mean(0), (ahead - back) / (2 * eps), rtol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_trained_and_evaluated_on_the_same_text_A_is_symmetric_and_positive(seed):
    """Through LearnParams: what a group does to another is what that one does to it, to first
    order."""
    tiny = Tiny(seed)
    tiny.val = tiny.train
    A = measure(tiny.sgd(1e-5), M, probe=1, sweeps=1) / 1e-5
    assert np.linalg.norm(A - A.T) < 1e-3 * np.linalg.norm(A)
    assert np.linalg.eigvalsh((A + A.T) / 2).min() > 0 and A.sum() > 0


def test_doge_and_aioli_favour_the_same_group_on_the_same_model():
    """Both raise the group with the largest column sum of the same A; DoGE by gradients, Aioli by
    trying."""
    for seed in range(3):
        tiny = Tiny(seed)
        best = tiny.A().sum(0).argmax()
        h = history(M)
        drive(aioli.doge(h, 1, mu=1e-3), tiny.sgd(1e-3), h)
        assert weights_of(h)[0].argmax() == best
        h = history(M)
        drive(freely(aioli.aioli_static)(h, 40), tiny.sgd(1e-3), h)
        assert h.last.request.p.argmax() == best


def test_sampling_and_reweighting_are_the_same_step_in_expectation():
    """Train samples its windows at p, Update weighs the groups' mean losses by w = p.

    Over all batches of two windows drawn at p the mean gradient is that of Update; of a single
    batch it is not.
    """
    tiny, p = Tiny(0), np.array([.5, .2, .3])
    G = tiny.gradients(tiny.theta, tiny.train)
    expected = sum(p[a] * p[b] * (G[a] + G[b]) / 2 for a in range(M) for b in range(M))
    moved = tiny.sgd(1.)
    before = tiny.losses(tiny.theta, tiny.val)
    moved(aioli.Update(p, "main"))
    after = moved(Train(p, 0))["loss"]
    same(after, tiny.losses(tiny.theta - torch.from_numpy(expected), tiny.val))
    assert np.abs(after - before).max() > 1e-2 and np.linalg.norm(G[0] - expected) > .1
