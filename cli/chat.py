"""`localr1 chat`: a conversation at the terminal, or one answer with -p or piped stdin."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.answer_format import answer_schema
from localr1.cli.chat_look import (
    FIRST_RUN,
    WELCOME,
    HideThinkingOption,
    PlainOption,
    ThinkChoice,
    ThinkViewOption,
    conversation_style,
    one_shot_style,
    think_view,
)
from localr1.cli.chat_options import (
    ContinueOption,
    FormatOption,
    KvBitsOption,
    LookAheadOption,
    NoSessionOption,
    NoThinkOption,
    OnFullOption,
    ReplyOptions,
    ResumeOption,
    SchemaOption,
    ThinkBudgetOption,
    drops_oldest,
    session_wanted,
)
from localr1.cli.experts import (
    DeviceOption,
    DevicesOption,
    GpuLayersOption,
    PolicyOption,
    RamOption,
    ReadAheadOption,
    VramOption,
    expert_options,
)
from localr1.cli.keyboard import ended_by_signals, quiet_keyboard
from localr1.cli.loading import EngineLoader
from localr1.cli.output import Output
from localr1.cli.parameters import parse_assignments
from localr1.cli.session_plan import SessionPlan
from localr1.cli.text_files import decode_text
from localr1.errors import UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.cli.conversation import Conversation
    from localr1.cli.keeper import SessionKeeper
    from localr1.experts.hot_set import HotSet

HISTORY_FILE = "chat_history"
INTERRUPTED = 130


def joined_prompt(prompt: str | None, piped: str | None) -> str | None:
    """-p first, then what stdin brought; None when there is neither."""
    parts = [part.strip() for part in (prompt, piped) if part and part.strip()]
    return "\n\n".join(parts) if parts else None


def piped_text(output: Output) -> str | None:
    """All of stdin unless it is a terminal or absent."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    text, replaced = decode_text(sys.stdin.buffer.read())
    if replaced:
        output.note(f"stdin is no UTF-8 throughout: {replaced:,} characters replaced.")
    return text


def check_conversation(prompt: str | None, *, as_json: bool) -> None:
    """A conversation needs a person on both sides. prompt: what -p gave, if it was there."""
    if prompt is not None or as_json or sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("the prompt is empty", fix="Give one with -p or on stdin.")
    if not sys.stdout.isatty():
        raise UsageError("stdout is not a terminal", fix="Give a prompt with -p.")


def load_conversation(
    path: Path, output: Output, *, loader: EngineLoader, hot: "HotSet | None" = None
) -> "Conversation":
    """Raises LocalR1Error of any kind: a checkpoint is untrusted."""
    engine = loader.load(path, hot)
    from localr1.cli.conversation import Conversation

    if engine.where:
        output.note(engine.where)
    return Conversation(engine)


def answer_once(
    conversation: "Conversation",
    output: Output,
    text: str,
    *,
    keeper: "SessionKeeper | None",
    as_json: bool,
    view: ThinkChoice | None,
    stats: bool,
) -> int:
    """One prompt: the answer to stdout, thinking dim to stderr; or one JSON document."""
    from localr1.cli.session import ChatSession

    style = one_shot_style(view, as_json=as_json)
    session = ChatSession(output, conversation, style, stats, keeper=keeper)
    with quiet_keyboard(), closing(session):
        reply = session.say(text)
    if as_json:
        output.json({"model": str(conversation.engine.name), **reply.to_json()})
    return INTERRUPTED if reply.done is not None and reply.done.reason == "cancelled" else 0


def converse_at_terminal(
    conversation: "Conversation",
    output: Output,
    loader: EngineLoader,
    history_path: Path | None,
    *,
    keeper: "SessionKeeper | None",
    view: ThinkChoice | None,
    stats: bool,
) -> int:
    """history_path: where what is typed is kept; there is none before the first run."""
    from localr1.cli import repl
    from localr1.cli.session import ChatSession

    session = ChatSession(
        output,
        conversation,
        conversation_style(view),
        stats,
        goes_on=True,
        keeper=keeper,
        loader=loader,
        over_ssh=loader.settings.over_ssh,
    )
    with closing(session):
        session.settle()
        is_first = history_path is not None and not history_path.exists()
        history = None if history_path is None else repl.open_history(history_path)
        for line in (FIRST_RUN if is_first else WELCOME).split("\n"):
            output.note(line.format(model=conversation.engine.name))
        return repl.converse(session, repl.make_prompt(session, history))


def chat(
    model: Annotated[
        str | None, typer.Argument(help="A model's directory, .gguf file, or name.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Answer this and leave; stdin is appended.")
    ] = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System prompt.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", metavar="NAME=VALUE", help="A sampling parameter."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the nucleus of this mass.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep what has this share of the largest probability.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1: none.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="End a reply after so many.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Context window in tokens.")] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="CPU threads.")
    ] = None,
    think_budget: ThinkBudgetOption = None,
    no_think: NoThinkOption = False,
    resume: ResumeOption = None,
    continues: ContinueOption = False,
    no_session: NoSessionOption = False,
    on_full: OnFullOption = None,
    answer_format: FormatOption = None,
    schema: SchemaOption = None,
    look_ahead: LookAheadOption = True,
    kv_bits: KvBitsOption = None,
    think_view_option: ThinkViewOption = None,
    hide_thinking: HideThinkingOption = False,
    plain: PlainOption = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens and speed of each reply.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document (with -p).")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep what is typed.")
    ] = False,
    ram: RamOption = None,
    vram: VramOption = None,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
    policy: PolicyOption = "adaptive",
    read_ahead: ReadAheadOption = None,
) -> None:
    """Talk to a model. Enter sends, /help lists the commands, Ctrl-C stops a reply."""
    settings = Settings.from_environment()
    output = Output(color=settings.color, is_plain=plain)
    flags = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    replies = ReplyOptions(
        parameters=parse_assignments(option or [], flags),
        system=system,
        no_think=no_think,
        think_budget=think_budget,
        drops_oldest=drops_oldest("--on-full", on_full),
        changes_answers=answer_format is not None or schema is not None,
        answers=answer_schema(answer_format, schema),
        looks_ahead=look_ahead,
    )
    experts = expert_options(ram, vram, device, policy, read_ahead, gpu_layers, devices)
    threads = threads if threads is not None else settings.threads
    view = think_view(think_view_option, hide_thinking)
    plan = SessionPlan.of(settings, session_wanted(resume, continues), keeps=not no_session)
    if model is None:  # A session's own, and what that was held with.
        context = plan.context if context is None else context
        kv_bits = plan.kv_bits if kv_bits is None else kv_bits
    loader = EngineLoader(settings, output, threads, context, experts, kv_bits)
    with ended_by_signals():
        with quiet_keyboard():
            path = loader.find(model or plan.model)
        text = joined_prompt(prompt, piped_text(output))
        if text is None:
            check_conversation(prompt, as_json=as_json)
        with quiet_keyboard():
            conversation = load_conversation(path, output, loader=loader, hot=plan.hot_set(path))
        keeper = None
        if text is None or plan.session_id is not None:  # One answer is no conversation.
            keeper = plan.open(conversation, path, output, context=context, kv_bits=kv_bits)
        replies.apply(conversation, output)
        if text is None:
            history = None if no_history else settings.state_dir / HISTORY_FILE
            code = converse_at_terminal(
                conversation, output, loader, history, keeper=keeper, view=view, stats=stats
            )
        else:
            code = answer_once(
                conversation, output, text, keeper=keeper, as_json=as_json, view=view, stats=stats
            )
    raise typer.Exit(code)
