"""Chat templates, rendered as Transformers renders them, with limits on work and on output.

A chat template is a program of whoever made the model. Jinja's sandbox keeps it away from Python; nothing there keeps
it from running for ever or from writing until memory is full. Here a rendering has so many steps. Loops, calls, filters
and macros take them by what they do, and every value that is made takes them by its size, before the memory for it is
taken where that can be known. So a rendering ends, in the same place on every machine, in whatever thread it is.
"""

# ruff: noqa: N802, N815 - a visitor's methods are named as Jinja names its nodes

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, update_wrapper
from itertools import chain
from threading import local
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

STEPS, STEPS_PER_MESSAGE = 250_000, 10_000
"""Stock templates take some hundred for a message or a tool; so many take about a second."""
CHARACTERS_PER_STEP = 1024
LONGEST = 2**24
"""Characters of one text that a template makes, and of the whole that it writes."""
LONGEST_TEMPLATE = 2**20
SECONDS = 10
"""Of the thread's own processor time: for what takes long in few steps, such as searching long texts."""

_MOST_BITS = 2**15
_NODES_PER_STEP = 16
_CLOCK_STEPS = 4096
_GROWS = {
    "replace", "join", "ljust", "rjust", "center", "zfill", "expandtabs", "translate", "format", "format_map",
    "to_bytes", "hex", "indent", "wordwrap", "tojson", "urlize", "xmlattr", "batch", "slice", "fromkeys", "items",
}  # fmt: skip
"""What makes of a text and its arguments more than they are: at most their product."""
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_WITH_SIZE = (str, bytes, int, list, tuple, dict, set, frozenset, *_VIEWS)
_WIDE = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{6,}|\d*\.(\*|\d{6,}))")


