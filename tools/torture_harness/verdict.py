"""What came of one case: how a command ended, and whether that may be."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Outcome(Enum):
    """The columns of the table; those in capitals may not be."""

    REFUSED = "refused in one line"
    SAME = "same result"
    EDITED = "accepted as edited"
    WRONG = "ACCEPTED WRONG"
    UNTOLD = "NOT ONE LINE"
    LEFT = "LEFT SOMETHING"
    TRACEBACK = "TRACEBACK"
    HANG = "HANG"
    CODE = "CODE EXECUTED"

    @property
    def good(self) -> bool:
        """Whether it may be."""
        return not self.value.isupper()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        status: its exit status, as minus the signal's number where one killed it.
        stdout: what it printed.
        stderr: what it told.
        hung: it was stopped for taking too long.
        result: what it made, as a plain value that compares; None unless the status is 0.
    """

    status: int
    stdout: str = ""
    stderr: str = ""
    hung: bool = False
    result: Any = None


@dataclass(frozen=True)
class Allowed:
    """What a case may end in, beside a refusal.

    Args:
        result: the result that is as good as a refusal; None refuses every result.
        edited: any result is, since what was changed is the user's to change.
    """

    result: Any = None
    edited: bool = False


def judge(ended: Ended, allowed: Allowed, canary: Path | None = None) -> tuple[Outcome, str]:
    """The outcome of a case, and the words that show it.

    Args:
        ended: how the command ended.
        allowed: what it may end in.
        canary: a path that exists if code of the case was executed.
    """
    told = re.findall("taperlit: error: .*", ended.stderr)
    last = (ended.stderr.strip().splitlines() or [""])[-1][-300:]
    if canary is not None and canary.exists():
        return Outcome.CODE, f"{canary.name} was made"
    if ended.hung:
        return Outcome.HANG, last
    if "Traceback (most recent call last)" in ended.stderr or ended.status not in (0, 1, 2):
        return Outcome.TRACEBACK, last if ended.status >= 0 else f"signal {-ended.status}: {last}"
    if ended.status:
        return (Outcome.REFUSED, told[0]) if len(told) == 1 else (Outcome.UNTOLD, last)
    if allowed.result is not None and ended.result == allowed.result:
        return Outcome.SAME, ""
    if allowed.edited:
        return Outcome.EDITED, ""
    if isinstance(ended.result, dict) and isinstance(allowed.result, dict):
        keys = sorted(ended.result.keys() | allowed.result.keys())
        differ = [key for key in keys if ended.result.get(key) != allowed.result.get(key)]
        return Outcome.WRONG, f"status 0, and other {', '.join(differ)}"
    return Outcome.WRONG, f"status 0, {str(ended.result)[:120]}"
