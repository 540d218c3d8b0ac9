"""Guesses of the next tokens of a text: what followed when its last few tokens stood there before.

Prompt lookup decoding (Saxena, 2023). The model checks all of a guess in one step, so a wrong one costs time and never
changes a text. How much is guessed depends on the text and on how earlier guesses fared, not on a clock.
"""

LENGTHS = (4, 3, 2)  # of the ends of the text that are looked up, longest first
MOST = 15  # tokens guessed at once
PATIENCE = 32  # at most so many tokens without a guess after wrong ones


class Lookup:
    """Guesses for one text."""

    def __init__(self, text: list[int]) -> None:
        self.text: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # where the token after a few tokens stands
        self.most, self.rest, self.pause = 3, 0, 1
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        for length in LENGTHS:
            if len(self.text) >= length:
                self.places[tuple(self.text[-length:])] = len(self.text)
        self.text.append(token)
        self.rest = max(0, self.rest - 1)

    def guess(self) -> list[int]:
        """The tokens that should follow; none where the end of the text is new, or guesses were wrong of late."""
        for length in LENGTHS if not self.rest else ():
            place = self.places.get(tuple(self.text[-length:]))
            if place is not None and len(self.text) >= length:
                grown = list(self.text)
                for at in range(place, place + self.most):  # beyond the end of the text: into the guess itself
                    grown.append(grown[at])
                return grown[len(self.text) :]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Note how many tokens of a guess came true: guess more after all did, pause after none."""
        if right == guessed:
            self.most, self.pause = min(MOST, 2 * self.most + 1), 1
        elif right:
            self.most, self.pause = max(1, right), 1
        else:
            self.most, self.rest, self.pause = 3, self.pause, min(PATIENCE, 2 * self.pause)
