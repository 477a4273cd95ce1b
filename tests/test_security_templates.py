"""Chat templates that reach for Python, run for ever or write without end: rendered in a sandbox, and stopped."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_helpers
import gguf_files
import helpers
import pytest
from generation_helpers import CHATML, make_tokenizer, turn

import capotune
from capotune.adapters.store import RECORD, save_adapter
from capotune.api import inspect
from capotune.errors import CapotuneError
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.tasks.generation import sandbox
from capotune.tasks.generation.chat_template import ChatTemplate, RefusedError

HELLO = [turn("user", "hello")]
MARKER = "PWNED"

ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "item": "{{ ''['__class__'] }}{{ ''['__class__']['__mro__'] }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "joiner": "{{ joiner().__init__.__globals__['os'].system('touch PWNED') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
    "raise_exception": "{{ raise_exception.__globals__['sys'].modules['os'].system('touch PWNED') }}",
    "strftime_now": "{{ strftime_now.__globals__['sys'] }}",
    "dict": "{{ dict.__globals__['sys'] }}",
    "namespace": "{{ namespace.__init__.__globals__['sys'] }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._environment.globals }}{{ m.__class__.__mro__ }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.call.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format of a macro": "{% macro m() %}{% endmacro %}{{ '{0._environment.call.__func__.__globals__}'.format(m) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 'b'}) }}",
    "stored format": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
    "mapped attribute": "{{ ['']|map(attribute='__class__')|map(attribute='__mro__')|list }}",
    "loop": "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "namespace's names": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__.__mro__ }}",
    "change of a message": "{{ messages.append(1) }}{{ messages[0].update({'role': MARK}) }}",
}
"""Each reaches for what Python has and a template should not."""

WORK = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop of much": "{% for i in range(99999) %}" + "{{ i }}" * 3000 + "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "calls": "{% macro f(n) %}{{ caller() }}{% endmacro %}{% for i in range(99999) %}{% call f(i) %}"
    + "{{ i }}" * 900
    + "{% endcall %}{% endfor %}",
    "recursive loop": "{% for x in [[1, 1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "filters": "{% for i in range(9999) %}{{ range(99999)|map('string')|map('upper')|list|length }}{% endfor %}",
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "power": "{{ 9**(9**9) }}",
    "product": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "long searches": "{% set s = 'ab' * 4000000 %}{% for i in range(99999) %}{{ s|wordcount }}{% endfor %}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "arguments in arguments": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = cycler(n.x, n.x).items %}{% endfor %}{{ n.x }}",
    "names in names": "{% macro f(n) %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1, 2, 3) }}",
    "views": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set d = {'a': n.x} %}{% set n.x = [d.values(), d.values()] %}{% endfor %}",
}
"""Each would take hours, or for ever."""

OUTPUT = {
    "product": "{{ 'x' * 10**10 }}",
    "list": "{{ [1] * 10**10 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joining": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% endfor %}",
    "padding": "{{ 'x'.ljust(10**10) }}",
    "centre": "{{ 'x'|center(10**10) }}",
    "indent": "{{ ('x\n' * 10**6)|indent(10**6) }}",
    "replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "replaced by a filter": "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "join": "{{ ('x' * 10**6).join(range(99999)|map('string')|list) }}",
    "tabs": "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "translate": "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "star": "{{ '%*d' % (10**10, 1) }}",
    "percent as a filter": "{{ '%9999999999d'|format(1) }}",
    "width": "{{ '{:>9999999999}'.format('x') }}",
    "width in a width": "{{ '{:>{}}'.format('x', '9999999999') }}",
    "format": "{{ ('{0}' * 10**6).format('y' * 10**6) }}",
    "json": "{{ [[[[[1] * 99]]]]|tojson(indent=10**8) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "nonsense": "{{ lipsum(10**8) }}",
    "batch": "{{ [1]|batch(10**10, 1)|list }}",
    "slices": "{% set s = 'x' * 10**7 %}" + "{{ s[1:]|length }}" * 400,
    "written again and again": "{% set s = 'x' * 10**6 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
    "folded": "{{ 'x'|center(10**10)|length }}{{ ('x' ~ 'y')|center(10**10) }}",
}
"""Each would write gigabytes."""

ODD = {
    "loops in twenty-five others": "{% for i in range(2) %}" * 25 + "{% endfor %}" * 25,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "endless recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a long template": "x" * (sandbox.LONGEST_TEMPLATE + 1),
    "another file": "{% include '/etc/passwd' %}",
    "another module": "{% import 'os' as os %}{{ os.system('touch PWNED') }}",
}


def rendered(template: str) -> str:
    return ChatTemplate(make_tokenizer(), template).render(HELLO)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sandbox, "STEPS", 60_000)  # the real limit is found as surely, and later


@pytest.mark.parametrize("name", ESCAPES)
def test_template_that_reaches_for_python_gets_nothing(name: str) -> None:
    try:
        text = rendered(ESCAPES[name])
    except RefusedError as error:
        text = str(error)
        assert "unsafe" in text or "underscore" in text or "undefined" in text or "has no" in text, text
    assert not any(word in text for word in ("<class", "<module", "<built-in", "0x")), text
    assert not list(Path.cwd().iterdir()), "it ran a command"


@pytest.mark.parametrize("name", WORK)
def test_template_without_end_is_stopped(name: str) -> None:
    with pytest.raises(RefusedError, match=r"too many steps|thousands of digits|Range too big|recursion"):
        rendered(WORK[name])


@pytest.mark.parametrize("name", OUTPUT)
def test_template_that_writes_gigabytes_is_stopped_before_the_memory_is_taken(name: str) -> None:
    with pytest.raises(RefusedError, match=r"writes? |too many steps"):
        rendered(OUTPUT[name])


@pytest.mark.parametrize("name", ODD)
def test_template_that_cannot_be_compiled_or_called_is_one_message(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        rendered(ODD[name])
    assert "Traceback" not in str(caught.value)
    assert not list(Path.cwd().iterdir())


def test_seconds_are_counted_where_steps_say_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0)
    with pytest.raises(RefusedError, match="more than 0 seconds"):
        rendered("{% for i in range(9000) %}{{ i|string }}{% endfor %}")


def test_limits_hold_in_every_thread_and_are_each_threads_own() -> None:
    """Two threads render one compiled template, each with its own steps."""
    found: list[str] = []
    started = threading.Barrier(2)

    def render(template: str) -> None:
        started.wait()
        try:
            found.append(rendered(template))
        except RefusedError as error:
            found.append(str(error))

    half = "{% for i in range(20000) %}{{ i|string }}{% endfor %}done"  # more than half of the steps
    threads = [threading.Thread(target=render, args=(half,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text[-4:] for text in found] == ["done", "done"]


def test_steps_grow_with_the_conversation() -> None:
    """A template may look at every other turn for each turn."""
    template = "{% for m in messages %}{% for n in messages %}{{ n.content[:1] }}{% endfor %}{% endfor %}"
    messages = [turn("user", "hello")] * 100
    assert sandbox.render(template, messages, None, {}, ask=False) == "h" * 10_000
    with pytest.raises(sandbox.TooMuchError):
        sandbox.render(
            template.replace("messages", "range(9999)").replace(".content[:1]", ""), HELLO, None, {}, ask=False
        )


def test_long_texts_are_rendered() -> None:
    content = "word " * 400_000
    assert ChatTemplate(make_tokenizer(), CHATML).render([turn("user", content)]).count("word ") == 400_000


def in_a_base(folder: Path, template: str, writer: Path) -> Callable[[], Any]:
    shutil.copytree(writer, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    data = folder.with_name("chats.jsonl")
    rows = [{"messages": [turn("user", f"hello {number}"), turn("assistant", "hi")]} for number in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return lambda: inspect(data=str(data), model=str(folder))


def in_an_adapter(folder: Path, template: str, writer: Path) -> Callable[[], Any]:
    settings = PromptTuningSettings(num_virtual_tokens=3, init="vocabulary", learning_rate=0.1)
    save_adapter(folder, generation_helpers.on_base(writer, settings), helpers.TRAINED)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record |= {"chat_template": template, "chat": True}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return lambda: capotune.load(folder).chat(HELLO)


def in_gguf(folder: Path, template: str, _writer: Path) -> Callable[[], Any]:
    folder.mkdir()
    more = {"tokenizer.chat_template": template}
    gguf_files.write(gguf_files.FAMILIES["Llama"], folder / "model.gguf", metadata=more)
    return lambda: capotune.load_model(folder / "model.gguf").chat(HELLO)


PLACES = {"base": in_a_base, "adapter": in_an_adapter, "GGUF": in_gguf}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("template", [WORK["nested loops"], OUTPUT["doubling"], ESCAPES["lipsum"]])
def test_template_of_a_stranger_ends_in_one_message(
    place: str, template: str, llama_writer: Path, tmp_path: Path
) -> None:
    use = PLACES[place](tmp_path / "strange", template, llama_writer)
    found = {}
    try:
        found = use()
    except CapotuneError as error:
        found = {"refused": str(error)}
    assert "the chat template refuses the" in found["refused"]
    assert "\n" not in found["refused"]
    assert not list(Path.cwd().iterdir())
