"""Tokens to the text that may be shown, as it is made."""

from __future__ import annotations

from collections.abc import Iterable

from tpmpi.tokenizer import StreamDecoder


class StopText:
    """Cuts the stream at the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Iterable[str]):
        self.stops, self.held, self.found = tuple(stops), '', False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self.held += text
        starts = [at for at in (self.held.find(s) for s in self.stops) if at >= 0]
        if starts:
            self.found = True
            shown, self.held = self.held[:min(starts)], ''
            return shown
        keep = max((self._begun(s) for s in self.stops), default=0)
        shown, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return shown

    def _begun(self, stop: str) -> int:
        """Characters of a stop text with which what is held ends: no more than are held, however long that is."""
        most = min(len(stop) - 1, len(self.held))
        return next((n for n in range(most, 0, -1) if stop.startswith(self.held[-n:])), 0)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self.held = self.held, ''
        return shown


class TextStream:
    """Tokens to the text that may be shown: whole characters, and nothing of a stop text."""

    def __init__(self, tokenizer, stops: Iterable[str]):
        self.decoder, self.stop_text = StreamDecoder(tokenizer), StopText(stops)

    @property
    def stopped(self) -> bool:
        """A stop text has come."""
        return self.stop_text.found

    def push(self, token: int) -> str:
        """The text that can be shown after one more token."""
        return self.stop_text.push(self.decoder.push(token))

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return '' if self.stopped else self.stop_text.push(self.decoder.flush()) + self.stop_text.flush()
