"""SIGTERM, as schedulers send it before they kill: the running step is finished, a checkpoint saved, the run left."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that the signal ended


class Interruption(TrainerCallback):
    """Whether SIGTERM came, and the callback that ends the run at the end of a step.

    Attributes:
        came: to this process.
        agreed: all ranks know of it, so that all of them stop at the same step.
    """

    def __init__(self) -> None:
        self.came = self.agreed = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it the signal is noted; outside, and in worker processes, it does what it did before."""
        self.came = self.agreed = False
        if threading.current_thread() is not threading.main_thread():  # Python handles signals there alone
            yield
            return
        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() == owner:
                self.came = True
            else:  # a data loader's worker, which inherited this
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def leave(self, args: Any, step: int) -> None:
        """Ends the process with 143 where the signal came.

        Raises:
            SystemExit: it did.
        """
        if self.agreed and args.process_index == 0:
            told = "SIGTERM: checkpoint-%d is saved in %s; go on with --resume auto"
            logging.getLogger(__name__).warning(told, step, args.output_dir)
        if self.agreed or self.came:
            raise SystemExit(EXIT_CODE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
