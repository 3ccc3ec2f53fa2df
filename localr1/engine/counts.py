"""What is counted while a generation runs."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localr1.engine.events import Usage
from localr1.experts.usage import ExpertUsage

if TYPE_CHECKING:
    from localr1.experts.store import ExpertStore


@dataclass
class Counts:
    """prompt, cached, completion, thinking, forced, drafted, accepted: tokens, as in Usage. first:
    when the first token came. experts, experts_before: the store, and what it had done before."""

    prompt: int
    cached: int
    completion: int = 0
    thinking: int = 0
    forced: int = 0
    drafted: int = 0
    accepted: int = 0
    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None
    experts: "ExpertStore | None" = None
    experts_before: ExpertUsage | None = None

    def usage(self) -> Usage:
        used = None
        if self.experts is not None and self.experts_before is not None:
            used = self.experts.usage - self.experts_before
        now = time.perf_counter()
        first = now if self.first is None else self.first
        return Usage(
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            completion_tokens=self.completion,
            thinking_tokens=self.thinking,
            forced_tokens=self.forced,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            prefill_seconds=first - self.begin,
            decode_seconds=now - first,
            experts=used,
        )
