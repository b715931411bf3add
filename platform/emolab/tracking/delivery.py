"""Brings an outbox to the tracker in the background, again and again until all of it has arrived."""

from __future__ import annotations

import threading
import time

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from emolab.tracking.outbox import Outbox, adopted
from emolab.tracking.reasons import reason_of
from emolab.tracking.sending import Sender, is_refusal

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts, doubling


class Delivery:
    """One thread that sends what waits in an outbox, and in those that dead processes left beside it."""

    def __init__(self, client: MlflowClient, outbox: Outbox) -> None:
        self._client, self._outbox = client, outbox
        self.sender = Sender(client, stopping=lambda: self._closing)
        self._changed = threading.Condition()
        self._closing = self._urgent = False
        self._adopt = True
        self._fruitless = 0
        self.trouble = ""
        """Why the last attempt failed; empty after one that did not."""
        self.wrong = ""
        """Why no attempt can succeed before the configuration is changed; empty otherwise."""
        self._thread = threading.Thread(target=self._work, name="tracker-delivery", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        with self._changed:
            self._changed.notify_all()

    def settle(self, patience: float, *, of_all: bool = False) -> bool:
        """Wait until everything has arrived, an attempt that began after this call brought nothing, or time is up.

        Args:
            patience: seconds.
            of_all: also what processes that have ended in the meantime left behind.

        Returns:
            Whether everything has arrived.
        """
        deadline = time.monotonic() + patience
        with self._changed:
            hopeless_after = self._fruitless + 2  # the attempt that is under way, and one more
            self._adopt = self._adopt or of_all
            while (self._adopt or self._outbox.count()) and not self.wrong:
                self._urgent = True
                self._changed.notify_all()
                remaining = deadline - time.monotonic()
                if remaining <= 0 or (self.trouble and self._fruitless >= hopeless_after):
                    return False
                self._changed.wait(min(remaining, 0.05))
        return not self.wrong

    def close(self, patience: float) -> int:
        """Stop, after one more attempt where there is time for it.

        Returns:
            How many entries still wait; they are on disk.
        """
        self.settle(patience)
        self._closing = True
        self.wake()
        self._thread.join(timeout=1)  # a request that hangs is left to the end of the process
        waiting = self._outbox.count()
        if not self._thread.is_alive():
            self._outbox.close()
        return waiting

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closing:
            before = self._outbox.count()
            try:
                self._attempt()
            except Exception as error:  # whatever the tracker does, it is no reason to fail
                self.trouble = reason_of(error)
            else:
                self.trouble, pause = "", _FIRST_PAUSE
            fruitless = bool(self.trouble) and self._outbox.count() >= before
            self._rest(pause, fruitless=fruitless)
            pause = min(2 * pause, _LONGEST_PAUSE) if fruitless else _FIRST_PAUSE

    def _rest(self, pause: float, *, fruitless: bool) -> None:
        """Wait for something to send, or, after a failure, for a while that only somebody who waits can cut short."""
        deadline = time.monotonic() + (pause if self.trouble else 3600.0)
        with self._changed:
            self._fruitless += fruitless
            self._changed.notify_all()
            while not self._closing and not self._urgent and (remaining := deadline - time.monotonic()) > 0:
                if not self.trouble and self._outbox.count():
                    break
                self._changed.wait(remaining)
            self._urgent = False

    def _attempt(self) -> None:
        if self._adopt:
            self._reach()
            with adopted(self._outbox.path.parent, tracker=self._outbox.about()[0]) as left_behind:
                for outbox in left_behind:
                    self.sender.send(outbox, again=True)
            self._adopt = False
        self.sender.send(self._outbox)

    def _reach(self) -> None:
        try:
            self._client.search_experiments(max_results=1)
        except MlflowException as error:
            if is_refusal(error):
                self.wrong = reason_of(error)
            raise
