"""/tokens: how the model counts."""

from localr1.cli.session import ChatSession


def show_tokens(session: ChatSession, text: str) -> None:
    """Without text: what the next message's prompt holds before it is written."""
    engine = session.conversation.engine
    if text:
        ids = engine.tokenizer.encode(text)
        pieces = "|".join(engine.tokenizer.decode([each]) for each in ids)
        session.output.line(f"{len(ids):,} tokens: {pieces}")
        return
    used = len(session.conversation.prompt(session.with_attached("")).ids)
    session.output.fields(
        {
            "context": f"{engine.context:,} tokens",
            "used": f"{used:,} ({used / engine.context:.0%})",
            "left": f"{max(engine.context - used, 0):,} for your next message and its reply",
        }
    )
