"""A short run of every fuzzer, the same cases each time; `make fuzz` runs thousands."""

import random
import time
import warnings

import pytest
from fuzzing import FAULTS, kinds, outcome_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = 25.0  # of all kinds together; on a slower machine fewer cases run
FEWEST = 24  # of each kind, whatever they take
KINDS = kinds(short=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)`: what the cases of a kind begin with, built once, and where they are run."""
    root, built = tmp_path_factory.mktemp("fuzz"), {}

    def get(name):
        if name not in built:
            KINDS[name][0](root / name)
            built[name] = time.monotonic()
        return root / name, root / "work", built[name]

    return get


@pytest.mark.parametrize("name", KINDS)
def test_right_or_refused_by_name(name, folders):
    outcomes = []

    @settings(
        max_examples=400, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32))
    def run(seed):
        original, work, began = folders(name)
        if len(outcomes) >= FEWEST and time.monotonic() - began > SECONDS / len(KINDS):
            return
        title, mutate, check = next(iter(KINDS[name][1](random.Random(seed))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, detail = outcome_of(original, work, mutate, check)
        outcomes.append(outcome)
        assert outcome not in FAULTS, f"python tests/fuzz.py --{name} 1 --only {seed}: {title}: {outcome}: {detail}"

    run()
    assert {"right", "refused"} <= set(outcomes)
    assert len(outcomes) > 5
