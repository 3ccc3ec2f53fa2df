"""The process that renders chat templates. Run as a file by template_sandbox.py, never imported.

A template is a program by a stranger. Here it meets jinja2's sandbox, limits on time, memory and
output, and a process that holds nothing worth reaching. Messages in both directions are JSON behind
their length (4 bytes, big end first). The first one configures; every further one is a rendering.
"""

import json
import struct
import sys
from typing import Any, BinaryIO


class TooLongError(Exception):
    pass


def read(stream: BinaryIO) -> Any:
    """The next message, None at the end."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", header)[0]))


def write(stream: BinaryIO, message: object) -> None:
    data = json.dumps(message).encode("ascii")
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def limit_memory(limit: int) -> None:
    """Where the platform can limit a process's memory. Elsewhere (Windows, macOS) the parent
    watches it; it does so here too."""
    try:
        import resource
    except ImportError:
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):
        return


def make_environment() -> Any:
    """The sandbox, with what transformers offers to templates (its chat template guide)."""
    from datetime import datetime

    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            """jinja2 makes what is unsafe print as nothing; here asking for it is an error."""
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    class Generation(Extension):
        """{% generation %} marks what a model is trained on; to render it is its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a set of the instance)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: object) -> None:
        raise jinja2.exceptions.TemplateError(f"{message}")

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Nothing else is there: a template that asks for it gets jinja2's "undefined".
    known = ("range", "dict", "namespace")
    environment.globals = {name: environment.globals[name] for name in known}
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    return environment


def render(template: Any, context: dict[str, Any], max_output: int) -> str:
    pieces = []
    length = 0
    for piece in template.generate(**context):
        pieces.append(piece)
        length += len(piece)
        if length > max_output:
            raise TooLongError
    text = "".join(pieces)
    # Characters can have several bytes; lone surrogates count as three.
    if len(text.encode("utf-8", "surrogatepass")) > max_output:
        raise TooLongError
    return text


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    import faulthandler

    setup = read(requests)
    if setup is None:
        return
    sys.path[:] = setup["path"]
    environment = make_environment()
    write(replies, {"ready": True})
    limit_memory(setup["max_memory"])
    template = None
    while (context := read(requests)) is not None:
        # Ends this process even while C code holds the interpreter, should the parent be gone.
        faulthandler.dump_traceback_later(setup["seconds"] + 1.0, exit=True)
        reply: dict[str, str]
        try:
            if template is None:
                template = environment.from_string(setup["source"])
            reply = {"text": render(template, context, setup["max_output"])}
        except TooLongError:
            reply = {"limit": "output"}
        except MemoryError:
            reply = {"limit": "memory"}
        except Exception as error:  # Whatever a stranger's program can raise.
            reply = {"error": f"{error}"[:500], "kind": type(error).__name__}
        faulthandler.cancel_dump_traceback_later()
        write(replies, reply)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
