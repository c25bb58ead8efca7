"""Functions that can stop in the middle and be taken up again: what a paused forward runs in.

Greenlets where the package is there: all batches stay in one thread, with one set of library buffers. A thread each
otherwise: the same order of events, but every thread pays for buffers of its own (about 20 MB in MKL).
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Stopped(BaseException):
    """Unwinds a paused body that is no longer wanted."""


class Carrier(Protocol):
    """A body that is run in pieces.

    Attributes:
        done: Whether the body has come to its end (or raised).
    """

    done: bool

    def resume(self) -> None:
        """Runs the body to its next pause or its end; raises what the body raises."""

    def pause(self) -> None:
        """Called inside the body: goes back to `resume`.

        Raises:
            Stopped: The body is to be unwound.
        """

    def stop(self) -> None:
        """Unwinds a paused body; does nothing to one that is done."""


class GreenletCarrier:
    """A body in a greenlet of the calling thread."""

    def __init__(self, body: Callable[[], None]) -> None:
        import greenlet

        self.done = False
        self._body = body
        self._fiber: Any = greenlet.greenlet(self._run)
        self._home: Any = None
        self._current = greenlet.getcurrent

    def _run(self) -> None:
        try:
            self._body()
        except Stopped:
            pass
        finally:
            self.done = True

    def resume(self) -> None:
        """Runs the body to its next pause or its end; what it raises comes out here."""
        self._home = self._current()
        self._fiber.parent = self._home
        self._fiber.switch()

    def pause(self) -> None:
        """Goes back to `resume`."""
        self._home.switch()

    def stop(self) -> None:
        """Raises Stopped where the body stands."""
        if self._fiber and not self.done:
            self._fiber.parent = self._current()
            self._fiber.throw(Stopped)
        self.done = True


class ThreadCarrier:
    """A body in a thread that waits whenever its turn is over."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.done = False
        self._body = body
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        try:
            self._wait()
            self._body()
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that resumes, which raises it
            self._error = error
        finally:
            self.done = True
            self._back.release()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._stopping:
            raise Stopped

    def resume(self) -> None:
        """Runs the body to its next pause or its end; what it raises comes out here."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._turn.release()
        self._back.acquire()
        if self.done:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Goes back to `resume`."""
        self._back.release()
        self._wait()

    def stop(self) -> None:
        """Raises Stopped where the body stands, and waits for its end."""
        self._stopping = True
        if self._thread is not None:
            self._turn.release()
            self._thread.join()
        self.done = True


def make_carrier(body: Callable[[], None]) -> Carrier:
    """The best carrier there is."""
    return GreenletCarrier(body) if importlib.util.find_spec("greenlet") is not None else ThreadCarrier(body)
