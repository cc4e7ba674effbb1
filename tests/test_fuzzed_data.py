"""Some hundred hostile data files and pictures, the same each time: right, or refused by name."""

import warnings
from itertools import islice
from random import Random

import fuzzing_data
import fuzzing_images
import pytest


def run_all(module, count):
    """The outcomes: whether a case was read (True) or refused."""
    outcomes = set()
    for name, run in islice(module.cases(Random(17)), count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.add(run() is None)
            except AssertionError as fault:
                raise AssertionError(f"{module.__name__} {name}: {fault}") from fault
    return outcomes


@pytest.mark.parametrize(("module", "count"), [(fuzzing_data, 400), (fuzzing_images, 200)], ids=["data", "images"])
def test_nothing_is_silently_different(module, count):
    assert run_all(module, count) == {True, False}


def test_the_fuzzer_of_data_sees_what_is_read_wrong(monkeypatch):
    """A reader that loses a row, takes a number for a float, or lets a library's exception through, is found."""
    honest = fuzzing_data.read_rows

    def loses(path, on_bad_row):
        return honest(path, on_bad_row)[:1]

    def strips(path, on_bad_row):
        return [
            type(row)(row.instruction, row.input, row.output.replace("1.50", "1.5")) for row in honest(path, on_bad_row)
        ]

    def crashes(path, on_bad_row):
        try:
            return honest(path, on_bad_row)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def unnamed(path, on_bad_row):
        try:
            return honest(path, on_bad_row)
        except ValueError:
            raise ValueError("bad data") from None

    for reader, said in (
        (loses, "other rows"),
        (strips, "other rows"),
        (crashes, "own KeyError"),
        (unnamed, "names no file"),
    ):
        monkeypatch.setattr(fuzzing_data, "read_rows", reader)
        with pytest.raises(AssertionError, match=said):
            run_all(fuzzing_data, 400)
