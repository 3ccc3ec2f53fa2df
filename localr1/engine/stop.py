"""Stop texts in a stream whose pieces may cut them anywhere."""

from collections.abc import Sequence


def held_back(text: str, targets: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `targets`."""
    longest = 0
    for target in targets:
        for length in range(min(len(target) - 1, len(text)), longest, -1):
            if text.endswith(target[:length]):
                longest = length
                break
    return longest


class StopMatcher:
    """Passes text on, holding back only what may still become a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now. After the earliest stop text nothing comes any more; neither it
        nor anything behind it is ever returned."""
        if self.has_stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            self._held = ""
            return text[: min(found)]
        keep = len(text) - held_back(text, self._stops)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text
