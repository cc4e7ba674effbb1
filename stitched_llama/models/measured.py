"""A model's table, whose metrics are of the weights they were measured on and of no others."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from stitched_llama.bundles import fingerprint_tensors
from stitched_llama.space import StitchTable


class MeasuredTable:
    """`table` of stitched models: it remembers on which weights each metric was put into it."""

    _table = StitchTable()
    _measured: dict[str, str] = {}  # metric -> digest of the weights

    @property
    def table(self) -> StitchTable:
        """Metrics and importance of the stitches, and which are published; metrics that are set count as measured now."""
        return self._table

    @table.setter
    def table(self, table: StitchTable) -> None:
        old = self._table.metrics
        new = [name for name, values in table.metrics.items() if values is not old.get(name)]
        kept = {name: digest for name, digest in self._measured.items() if name in table.metrics}
        self._measured = kept | (dict.fromkeys(new, self._weights_digest()) if new else {})
        self._table = table

    def table_to_save(self) -> StitchTable:
        """The table without metrics that were measured on other weights; those of before training say so by their name."""
        names = [name for name in self._table.metrics if not name.endswith("_before")]
        now = self._weights_digest() if names else None
        stale = [name for name in names if self._measured.get(name) != now]
        if stale:
            logging.getLogger(__name__).warning(
                "%s: measured on other weights than these and left out of the saved table; evaluate the stitches again "
                "(evaluate_stitches, model.table.with_metrics)",
                ", ".join(stale),
            )
        return self._table.without_metrics(stale)

    @contextmanager
    def same_outputs(self) -> Iterator[None]:
        """While it lasts the weights change their form alone: metrics that were measured on them count for what they become."""
        before = self._weights_digest() if self._measured else None
        yield
        if self._measured:
            now = self._weights_digest()
            self._measured = {n: now if digest == before else digest for n, digest in self._measured.items()}

    def _weights_digest(self) -> str:
        parts = fingerprint_tensors(self._saved_tensors(self.keys))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
