"""A chat template is code from a file that somebody downloaded: it can neither leave the sandbox nor exhaust it."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc

import pytest

from ocserve.chat.sandbox import TemplateUnusable
from ocserve.chat.specials import SpecialTokens
from ocserve.chat.template import ChatTemplate
from ocserve.errors import InvalidRequest
from ocserve.generation import Message

HELLO = (Message(role="user", content="hello"),)

# Published payloads against Jinja (CVE-2014-1402, CVE-2016-10745, CVE-2019-10906, CVE-2019-8341, CVE-2024-34359,
# CVE-2024-56201, CVE-2024-56326, CVE-2025-27516, and the usual lists for template injection), in the forms that
# reach for Python's classes, a module, a file or a function's globals.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.mro()[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "{{ [].__class__.__base__.__subclasses__()[40]('/etc/passwd').read() }}",
    "{{ {}.__class__.__bases__[0].__subclasses__() }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{{ true.__class__.__base__.__subclasses__() }}",
    "{{ none.__class__.__base__.__subclasses__() }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}{% endif %}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context.namespace.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__dict__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace().__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ range.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__closure__[0].cell_contents.__globals__ }}",
    "{{ request.application.__globals__.__builtins__.__import__('os').popen('id').read() }}",
    "{{ config.__class__.__init__.__globals__['os'].popen('id').read() }}",
    "{{ url_for.__globals__['current_app'].config }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ g.pop.__globals__.__builtins__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ [''|attr('__class__')]|map(attribute='__mro__')|list }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ ['']|map(attribute='__class__.__mro__')|first }}",
    "{{ ['']|selectattr('__class__')|list|length and [''|attr('__class__')] }}",
    "{{ ['']|groupby('__class__')|list }}",
    "{{ ['']|join(attribute='__class__') }}",
    "{{ [{}]|sort(attribute='__class__')|map(attribute='__class__')|list }}",
    "{{ ['']|unique(attribute='__class__')|map(attribute='__class__')|list }}",
    "{{ ['']|max(attribute='__class__')|attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__.__base__}'.format(a='') }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ '{.__class__.__init__.__globals__}'.format(namespace()) }}",
    "{{ '{a.__class__.__base__}'.format_map({'a': ''}) }}",
    "{{ '{a.__class__}'|format(a='') }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{{ ''.format.__self__.__class__ }}",
    "{% set f = '{0.__class__.__base__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ ({'x': '{0.__class__}'.format}).x('') }}",
    "{{ '%(a)s' % {'a': ''.__class__} }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages[0].__class__ }}",
    "{{ messages.append.__self__.__class__ }}",
    "{{ messages[0].items.__self__.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__class__ }}{{ caller._func.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{{ varargs.__class__ }}{{ kwargs.__class__ }}{% endmacro %}{{ m(1, a=2) }}",
    "{% for x in [1] recursive %}{{ loop.__class__ }}{{ loop._recurse.__globals__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._iterator.__class__ }}{{ loop._to_iterator }}{% endfor %}",
    "{% set x = [1]|map('string') %}{{ x.gi_frame.f_globals }}{{ x.gi_code }}",
    "{{ (messages|selectattr('role')).gi_frame.f_back.f_globals['__builtins__'] }}",
    "{{ undefined_name.__class__.__base__.__subclasses__() }}",
    "{{ undefined_name._undefined_exception.__subclasses__() }}",
    "{{ undefined_name._fail_with_undefined_error.__globals__ }}",
    "{% set a = '_' %}{% set c = a ~ a ~ 'class' ~ a ~ a %}{{ ''[c] }}{{ ''[c].__mro__ }}",
    "{% set c = ['__cla', 'ss__']|join %}{{ ()[c] }}{{ ()[c]['__base__'] }}",
    "{{ ''['__cla' + 'ss__'] }}{{ ''['\\u005f\\u005fclass\\u005f\\u005f'] }}",
    "{% import 'os' as os %}{{ os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% from 'os' import popen %}{{ popen('id').read() }}",
    "{% extends '/etc/passwd' %}",
    "{% autoescape true %}{{ ('<b>'|e).__class__ }}{% endautoescape %}",
    "{% set ns = namespace(x='') %}{% set ns.__class__ = 1 %}{{ ns.x.__class__ }}",
    "{% block b %}{{ self.b.__globals__ }}{{ self.b._context.environment }}{% endblock %}",
    "{{ context }}{{ environment }}{{ context.environment }}{{ context.eval_ctx }}",
    "{{ messages.__init__.__objclass__ }}{{ [].append.__objclass__ }}{{ [].append.__qualname__ }}",
    "{{ ''.encode().__class__ }}{{ ''.maketrans({}).__class__ }}{{ (1).to_bytes(2, 'big') }}",
    "{{ messages|_tick.__globals__ }}{{ ''|_operand|attr('__class__') }}",
    "{{ dict(a=1).fromkeys.__self__.mro() }}",
]


def rendered(source: str) -> str | None:
    """What comes out; None where the template is refused in either of the two ways that there are."""
    try:
        template = ChatTemplate(source, bos="", eos="", specials=SpecialTokens([]))
        return "".join(segment.text for segment in template.render(HELLO))
    except (TemplateUnusable, InvalidRequest):
        return None


@pytest.mark.parametrize("payload", ESCAPES)
def test_published_escapes_find_nothing(payload: str) -> None:
    text = rendered(payload) or ""
    for sign in ("<", "object", "subclasses", "root:", "uid=", "builtin", "0x", "os.", "environ"):
        assert sign not in text


def test_there_are_at_least_sixty_escapes() -> None:
    assert len(set(ESCAPES)) >= 60


def test_templates_cannot_change_what_the_caller_owns() -> None:
    source = "{% set _ = messages.append('x') %}{% set _ = messages.pop() %}{% set _ = messages.pop() %}done"
    template = ChatTemplate(source, bos="", eos="", specials=SpecialTokens([]))
    assert template.render(HELLO) == template.render(HELLO)


DOUBLING = "{% set ns = namespace(v=START) %}{% for i in range(60) %}{% set ns.v = STEP %}{% endfor %}{{ ns.v|length }}"
NESTED = DOUBLING.replace("START", "[1]").replace("STEP", "[ns.v, ns.v]").replace("{{ ns.v|length }}", "USE")


def doubling(start: str, step: str) -> str:
    return DOUBLING.replace("START", start).replace("STEP", step)


BOMBS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{% if b %}{% continue %}{% endif %}{% endfor %}"
    "{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|list|length }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|sum }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|map('string')|join }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|select('odd')|list|length }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|sort|length }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|unique|list|length }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000)|max }}{% endfor %}",
    "{% for a in range(100000) %}{% if 100001 in range(100000)|list %}{% endif %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{{ loop.length }}{% endfor %}{% endfor %}",
    "{{ range(10**9)|list }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ ['a'] * 10**9 }}",
    "{{ ('a',) * 10**9 }}",
    "{{ 'a' * 30000000 }}{{ 'a' * 30000000 }}",
    "{% set a = 'a' * 30000000 %}{{ a }}{{ a }}{{ a }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 100000000 }}",
    doubling("2", "ns.v * ns.v"),
    doubling("'ab'", "ns.v + ns.v"),
    doubling("'ab'", "ns.v ~ ns.v"),
    doubling("'ab'", "ns.v * 2"),
    doubling("'ab'", "ns.v.replace('a', 'aa').replace('b', 'bb')"),
    doubling("'ab'", "ns.v|replace('', 'ab')"),
    doubling("'ab'", "[ns.v, ns.v]|join"),
    doubling("'ab'", "''.join([ns.v, ns.v])"),
    doubling("'ab'", "ns.v.join([ns.v, ns.v])"),
    doubling("'ab'", "'{0}{0}'.format(ns.v)"),
    doubling("'ab'", "'%s%s' % (ns.v, ns.v)"),
    doubling("'ab'", "'%s%s'|format(ns.v, ns.v)"),
    doubling("'<<'", "ns.v|e"),
    "{% set s = '\U000e0001😀' * 4000000 %}{{ [s] }}{{ '{!r}'.format(s) }}{{ '%r' % s }}",
    doubling("'\\\"'", "ns.v|tojson"),
    doubling("'ab'", "[ns.v, ns.v]|string"),
    doubling("'ab'", "[ns.v, ns.v]|tojson"),
    doubling("[1]", "ns.v + ns.v"),
    doubling("[1]", "ns.v * 2"),
    doubling("(1,)", "ns.v + ns.v"),
    "{% set ns = namespace(v='ab') %}{% for i in range(60) %}{% set x %}{{ ns.v }}{{ ns.v }}{% endset %}"
    "{% set ns.v = x %}{% endfor %}",
    "{% macro m(s, n) %}{% if n %}{{ m(s ~ s, n - 1) }}{% else %}{{ s }}{% endif %}{% endmacro %}{{ m('ab', 60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% macro m(n) %}{{ caller(n) }}{{ caller(n) }}{% endmacro %}{% call(n) m(1) %}{% call(k) m(n) %}"
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endcall %}{% endcall %}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for x in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 40 }}{% endfor %}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{{ 'a'.ljust(10**9) }}{{ 'a'.center(10**9) }}{{ 'a'.zfill(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ ('a\n' * 1000)|indent(10**8) }}",
    "{{ ('a\n' * 1000)|indent('x' * 10**6) }}",
    "{{ [[1]]|tojson(indent=10**9) }}",
    "{{ ([1] * 100000)|tojson(separators=('x' * 10**5, ':')) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '%1000000000d' is divisibleby(1) }}{{ '%1000000000d' is odd }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=1000000000) }}",
    "{{ '{:.1000000000f}'.format(1.5) }}",
    "{{ ('{0}' * 100000).format('a' * 10000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 10000} }}",
    "{{ ('%%' * 15000000) % () }}{{ ('%s' * 15000000)|format(1) }}",
    "{{ ('{0}' * 10000000).format(1) }}{{ ('{0:' + '1 ' * 10000000 + '}').format(1) }}",
    "{{ ('a' * 20000000).split('a')|length }}{{ ('a ' * 10000000).split()|length }}",
    "{{ ('\n' * 20000000).splitlines()|length }}",
    "{{ ('a' * 20000000)|list|length }}",
    "{{ 1|round(10**9) }}{{ 1|round(-10**9) }}{{ 5|round(10**9, 'ceil') }}",
    "{{ ('f' * 10000000)|int(base=16) }}{{ ('9' * 1000000)|int }}",
    "{{ strftime_now('%1000000000d') }}{{ strftime_now('%_999999999d') }}",
    "{{ (1).to_bytes(10**9, 'big') }}{{ lipsum(n=10**6) }}",
    NESTED.replace("USE", "{{ ns.v }}"),
    NESTED.replace("USE", "{{ ns.v|string }}"),
    NESTED.replace("USE", "{{ ns.v|tojson }}"),
    NESTED.replace("USE", "{{ ns.v|join }}"),
    NESTED.replace("USE", "{{ '%s' % ns.v }}{{ '{}'.format(ns.v) }}{{ '{!r}'.format(ns.v) }}"),
    NESTED.replace("USE", "{{ ns.v ~ '' }}"),
    NESTED.replace("[ns.v, ns.v]", "{'a': ns.v, 'b': ns.v}").replace("USE", "{{ ns.v|tojson }}"),
    NESTED.replace("USE", "{% set a = ns.v %}") + NESTED.replace("USE", "{{ a == ns.v }}").replace("[1]", "[2]"),
    NESTED.replace("USE", "{{ ns.v in [ns.v + []] }}"),
    NESTED.replace("USE", "{{ ns.v is eq(ns.v + []) }}{{ [ns.v]|select('eq', ns.v + [])|list }}"),
    NESTED.replace("USE", "{{ [ns.v, ns.v + []]|sort|length }}{{ [ns.v, ns.v + []]|max }}"),
    NESTED.replace("USE", "{{ [ns.v].index(ns.v + []) }}{{ [ns.v].count(ns.v + []) }}"),
    NESTED.replace("USE", "{% for x in [1, 2] %}{{ loop.changed(ns.v + []) }}{% endfor %}"),
    NESTED.replace("[ns.v, ns.v]", "(ns.v, ns.v)").replace("[1]", "(1, 1)").replace("USE", "{{ {ns.v: 1} }}"),
    NESTED.replace("[ns.v, ns.v]", "(ns.v, ns.v)").replace("[1]", "(1, 1)").replace("USE", "{{ {}[ns.v] }}"),
    NESTED.replace("[ns.v, ns.v]", "(ns.v, ns.v)").replace("[1]", "(1, 1)").replace("USE", "{{ {}.get(ns.v) }}"),
    NESTED.replace("[ns.v, ns.v]", "(ns.v, ns.v)").replace("[1]", "(1, 1)").replace("USE", "{{ [ns.v]|unique|list }}"),
    NESTED.replace("[ns.v, ns.v]", "namespace(a=ns.v, b=ns.v)").replace("USE", "{{ ns.v }}"),
    "{% set l = [] %}{% for a in range(100000) %}{% for b in range(100000) %}{% set _ = l.append('a' * 1000) %}"
    "{% endfor %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for a in range(100000) %}{% for b in range(100000) %}"
    "{% set ns.l = ns.l + [b] %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 20000000 %}{% for a in range(100000) %}{% for b in range(100000) %}{% if s[1:] == s[:1] %}"
    "{% endif %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 20000000 %}{% for a in range(100000) %}{{ s.count('b') }}{{ s.find('aab') }}{% endfor %}",
    "{% set s = 'a' * 20000000 %}{% for a in range(100000) %}{{ s.upper() == s|lower }}{{ s is upper }}{% endfor %}",
    "{% set s = 'ﬃ' * 9000000 %}{{ s.upper() }}",
    "{% set s = '\\x00' * 20000000 %}{{ s|tojson }}",
    "{{ '{{' * 100000 }}" + "{{ (" * 3000 + "1" + ") }}" * 3000,
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ 1" + " + 1" * 30000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for x in [1] %}" * 200 + "{% endfor %}" * 200,
    "x" * 200_000,
]


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_resource_bombs_end_within_half_a_second_and_64_mb(number: int) -> None:
    gc.collect()
    try:
        template = ChatTemplate(BOMBS[number], bos="", eos="", specials=SpecialTokens([]))
    except TemplateUnusable:
        return
    tracemalloc.start()
    started = time.thread_time()
    try:
        template.render(HELLO)
    except InvalidRequest:
        pass
    finally:
        took = time.thread_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert took < 0.5
    assert peak < 64 * 1024 * 1024


def test_a_deep_stack_of_ours_does_not_turn_a_bomb_into_a_crash() -> None:
    outcome: list[str | None] = []

    def below(depth: int) -> None:
        if depth:
            below(depth - 1)
        else:
            outcome.append(rendered("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"))

    thread = threading.Thread(target=below, args=(sys.getrecursionlimit() // 2,))
    thread.start()
    thread.join()
    assert outcome == [None]


def test_an_honest_long_conversation_is_no_bomb(real_templates: dict[str, str]) -> None:
    turns = tuple(
        Message(role="assistant" if index % 2 else "user", content=f"turn {index}: " + "word " * 100)
        for index in range(2001)
    )
    template = ChatTemplate(real_templates["Qwen-Qwen3-0.6B"], bos="", eos="", specials=SpecialTokens([]))
    text = "".join(segment.text for segment in template.render(turns))
    assert all(f"turn {index}:" in text for index in range(2001))


@pytest.mark.alone  # its time is limited
def test_an_honest_message_of_four_megabytes_is_no_bomb(real_templates: dict[str, str]) -> None:
    content = "naïve café 😀\n" * (4 * 1024 * 1024 // 18)
    template = ChatTemplate(real_templates["Qwen-Qwen3-0.6B"], bos="", eos="", specials=SpecialTokens([]))
    text = "".join(segment.text for segment in template.render((Message(role="user", content=content),)))
    assert content.strip() in text
