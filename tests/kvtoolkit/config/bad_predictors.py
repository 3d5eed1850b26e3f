"""Predictors that misbehave, named by path in the tests."""

import numpy as np

called = []


class Fine:
    """The newest tiles."""

    state_size, needs_keys = 0, False

    def __init__(self):
        called.append(type(self).__name__)

    def observe(self, state, step):
        """Learn nothing."""

    def score(self, state, step):
        return np.broadcast_to(np.arange(step.mass.shape[-1]), step.mass.shape)


class WrongShape(Fine):
    def score(self, state, step):
        return np.zeros(step.mass.shape[-1])


class NoArray(Fine):
    def score(self, state, step):
        return "high"


class Nothing(Fine):
    def score(self, state, step):
        return None


class Nan(Fine):
    def score(self, state, step):
        return np.full(step.mass.shape, np.nan)


class RaisesInObserve(Fine):
    def observe(self, state, step):
        raise KeyError("layer 7")


class ExitsInScore(Fine):
    def score(self, state, step):
        raise SystemExit(3)


class LendsItsState(Fine):
    state_size = 1

    def observe(self, state, step):
        state[0] = step.mass

    def score(self, state, step):
        return state[0]


class NoScore:
    state_size, needs_keys = 0, False

    def observe(self, state, step):
        """Learn nothing."""


class NeedsArguments(Fine):
    def __init__(self, decay):
        self.decay = decay


class NoSize(Fine):
    state_size = None


class NegativeSize(Fine):
    state_size = -1


class SometimesNeedsKeys(Fine):
    needs_keys = "sometimes"


def factory():
    return Fine()
