"""Text from tokens, as they come."""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from tokenizers import Tokenizer

HALF = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
READ_BEFORE = 8  # of the prompt's tokens: a decoder may write a word differently at the start of a text


class TextStream:
    """The text that continues a prompt, piece by piece; bytes that are not a whole character yet are held back.

    ``tokenizers.decoders.DecodeStream`` would raise where a later byte spoils characters that it has shown.

    Args:
        tokenizer: of the tokens.
        prompt: token ids that the text continues.
        stop: ids of tokens that end the text, and are no part of it.
        limit: most tokens; further ones are left out. None is no limit.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Collection[int] = (), limit: int | None = None
    ) -> None:
        self.tokenizer, self.stop, self.limit = tokenizer, frozenset(stop), limit
        self._ids = list(prompt[-READ_BEFORE:])
        self._first = len(self._ids)  # of the text's own tokens
        # A piece is what decoding ids[start:] shows beyond ids[start:known]: tokens for the decoder to go on from.
        self._start, self._known = 0, len(self._ids)
        self._shown = ""
        self._stopped = False

    @property
    def tokens(self) -> list[int]:
        """Ids so far, without the one that ended the text."""
        return self._ids[self._first :]

    @property
    def ended(self) -> Literal["stop", "length"] | None:
        """Why no more tokens are taken, if so."""
        if self._stopped:
            return "stop"
        return "length" if self.limit is not None and len(self._ids) - self._first >= self.limit else None

    @property
    def text(self) -> str:
        """All tokens so far as text; bytes that are no whole character are shown as U+FFFD."""
        return _after(self._decode(0, self._first), self._decode(0))

    def take(self, tokens: Iterable[int]) -> None:
        """Append tokens up to one that ends the text; -1, which an engine gives for rows that have ended, does too."""
        for token in tokens:
            if self.ended:
                return
            if token < 0 or token in self.stop:
                self._stopped = True
            else:
                self._ids.append(token)

    def piece(self) -> str:
        """Text that was completed since the last piece, maybe none."""
        shown, whole = self._decode(self._start, self._known), self._decode(self._start)
        if len(whole) <= len(shown) or whole.endswith(HALF):
            return ""
        self._start, self._known = self._known, len(self._ids)
        return self._show(_after(shown, whole))

    def rest(self) -> str:
        """What is left to show when no more tokens come."""
        text = self.text
        return self._show(text[len(self._shown) :]) if text.startswith(self._shown) else ""

    def _show(self, piece: str) -> str:
        self._shown += piece
        return piece

    def _decode(self, start: int, end: int | None = None) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True)


def _after(old: str, new: str) -> str:
    """What a text has after an older one; where later bytes spoiled the older one's end, from there on."""
    if new.startswith(old):
        return new[len(old) :]
    return new[next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new)) :]
