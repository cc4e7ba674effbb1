"""The private members of Transformers in `training/hooks.py` exist in the installed version, and our overrides fit them."""

import importlib
import inspect
import pkgutil

import pytest
import transformers

import stitched_llama
from stitched_llama.training.hooks import DECLARED, OVERRIDDEN, READ_BY_NAME, USED

SCRIPTS = ("stitched_llama.recipes.", "stitched_llama.__main__")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def pairs(members):
    return [pytest.param(path, name, id=f"{path}.{name}") for path, names in members.items() for name in names]


def host(path):
    return getattr(transformers, path.removeprefix("transformers."))


def our_classes():
    for module in pkgutil.walk_packages(stitched_llama.__path__, "stitched_llama."):
        if not module.name.startswith(SCRIPTS):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__.startswith("stitched_llama."):
                    yield value


def overrides():
    """{(class of Transformers, private name): the values our classes have for it}, mixins included."""
    found = {}
    hosts = {path: host(path) for path in (*OVERRIDDEN, *DECLARED)}
    for ours in set(our_classes()):
        for part in (c for c in ours.__mro__ if c.__module__.startswith("stitched_llama.")):
            for name, value in vars(part).items():
                for path, theirs in hosts.items():
                    own = issubclass(ours, theirs) and any(
                        name in vars(c) for c in theirs.__mro__ if c.__module__.startswith("transformers.")
                    )
                    if own and name.startswith("_") and not name.startswith("__"):
                        found.setdefault((path, name), []).append(value)
    return found


def binds(signature, count, names):
    """Whether a call with `count` arguments by position and `names` by keyword is accepted."""
    try:
        signature.bind(*[None] * count, **names)
    except TypeError:
        return False
    return True


@pytest.fixture(scope="module")
def found():
    return overrides()


def test_the_list_is_complete(found):
    assert set(found) == {
        (path, name) for members in (OVERRIDDEN, DECLARED) for path, names in members.items() for name in names
    }


@pytest.mark.parametrize(("path", "name"), pairs(OVERRIDDEN))
def test_an_overridden_method_exists_and_takes_the_same_parameters(path, name, found):
    theirs = inspect.signature(getattr(host(path), name))
    for ours in map(inspect.signature, found[path, name]):
        needed = [p.name for p in theirs.parameters.values() if p.default is p.empty and p.kind in POSITIONAL]
        accepted = binds(ours, len(needed), {}) or binds(ours, 1, dict.fromkeys(needed[1:]))
        assert accepted, f"{name}{theirs} of Transformers is overridden by one with other parameters"
        for signature, other in ((ours, theirs), (theirs, ours)):
            for parameter in other.parameters.values():
                if parameter.default is not parameter.empty:
                    signature.bind_partial(**{parameter.name: None})  # raises TypeError and names it


@pytest.mark.parametrize(("path", "name"), pairs(DECLARED) + pairs(USED))
def test_a_member_we_set_or_call_exists(path, name):
    assert hasattr(host(path), name)


@pytest.mark.parametrize(("path", "name"), pairs(READ_BY_NAME))
def test_a_member_is_still_read_by_name(path, name):
    assert f'"{name}"' in inspect.getsource(importlib.import_module(path))
