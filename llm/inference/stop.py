"""Stop texts: where an answer ends before a text that was asked for."""


class Stop:
    """Ends a text before the first of `texts`; what could begin one of them is held back."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.held, self.over = texts, "", False

    def feed(self, piece: str) -> str:
        """The text that may be shown after this piece."""
        if self.over:
            return ""
        self.held += piece
        found = [at for at in (self.held.find(text) for text in self.texts) if at >= 0]
        if found:
            shown, self.held, self.over = self.held[: min(found)], "", True
            return shown
        kept = max((_begun(self.held, text) for text in self.texts), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown


def _begun(held: str, text: str) -> int:
    """Length of the longest suffix of `held` that is a prefix of `text`, but not all of it."""
    at = held.find(text[0], max(0, len(held) - len(text) + 1))
    while at >= 0 and not text.startswith(held[at:]):
        at = held.find(text[0], at + 1)
    return len(held) - at if at >= 0 else 0
