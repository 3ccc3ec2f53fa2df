"""/read and /copy: text into a message, and an answer out of the chat."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from localr1.cli.clipboard import copy_text
from localr1.cli.session import ChatSession
from localr1.cli.text_files import read_text_file
from localr1.errors import UsageError

FILE_TEMPLATE = "[file name]: {name}\n[file content begin]\n{content}\n[file content end]"
"""DeepSeek-R1's own, from its model card; the question follows on the next line."""
CODE_BLOCK = re.compile(
    r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(.*?)^ {0,3}\1[ \t]*$", re.DOTALL | re.MULTILINE
)


def split_path(text: str) -> tuple[str, str]:
    """The file's name, in quotes if it has spaces, and what follows it."""
    if text[:1] in ("'", '"'):
        name, _, rest = text[1:].partition(text[0])
    else:
        name, _, rest = text.partition(" ")
    return name, rest.strip()


def read_file(session: ChatSession, rest: str) -> None:
    """Raises NotFoundError and UsageError."""
    name, question = split_path(rest)
    if not name:
        raise UsageError("/read", expected="the name of a text file")
    path = Path(name).expanduser()
    content, replaced = read_text_file(path)
    session.attached.append(FILE_TEMPLATE.format(name=path.name, content=content.rstrip("\n")))
    if replaced:
        session.output.note(
            f"{path.name} is no UTF-8 throughout: {replaced:,} characters replaced."
        )
    if question:
        session.send(question)
        return
    tokens = len(session.conversation.engine.tokenizer.encode(content))
    session.output.note(f"{path.name}: {tokens:,} tokens, in front of your next message.")


def complete_path(session: ChatSession, rest: str) -> Iterable[str]:
    """Files and folders that begin like that. A name with a space is put in quotes."""
    quote = rest[:1] if rest[:1] in ("'", '"') else ""
    folder, name = os.path.split(rest.removeprefix(quote))
    try:
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:
        return
    for each, is_folder in found:
        if each.startswith(name) and (name or not each.startswith(".")):
            whole = os.path.join(folder, each) + (os.sep if is_folder else "")
            mark = quote or ('"' if " " in whole else "")
            yield f"{mark}{whole}{'' if is_folder else mark}"


def copy_answer(session: ChatSession, rest: str) -> None:
    """Raises UsageError, and LocalR1Error where there is no clipboard."""
    last = session.last_reply
    if last is None or not last.answer:
        raise UsageError("/copy", expected="an answer", found="none yet")
    text = last.answer
    if rest == "code":
        text = "".join(match[2] for match in CODE_BLOCK.finditer(last.answer))
        if not text:
            raise UsageError("/copy code", expected="code in the last answer", found="none")
    elif rest:
        raise UsageError("/copy", expected="nothing or `code` behind it", found=repr(rest))
    session.output.note(copy_text(text, session.output, over_ssh=session.over_ssh))
