"""Every error is a DistoptError, can be caught as the builtin it resembles, and survives a trip between processes."""

import pickle

import pytest

import distopt
from distopt import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
BUILTIN = {
    "ConfigError": ValueError,
    "CompatibilityError": RuntimeError,
    "StateMismatchError": RuntimeError,
    "NonFiniteGradientError": ArithmeticError,
    "DesyncError": RuntimeError,
    "DecodeError": ValueError,
    "PeerLostError": RuntimeError,
    "DistoptError": Exception,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_family(kind):
    assert issubclass(kind, errors.DistoptError)
    assert issubclass(kind, BUILTIN.get(kind.__name__, Exception))
    assert kind.__doc__
    assert getattr(distopt, kind.__name__) is kind
    assert kind.__name__ in distopt.__all__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pickles_with_its_message(kind):
    copy = pickle.loads(pickle.dumps(kind("density must be in (0, 1], got 2.0")))
    assert type(copy) is kind
    assert str(copy) == "density must be in (0, 1], got 2.0"
