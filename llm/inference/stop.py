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
        longest = len(self.held)
        ends = (text[:size] for text in self.texts for size in range(1, min(len(text) - 1, longest) + 1))
        kept = max((len(end) for end in ends if self.held.endswith(end)), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown
