"""Signals that ask a run to stop: remembered at once, obeyed at the end of the step.

Saving inside a signal handler can hang on a lock that the interrupted code holds, so the handler only sets a flag.
"""

import signal
import threading
from collections.abc import Collection
from types import FrameType

from replknet._errors import RunError

# SIGTERM: SLURM, Kubernetes, systemd. SIGUSR1 and SIGUSR2: the warning before a SLURM time limit (submitit sends
# SIGUSR2). SIGINT: Ctrl-C.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


class RunStoppedError(RunError):
    """Training was asked to stop, has saved `checkpoints/last.ckpt`, and can go on with `--resume auto`."""

    def __init__(self, signum: int, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; everything is saved: go on with --resume auto")
        self.signum = signum


class StopRequest:
    """Listens for stop signals between `listen` and `close`; a second Ctrl-C interrupts without saving.

    `close` puts back the handlers that were there when the object was made.

    Args:
        saving: stop signals after which the state is saved and the training goes on.

    Attributes:
        signum: the signal that asks to stop, or None.
        save: whether one of `saving` came; whoever saves sets it back.
    """

    def __init__(self, saving: Collection[int] = ()) -> None:
        self.saving = frozenset(saving)
        self.signum: int | None = None
        self.save = False
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        self._previous = {number: signal.getsignal(number) for number in numbers}
        self._listening = False

    def listen(self) -> None:
        """Install the handlers; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        for signum in self._previous:
            signal.signal(signum, self._remember)

    def close(self) -> None:
        """Put the earlier handlers back."""
        if not self._listening:
            return
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum in self.saving:
            self.save = True
            return
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
