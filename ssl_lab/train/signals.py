"""Signals that end a run in order: finish the step, save, say how to go on."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

# 75 = try again (EX_TEMPFAIL), 130 as in a shell. Clusters warn by SIGUSR1 or, through submitit, by SIGUSR2; a terminal
# that is closed sends SIGHUP.
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


class Interrupted(SystemExit):
    """Ends the process with the exit code of a signal."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(CODES[received])
        self.received = received


class Signals:
    """Catches what `CODES` lists while it is entered; a second SIGINT ends the process at once. nohup still holds.

    While `deferred`, a signal only sets `received`, which the training loop reads at the end of a step. Otherwise it
    raises `Interrupted`. Processes made by fork ignore what their parent handles.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferred = False
        self._pid = os.getpid()
        self._former = {number: signal.getsignal(number) for number in CODES}
        if self._former[signal.SIGHUP] == signal.SIG_IGN:  # by nohup
            del self._former[signal.SIGHUP]

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._former.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Take over the signals; again after Lightning, which sets handlers of its own when training starts."""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            for number in self._former:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.deferred:
            raise Interrupted(self.received)


def end_with_parent(poll: float = 1.0) -> None:
    """End this process soon after the one that started it: a rank must not outlive the first, even when it hangs."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
