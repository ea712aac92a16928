"""What a stress test found: a row per case and dtype, a verdict, and the line that folding prints."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenizers import Tokenizer

STEEP = 10.0  # times the median that the largest scale may be before the line warns; a normalised model has 2 to 3


@dataclass(frozen=True)
class Outcome:
    """What one case gave in one dtype.

    Args:
        case: its name.
        dtype: of weights and activations, such as ``float32``.
        tokens: positions that were looked at.
        nonfinite: logits among theirs that are NaN or infinite.
        largest_logit: the largest absolute value of a finite logit; None where there was none.
        scale_ratio: the largest root mean square of a pre-logit residual over the median of them, infinite where one
            is not finite; None where the residual is not known, or was not looked at.
        worst_token: id of the token at the worst position: the first in its context whose logits are not finite, else
            the one with the largest residual (or logit, where that is not known).
        worst_position: where it stood.
        difference: the largest difference of the logits of cached decoding from those of a forward pass, relative to
            the largest of them; None in other cases.
        difference_length: how many tokens the cache held there.
        note: why the case was not tried.
    """

    case: str
    dtype: str
    tokens: int = 0
    nonfinite: int = 0
    largest_logit: float | None = None
    scale_ratio: float | None = None
    worst_token: int | None = None
    worst_position: int | None = None
    difference: float | None = None
    difference_length: int | None = None
    note: str | None = None


COLUMNS = {
    "case": "case",
    "dtype": "dtype",
    "tokens": "tokens",
    "nonfinite": "not finite",
    "ratio_of_scales": "largest scale / median",
    "largest_logit": "largest |logit|",
    "difference": "cached against full",
    "worst": "worst",
}
"""Headings of the table, by the keys of :meth:`StressReport.rows`."""


@dataclass(frozen=True)
class StressReport:
    """What a stress test found.

    Args:
        outcomes: a row per case and dtype, in the order in which they ran.
        own: the model's own dtype.
        tolerance: of ``Outcome.difference`` in the own dtype.
        tokenizer_json: to tell tokens as text, or None.
    """

    outcomes: list[Outcome]
    own: str
    tolerance: float
    tokenizer_json: str | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """In the model's own dtype every logit is finite, and cached decoding is the forward pass."""
        mine = [outcome for outcome in self.outcomes if outcome.dtype == self.own]
        return not any(outcome.nonfinite or self._differs(outcome) for outcome in mine)

    def nonfinite(self, dtype: str) -> int:
        """Logits that are not finite, over all cases in a dtype."""
        return sum(outcome.nonfinite for outcome in self.outcomes if outcome.dtype == dtype)

    @property
    def largest(self) -> Outcome | None:
        """The outcome with the largest scale ratio in the own dtype; None where no residual was seen."""
        seen = [outcome for outcome in self.outcomes if outcome.dtype == self.own and outcome.scale_ratio is not None]
        return max(seen, key=lambda outcome: outcome.scale_ratio or 0.0, default=None)

    def _differs(self, outcome: Outcome) -> bool:
        return outcome.difference is not None and not outcome.difference <= self.tolerance

    def rows(self) -> list[dict[str, Any]]:
        """The outcomes as plain data, for a table (see :data:`COLUMNS`) or JSON, where infinite is None."""
        name = namer(self.tokenizer_json)
        rows = []
        for outcome in self.outcomes:
            row = asdict(outcome)
            row["ratio_of_scales"] = row.pop("scale_ratio")
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            row["worst"] = outcome.note or _place(outcome, name)
            rows.append(row)
        return rows

    def verdict(self) -> str:
        """One line: what holds in the own dtype, where the largest scale was, and which dtypes the model is not for."""
        name = namer(self.tokenizer_json)
        dtypes = list(dict.fromkeys(o.dtype for o in self.outcomes if o.note is None))
        parts = []
        if bad := self._first_bad(self.own):
            parts.append(f"{self.nonfinite(self.own):,} logits are not finite in {self.own}, {_where(bad, name)}")
        else:
            good = [dtype for dtype in dtypes if not self.nonfinite(dtype)]
            parts.append(f"no non-finite logits in {_listed(good)}")
        for outcome in self.outcomes:
            if outcome.dtype == self.own and self._differs(outcome):
                parts.append(
                    f"cached decoding differs from the forward pass by {outcome.difference:.1e} of the largest logit "
                    f"at {outcome.difference_length} tokens"
                )
        parts += [
            f"{outcome.case} {outcome.note}" for outcome in self.outcomes if outcome.note and outcome.dtype == self.own
        ]
        if (largest := self.largest) is not None:
            parts.append(f"largest scale {largest.scale_ratio:.3g} times the median, {_where(largest, name)}")
        for dtype in dtypes:
            if dtype != self.own and (bad := self._first_bad(dtype)):
                parts.append(f"not for {dtype}: {self.nonfinite(dtype):,} logits are not finite, {_where(bad, name)}")
        return "; ".join(parts)

    @property
    def calm(self) -> bool:
        """Whether :meth:`line` is none that warns: all is finite and no scale is many times the median."""
        largest = self.largest
        return self.ok and (largest is None or (largest.scale_ratio or 0.0) <= STEEP)

    def line(self) -> str:
        """What folding prints: one line that names the worst token where there is something to warn of."""
        name = namer(self.tokenizer_json)
        tokens = sum(outcome.tokens for outcome in self.outcomes)
        if bad := self._first_bad(self.own):
            return (
                f"stress: WARNING: {self.nonfinite(self.own):,} logits are not finite in {tokens:,} tokens of unusual "
                f"input, {_where(bad, name)}; taperlit stress tells more"
            )
        largest = self.largest
        text = f"stress: no non-finite logits in {tokens:,} tokens of unusual input"
        if largest is None:
            return text
        text += f"; largest scale {largest.scale_ratio:.3g} times the median"
        if self.calm:
            return text
        return f"{text}, which is much: WARNING: {_where(largest, name)}; taperlit stress tells more"

    def _first_bad(self, dtype: str) -> Outcome | None:
        return next((o for o in self.outcomes if o.dtype == dtype and o.nonfinite), None)


def namer(tokenizer_json: str | None) -> Callable[[int], str]:
    """What tells a token id, as text too where the tokenizer is known."""
    tokenizer = Tokenizer.from_str(tokenizer_json) if tokenizer_json else None

    def name(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False) if tokenizer else ""
        return f"token {token} {text!r}" if text else f"token {token}"

    return name


def _place(outcome: Outcome, name: Callable[[int], str]) -> str:
    if outcome.worst_token is None:
        return ""
    return f"{name(outcome.worst_token)} at position {outcome.worst_position}"


def _where(outcome: Outcome, name: Callable[[int], str]) -> str:
    return f"{outcome.case}: {_place(outcome, name)}"


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
