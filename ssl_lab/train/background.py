"""Work beside training, such as the writing of a checkpoint."""

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work at a time in a thread; its error comes up where the work is waited for.

    The process does not end before the work does, unless it is killed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, after that which is under way.

        Raises:
            Exception: that of the work before.
        """
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when there is nothing under way.

        Raises:
            Exception: that of the work, once.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
