"""SIGTERM, which schedulers send before SIGKILL: the running step is finished, a checkpoint saved and the run ended."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

EXIT_CODE = 128 + signal.SIGTERM  # the status a shell reports for a process ended by the signal


class Interruption(TrainerCallback):
    """Records SIGTERM and ends the run at the end of a step.

    Attributes:
        received: by this process.
        agreed: by any rank, known to all of them, so that all stop at the same step.
    """

    def __init__(self) -> None:
        self.received = self.agreed = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Records the signal while the context is active; in worker processes it keeps its default action."""
        self.received = self.agreed = False
        if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers only there
            yield
            return
        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() == owner:
                self.received = True
            else:  # a data loader's worker, which inherited this handler
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
        if self.agreed or self.received:
            raise SystemExit(EXIT_CODE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
