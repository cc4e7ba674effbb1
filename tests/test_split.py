"""Held-out rows in two halves: one chooses, the other tests."""

import pytest
import torch
from conftest import ids_like

from stitched_llama.training import evaluate_plain, evaluate_stitches


def test_even_rows_choose_and_odd_rows_test_whatever_the_batches(stitched):
    model, ids = stitched("unequal"), ids_like(7, 12)
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    key = model.keys[1]

    def batch(rows):
        return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}

    wanted = [evaluate_stitches(model, [batch(part)], [key], False) for part in (slice(0, 7, 2), slice(1, 7, 2))]
    for size in (1, 2, 3, 7):
        batches = [batch(slice(start, start + size)) for start in range(0, 7, size)]
        found = evaluate_stitches(model, batches, [key], False, split=True)
        assert set(found) == {"loss", "exact_match", "loss_test", "exact_match_test"}
        for end, half in zip(("", "_test"), wanted):
            assert found[f"loss{end}"][key] == pytest.approx(half["loss"][key], rel=1e-5)
            assert found[f"exact_match{end}"][key] == half["exact_match"][key]
        plain = evaluate_plain(model.pinned(key), batches, split=True)
        assert plain == {name: values[key] for name, values in found.items()}


def test_one_row_cannot_be_split(stitched):
    ids = ids_like(1, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ValueError, match="1 held-out row: two or more"):
        evaluate_stitches(stitched("unequal"), [batch], progress=False, split=True)
