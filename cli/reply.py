"""What came of one generation, for people and for programs."""

from dataclasses import dataclass
from typing import Any

from localr1.cli.experts import usage_document, usage_line
from localr1.cli.memory import peak_memory_bytes
from localr1.cli.output import format_bytes
from localr1.engine.events import Done


@dataclass
class Reply:
    """seconds_thinking: from the start to the last of it. thinking_tokens: so far; `done` has the
    count at the end."""

    answer: str = ""
    thinking: str = ""
    thinking_tokens: int = 0
    seconds_thinking: float = 0.0
    done: Done | None = None

    @property
    def rate(self) -> float:
        """New tokens a second, after the first."""
        if self.done is None or self.done.usage.decode_seconds <= 0:
            return 0.0
        return max(self.done.usage.completion_tokens - 1, 0) / self.done.usage.decode_seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read a second: those that were not in the cache."""
        if self.done is None or self.done.usage.prefill_seconds <= 0:
            return 0.0
        usage = self.done.usage
        return (usage.prompt_tokens - usage.cached_tokens) / usage.prefill_seconds

    def stats_line(self) -> str:
        if self.done is None:
            return "The reply did not end."
        usage = self.done.usage
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        drafted = ""
        if usage.drafted_tokens:
            drafted = f"\ndrafts: {usage.accepted_tokens} of {usage.drafted_tokens} right"
        experts = "" if usage.experts is None else f"\n{usage_line(usage.experts)}"
        return (
            f"{usage.prompt_tokens}{cached}+{usage.completion_tokens} tok · {self.rate:.1f} tok/s"
            f" · TTFT {usage.prefill_seconds:.2f} s · peak {format_bytes(peak_memory_bytes())}"
            f"{drafted}{experts}"
        )

    def to_json(self) -> dict[str, Any]:
        assert self.done is not None
        usage = self.done.usage
        return {
            "answer": self.answer,
            "thinking": self.thinking,
            "finish_reason": self.done.reason,
            **({} if self.done.closed is None else {"thinking_closed": self.done.closed}),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "thinking_tokens": usage.thinking_tokens,
                "drafted_tokens": usage.drafted_tokens,
                "accepted_tokens": usage.accepted_tokens,
            },
            "timings": {
                "time_to_first_token_s": round(usage.prefill_seconds, 4),
                "thinking_s": round(self.seconds_thinking, 4),
                "decode_s": round(usage.decode_seconds, 4),
                "prompt_tokens_per_second": round(self.prefill_rate, 2),
                "tokens_per_second": round(self.rate, 2),
            },
            "peak_memory_bytes": peak_memory_bytes(),
            **({} if usage.experts is None else {"experts": usage_document(usage.experts)}),
        }
