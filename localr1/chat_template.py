"""Chat messages to a prompt: the model's own template, and what may become a control token.

The template writes control tokens; what people wrote never does. So every text in the messages is
protected (tokenizer.py) before the template sees it, and the template's result is encoded with
control tokens allowed. Assistant messages, which are the model's own words, keep <think> and
</think>, because templates look for them to drop earlier thinking.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localr1.errors import TemplateError
from localr1.template_sandbox import FIX, Limits, TemplateSandbox
from localr1.tokenizer import Tokenizer, strip_marks

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
MAX_SOURCE = 1 << 20
R1_ASSISTANT = "<｜Assistant｜>"
"""What the templates of DeepSeek's models end in. Those of the first R1 releases leave <think> to
the model, which then sometimes does not think; DeepSeek advises to force it (R1's model card)."""


class ChatTemplate:
    """A Jinja template, rendered in a sandbox of its own (template_sandbox.py).

    source: as in tokenizer_config.json. bos_token, eos_token: offered to it by these names.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None,
        eos_token: str | None,
        limits: Limits | None = None,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                "chat template",
                expected=f"at most {MAX_SOURCE:,} characters",
                found=f"{len(source):,}",
                fix=FIX,
            )
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._sandbox = TemplateSandbox(source, limits)

    def start(self) -> None:
        """Get ready in the background for the first rendering."""
        self._sandbox.start()

    def close(self) -> None:
        """End the sandbox's process. A later rendering starts another."""
        self._sandbox.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The template's text for `messages` ({"role": ..., "content": ...}). kwargs: further names
        the template may read ("tools", "enable_thinking").

        Raises TemplateError: the template is malformed, refuses the messages, or crosses a limit.
        """
        context: dict[str, Any] = {"tools": None, "documents": None, **kwargs}
        context["messages"] = [dict(message) for message in messages]
        context["add_generation_prompt"] = add_generation_prompt
        context["bos_token"] = self.bos_token or ""
        context["eos_token"] = self.eos_token or ""
        return self._sandbox.render(context)

    def starts_in_thinking(self, rendered: str) -> bool:
        """Whether a rendered prompt ends inside a thinking block that the model is to continue."""
        return rendered.rstrip().endswith(THINK_OPEN)

    def supports_system(self) -> bool:
        """Whether a system message reaches the prompt. Some templates refuse it, some drop it."""
        probe = "localr1 asks whether this is shown"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "Hello"}]
        try:
            return probe in self.render(messages)
        except TemplateError:
            self.render(messages[1:])  # Raises what is wrong with the template itself.
            return False


@dataclass(frozen=True)
class ChatPrompt:
    """text: what the ids say, for people. starts_in_thinking: the model continues a thought."""

    ids: list[int]
    text: str
    starts_in_thinking: bool


def prepare_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    **kwargs: Any,
) -> ChatPrompt:
    """Messages to the prompt a model reads.

    thinking: True opens a thinking block, False gives an empty one, None does as the model's makers
    advise. It is also what the template is told as `enable_thinking`, unless None. bos appears
    exactly once where the template or the tokenizer asks for it. Raises TemplateError and
    TokenizerError.
    """
    protected = [_protect_message(tokenizer, message) for message in messages]
    variables = _protect(tokenizer, kwargs, frozenset())
    if thinking is not None:
        variables.setdefault("enable_thinking", thinking)
    rendered = template.render(protected, add_generation_prompt=add_generation_prompt, **variables)
    rendered = _with_one_bos(rendered, tokenizer)
    if add_generation_prompt:
        rendered += _thinking_suffix(template, tokenizer, rendered, thinking)
    return ChatPrompt(
        ids=tokenizer.encode(rendered, allow_special=True),
        text=strip_marks(rendered),
        starts_in_thinking=template.starts_in_thinking(rendered),
    )


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    **kwargs: Any,
) -> list[int]:
    """The ids of `prepare_chat`."""
    return prepare_chat(template, tokenizer, messages, **kwargs).ids


def knows_thinking(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether the model has a thinking block, by what its template or its vocabulary says."""
    return THINK_CLOSE in template.source or tokenizer.special_id(THINK_CLOSE) is not None


def _protect_message(tokenizer: Tokenizer, message: Mapping[str, Any]) -> dict[str, Any]:
    keep = {THINK_OPEN, THINK_CLOSE} if message.get("role") == "assistant" else set()
    protected: dict[str, Any] = _protect(tokenizer, message, frozenset(keep))
    return protected


def _protect(tokenizer: Tokenizer, value: Any, keep: frozenset[str]) -> Any:
    """Every text in a JSON value, keys too (a tool's parameters are named by a stranger); those the
    template looks up spell no control token."""
    if isinstance(value, str):
        return tokenizer.protect(value, keep)
    if isinstance(value, Mapping):
        pairs = ((_protect(tokenizer, each, keep) for each in item) for item in value.items())
        return dict(tuple(pair) for pair in pairs)
    if isinstance(value, (list, tuple)):
        return [_protect(tokenizer, inner, keep) for inner in value]
    return value


def _with_one_bos(rendered: str, tokenizer: Tokenizer) -> str:
    bos = tokenizer.bos_token
    if not bos:
        return rendered
    if not rendered.startswith(bos):
        return bos + rendered if tokenizer.adds_bos else rendered
    # ChatML's templates begin every message with what some files call bos: no two in a row.
    while rendered.startswith(bos + bos):
        rendered = rendered[len(bos) :]
    return rendered


def _thinking_suffix(
    template: ChatTemplate, tokenizer: Tokenizer, rendered: str, thinking: bool | None
) -> str:
    """What has to follow the rendered prompt so that the model thinks, or does not."""
    is_open = template.starts_in_thinking(rendered)
    if not knows_thinking(template, tokenizer) or rendered.rstrip().endswith(THINK_CLOSE):
        return ""
    if thinking is False:
        return "\n</think>\n\n" if is_open else "<think>\n\n</think>\n\n"
    is_r1 = rendered.endswith(R1_ASSISTANT) and THINK_CLOSE in template.source
    return "<think>\n" if not is_open and (is_r1 or thinking) else ""