class TooMuchError(TemplateError):
    """A rendering has used its steps."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    *,
    ask: bool,
) -> str:
    """The messages as ``template`` writes them; with ``ask`` up to where the assistant begins to write.

    Raises what templates raise (``TemplateError``, and whatever a value's method does), ``TooMuchError`` when it takes
    more than its steps, seconds or characters.
    """
    compiled = _compiled(template)
    environment: Any = compiled.environment
    shown = [{name: value for name, value in message.items() if value is not None} for message in messages]
    with_names: dict[str, Any] = {
        **special_tokens, "messages": shown, "tools": tools, "documents": None, "add_generation_prompt": ask,
    }  # fmt: skip
    environment.budget.fill(STEPS + STEPS_PER_MESSAGE * (len(messages) + len(tools or ())))
    return str(compiled.render(with_names))


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    if len(template) > LONGEST_TEMPLATE:
        raise TooMuchError(f"it has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are read.")
    environment = _Environment()
    environment.budget.fill(STEPS)
    try:
        return environment.from_string(template)
    except SyntaxError as error:  # of the Python that Jinja writes: loops in more than twenty others
        raise TemplateError(f"it cannot be compiled ({error.msg}).") from None


class _Budget(local):
    """Steps and seconds that are left to the rendering in this thread."""

    left = 0
    clock = 0
    deadline = 0.0

    def fill(self, steps: int) -> None:
        self.left, self.clock = steps, steps - _CLOCK_STEPS
        self.deadline = time.thread_time() + SECONDS

    def spend(self, steps: int) -> None:
        left = self.left = self.left - steps
        if left < self.clock:
            if left < 0:
                raise TooMuchError("it takes too many steps or writes too much, and was stopped.")
            self.clock = left - _CLOCK_STEPS
            if time.thread_time() > self.deadline:
                raise TooMuchError(f"it takes more than {SECONDS} seconds, and was stopped.")


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, in which everything takes steps."""

    intercepted_binops = frozenset(("+", "*", "%", "//", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self.weigh
        )
        self.budget = _Budget()
        self.weights: dict[str, int] = {}
        """Steps of a call of each macro, by its name."""
        self.heaviest = 1
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "namespace": _Namespace,
            "dict": _dict,
            "cycler": Cycler,
            "joiner": Joiner,
            "lipsum": _lorem_ipsum,
        }
        self.filters |= {"tojson": _to_json, "format": self._format}
        self.filters = {name: self._counted(name, function) for name, function in self.filters.items()}

    # ------------------------------------------------------------------------------------------- what is compiled

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> Any:
        return super()._generate(_Counting(self).visit(source), *arguments, **options)

    def looped(self, items: Any, weight: int) -> Any:
        """What a loop goes over, whose body takes ``weight`` steps."""
        if isinstance(items, GeneratorType):
            return self._each(items, weight)
        if hasattr(items, "__len__"):
            self.budget.spend(1 + len(items) * weight)
        return items

    def joined(self, *parts: Any) -> str:
        """``a ~ b``."""
        return self.concat([str(self.weigh(part)) for part in parts])

    def sliced(self, value: Any) -> Any:
        """A part of a text or a list, which is a copy."""
        if isinstance(value, (str, bytes, list, tuple)):
            self.budget.spend(len(value) // CHARACTERS_PER_STEP)
        return value

    # -------------------------------------------------------------------------------------------- what runs then

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces of an output as one text."""
        texts = pieces if isinstance(pieces, list) else list(pieces)
        self._check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Every call in a template."""
        receiver = getattr(function, "__self__", None)
        if receiver is self:  # one of those above
            return function(*arguments)
        steps = 1
        if isinstance(function, Macro):
            steps = self.weights.get(function.name, self.heaviest)
        elif isinstance(function, LoopContext):
            steps = self.heaviest
        self.budget.spend(steps)
        for name in ("_loop_vars", "_block_vars"):  # what Jinja adds for functions that ask for the context
            named.pop(name, None)
        self._check_given(getattr(function, "__name__", ""), receiver, arguments, named)
        return self._made(super().call(context, function, *arguments, **named))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``: of a dict, what it holds by that name, unless that names a method."""
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``."""
        if operator == "+" and type(left) is str and type(right) is str:
            length = len(left) + len(right)
            if length > CHARACTERS_PER_STEP:
                self._check_length(length)
            return left + right
        self.budget.spend(1)
        if operator == "%" and isinstance(left, (str, bytes)):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (min(abs(right), _MOST_BITS) if operator == "**" else 1) + right.bit_length()
            if bits > _MOST_BITS:
                raise TooMuchError("it computes with numbers of thousands of digits, and was stopped.")
        elif operator == "*":
            self._check_product((left,), (right,))
        return self._made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` without Python's attributes and with checks."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, takes_mapping = str(value.__self__), value.__name__ == "format_map"

        def form(*arguments: Any, **named: Any) -> str:
            values = (arguments[0].values() if takes_mapping else (*arguments, *named.values())) if arguments else ()
            self._check_product((text,), values or named.values())
            given = ((), arguments[0]) if takes_mapping else (arguments, named)
            return _Formatter(self).vformat(text, *given)

        return update_wrapper(form, value)

    # ------------------------------------------------------------------------------------------- what values cost

    def weigh(self, value: Any) -> Any:
        """The same value, once the steps for all that is in it are taken: a list that is in another twice is twice."""
        kind = type(value)
        if kind is str:
            if len(value) > CHARACTERS_PER_STEP:
                self._check_length(len(value))
        elif issubclass(kind, _WITH_SIZE) and kind is not bool:
            self._weigh_inside(value)
        return value

    def _weigh_inside(self, value: Any) -> None:
        steps, waiting = 0, [value]
        while waiting:
            one = waiting.pop()
            kind = type(one)
            if issubclass(kind, (str, bytes)):
                steps += len(one) // CHARACTERS_PER_STEP
            elif issubclass(kind, int):
                steps += one.bit_length() // (8 * CHARACTERS_PER_STEP)
            elif issubclass(kind, _WITH_SIZE):
                steps += 1 + len(one)
                if steps <= self.budget.left:
                    waiting.extend(chain(one, one.values()) if kind is dict else one)
            if steps > self.budget.left:
                break
        self.budget.spend(steps)

    def _check_length(self, length: int) -> None:
        if length > CHARACTERS_PER_STEP:
            if length > LONGEST:
                raise TooMuchError(f"it writes {length:,} characters at once; at most {LONGEST:,} are.")
            self.budget.spend(length // CHARACTERS_PER_STEP)

    def _check_given(self, name: str, receiver: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """What a function called ``name`` reads."""
        given = (*arguments, *named.values()) if named else arguments
        for value in given:
            self.weigh(value)
        if isinstance(receiver, (str, bytes)) and len(receiver) > CHARACTERS_PER_STEP:
            self._check_length(len(receiver))
        if name in _GROWS:
            self._check_product((receiver,), given)

    def _check_product(self, left: Iterable[Any], right: Iterable[Any]) -> None:
        """``TooMuchError`` where a text or list as large as the two sides' product would be too long."""
        self._check_size((1 + sum(map(_size, left))) * (1 + sum(map(_size, right))))

    def _check_size(self, size: int) -> None:
        if size > 16 * LONGEST:
            raise TooMuchError(f"it may write {size:,} characters at once; at most {LONGEST:,} are.")

    def _check_format(self, text: Any, given: Iterable[Any]) -> None:
        if _WIDE.search(str(text)):
            raise TooMuchError("it writes with a width of a million characters or an unknown one.")
        self._check_product((text,), given)

    def _made(self, value: Any) -> Any:
        return self._each(value, 1) if type(value) is GeneratorType else self.weigh(value)

    def _each(self, items: Iterator[Any], weight: int) -> Iterator[Any]:
        for item in items:
            self.budget.spend(weight)
            yield self.weigh(item) if type(item) is list else item

    # ------------------------------------------------------------------------------------------------ its filters

    def _format(self, text: Any, *arguments: Any, **named: Any) -> str:
        self._check_format(text, (*arguments, *named.values()))
        return do_format(text, *arguments, **named)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment

        def counted(*arguments: Any, **named: Any) -> Any:
            self.budget.spend(1)
            receiver = arguments[skipped] if len(arguments) > skipped else None
            self._check_given(name, receiver, arguments[skipped + 1 :], named)
            return self._made(function(*arguments, **named))

        return update_wrapper(counted, function)


class _Counting(NodeTransformer):
    """Puts the environment's ``looped``, ``joined``, ``sliced`` and ``weigh`` where a template does without calls."""

    def __init__(self, environment: _Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        weight = _weight(node)
        self.environment.heaviest = max(self.environment.heaviest, weight)
        self.generic_visit(node)
        items: Any = node.iter
        node.iter = self._call("looped", items, nodes.Const(weight))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        weights = self.environment.weights
        weights[node.name] = max(weights.get(node.name, 1), _weight(node))
        return self.generic_visit(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        weights = self.environment.weights
        weights["caller"] = max(weights.get("caller", 1), _weight(node))
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("sliced", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        is_stored = getattr(node, "ctx", "load") != "load"
        return node if is_stored or not any(node.find_all(nodes.Name)) else self._call("weigh", node)

    visit_Tuple = visit_Dict = visit_List

    def _call(self, name: str, *arguments: nodes.Expr) -> nodes.Call:
        hook = nodes.EnvironmentAttribute(name)
        call = nodes.Call(hook, [*arguments], [], None, None, lineno=arguments[0].lineno or 1)
        return call.set_environment(self.environment)  # type: ignore[return-value]


def _weight(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_PER_STEP


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant writes, for masks that are made otherwise here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    def written(self, caller: Callable[[], str]) -> str:
        """The block's text."""
        return caller()


class _Namespace(Namespace):
    """Jinja's, without names that Python uses; printed, it is no more than its name."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, rest = arguments[0], arguments[1:]
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{6,}", format_spec):
            raise TooMuchError("it writes with a width of a million characters.")
        return super().format_field(value, format_spec)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}.")


def _size(value: Any) -> int:
    """Characters that a value may become, or columns where it is a number; what is in lists counts by its depth."""
    total, waiting = 0, [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, _WITH_SIZE) and not isinstance(one, int):
            inside = chain(one, one.values()) if isinstance(one, dict) else one
            waiting.extend((each, depth + 1) for each in inside)
        else:
            total += max(one, 1) if depth == 1 and type(one) is int else 1
        total += depth
    return total


def _dict(*arguments: Any, **named: Any) -> dict[Any, Any]:
    return dict(*arguments, **named)


def _lorem_ipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    if n * max > LONGEST // 16:
        raise TooMuchError("it writes too much of nothing.")
    return str(generate_lorem_ipsum(n, html, min, max))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
