"""How a run ends early, and starts again: signals, errors, ranks that are lost or hang, restarts (docs/runs.md)."""

from fastssl.ending.failure import report_failure
from fastssl.ending.restarts import SAVED, continue_command, mark_saved, supervise
from fastssl.ending.signals import DELAY, FAIL, HANDLED, INTERRUPTED, REQUEUE, Signals, Stopped
from fastssl.ending.watchdog import Watchdog, progress
