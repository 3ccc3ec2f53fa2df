"""What strangers' programs cannot do: escapes, bombs, and what is left of the process after."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from localr1 import template_sandbox
from localr1.chat_template import ChatTemplate
from localr1.errors import TemplateError
from localr1.template_sandbox import Limits

QUICK = Limits(seconds=1.0)
"""For templates that run into the limit: the test waits for it."""
SECONDS_TO_STOP = 2.0
"""How long after its limit a rendering may end on a busy machine."""

Message = dict[str, Any]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def make_template(source: str, limits: Limits | None = None) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", limits)


@pytest.fixture(scope="module")
def echo() -> Iterator[ChatTemplate]:
    template = make_template("{{ messages[0].content }}")
    yield template
    template.close()


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ cycler('a').__class__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ strftime_now.__closure__ }}",
    "{{ strftime_now.__self__.modules }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ '{x.__init__.__globals__}'.format(x=namespace) }}",
    "{{ ('{0.__cl' ~ 'ass__}').format(1) }}",
    "{{ ['{0.__class__}']|map('format', 1)|first|attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.__class__ }}",
    "{{ self.__class__ }}",
    "{{ loop.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].clear() }}",
    "{% set x = messages.pop() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__.os }}",
    "{% macro m() %}{{ caller.__globals__.os }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ messages.__getattribute__('__class__') }}",
    "{{ (1).__class__.__base__ }}",
    "{{ (messages|list).__reduce_ex__(2) }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ messages[0].items().__class__ }}",
    "{{ __import__('os').system('id') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}",
    "{{ ''.encode().__class__ }}",
    "{% set g = (x for x in [1]) %}{{ g.gi_frame }}",
    "{{ url_for.__globals__ }}",
    "{{ request.application.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config.items() }}",
]


def test_there_are_fifty_escapes_and_more() -> None:
    assert len(set(ESCAPES)) >= 50


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_is_an_error(source: str) -> None:
    template = make_template(source)
    with pytest.raises(TemplateError, match="chat template"):
        template.render(user("a"))
    template.close()


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "doubling": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "list doubling": "{% set n = namespace(s=[1]) %}"
    "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "repeated text": "{{ 'x' * 10 ** 9 }}",
    "indent": "{{ ('a\n' * 100000 * messages|length) | indent(100000) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format width of str.format": "{{ '{:1000000000}'.format(1) }}",
    "power": "{{ (9 ** (9 ** (8 + messages|length))) % 7 }}",
    "squaring": "{% set n = namespace(a=10) %}"
    "{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "long output": "{% for a in range(90000) %}{{ 'x' * 99 }}{% endfor %}",
    "wide output": "{{ '\U0001f469' * 1500000 }}",
    "huge range": "{{ range(10 ** 9) | list }}",
    "deep expression": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_error_soon_and_the_next_rendering_works(name: str) -> None:
    template = make_template(
        "{% if messages[0].content == 'go' %}" + BOMBS[name] + "{% endif %}fine", QUICK
    )
    begin = time.monotonic()
    with pytest.raises(TemplateError, match="chat template"):
        template.render(user("go"))
    assert time.monotonic() - begin < QUICK.seconds + SECONDS_TO_STOP
    if not name.startswith("deep"):  # Those cannot be compiled, whatever is asked of them.
        assert template.render(user("stay")) == "fine"
    template.close()


def test_each_limit_is_named() -> None:
    cases = {
        BOMBS["nested loops"]: r"within 1 seconds",
        BOMBS["long output"]: r"at most 4 MiB of text",
        BOMBS["doubling"]: r"at most 256 MiB of memory",
    }
    for source, words in cases.items():
        template = make_template(source, QUICK)
        with pytest.raises(TemplateError, match=words):
            template.render(user("a"))
        template.close()


def test_memory_is_watched_where_the_system_does_not_limit_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow_growth = (
        "{% set n = namespace(s='x' * 1000000) %}{% for i in range(99999) %}"
        "{% set n.s = n.s ~ 'xxxxxxxxxx' * 100000 %}{% endfor %}"
    )
    limits = Limits(seconds=20.0, max_memory=64 << 20)
    template = make_template(slow_growth, limits)
    # The worker of a system without resource limits: its own limit is raised out of reach.
    setup = template._sandbox._setup
    monkeypatch.setattr(template._sandbox, "_setup", lambda: {**setup(), "max_memory": 1 << 40})
    with pytest.raises(TemplateError, match="at most 64 MiB of memory"):
        template.render(user("a"))
    template.close()


def test_a_source_without_end_is_an_error() -> None:
    with pytest.raises(TemplateError, match="characters"):
        make_template("x" * (2 << 20))
    broken = make_template("{% if %}")
    with pytest.raises(TemplateError):
        broken.render(user("a"))
    broken.close()


def test_messages_that_no_json_holds_are_errors(echo: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match="JSON"):
        echo.render([{"role": "user", "content": object()}])


def test_a_process_that_died_is_replaced(echo: ChatTemplate) -> None:
    echo.render(user("a"))
    process = echo._sandbox._process
    assert process is not None
    process.kill()
    process.wait()
    assert echo.render(user("b")) == "b"


def test_an_interrupted_rendering_does_not_answer_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = make_template("{{ messages[0].content }}")
    template.render(user("a"))
    process = template._sandbox._process
    assert process is not None

    def interrupted(request: bytes | None, seconds: float) -> dict[str, Any]:
        """The request is on its way; nobody waits for the reply."""
        assert request is not None
        template_sandbox._send(process.stdin, request)
        raise KeyboardInterrupt

    monkeypatch.setattr(template._sandbox, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render(user("b"))
    monkeypatch.undo()
    assert template.render(user("c")) == "c"
    template.close()


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX's")
def test_ctrl_c_at_the_terminal_does_not_reach_the_process(echo: ChatTemplate) -> None:
    echo.render(user("a"))
    process = echo._sandbox._process
    assert process is not None
    assert os.getpgid(process.pid) != os.getpgid(0)
    os.kill(process.pid, signal.SIGTERM)


def test_the_process_ends_with_its_template() -> None:
    template = make_template("x")
    template.start()
    template.render(user("a"))
    process = template._sandbox._process
    assert process is not None
    del template
    process.wait(timeout=10)
