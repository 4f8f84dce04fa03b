"""Renders a chat template, which is a program from elsewhere, as transformers does, but within a budget.

jinja2's sandbox keeps a template away from Python's internals, not from loops and from growing values: `'a' * 10**9`,
or a string doubled 60 times.  So every step that makes a value or goes round a loop is counted, before it is done where
it can multiply, and what pads, formats or picks at random is left out.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from datetime import datetime

import jinja2
from jinja2 import ext, filters, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

TEMPLATE_LIMIT = 1 << 20  # characters of a chat template
WORK_LIMIT = 200_000  # characters and items made, loop rounds and calls of one rendering, ...
WORK_PER_CHARACTER = 200  # ... and as many more for each character of the messages
TIME_LIMIT = 5.0  # seconds of one rendering
MAX_BITS = 4096  # of a whole number
MAX_INDENT = 16  # of tojson

FILTERS = frozenset((  # of jinja2's own
    'abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min '
    'reject rejectattr reverse round safe select selectattr sort string title trim unique upper').split())
STRING_METHODS = frozenset((
    'capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace '
    'istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit '
    'rstrip split splitlines startswith strip swapcase title upper').split())


class ChatTemplateError(ValueError):
    """A chat template that is broken, refuses the messages, or does far too much."""


class ChatTemplate:
    """A compiled chat template.  Raises ChatTemplateError when it is broken or too long."""

    def __init__(self, source: str):
        if len(source) > TEMPLATE_LIMIT:
            raise ChatTemplateError(f'the chat template has {len(source)} characters; at most {TEMPLATE_LIMIT} fit')
        self._budget, self._lock = Budget(), threading.Lock()
        try:
            self._template = Sandbox(self._budget).from_string(source)
        except Exception as error:
            raise ChatTemplateError(f'the chat template is broken: {error}') from error

    def render(self, variables: Mapping, now: datetime | None = None) -> str:
        """The text of a chat.  now: what the template takes for the present.

        Raises ChatTemplateError when the template fails, refuses the chat or goes too far.
        """
        with self._lock:  # one budget, one rendering
            self._budget.now = now
            self._budget.start(size(variables, 1 << 40))
            try:
                return self._template.render(variables)
            except ChatTemplateError:
                raise
            except Exception as error:
                raise ChatTemplateError(f'the chat template failed: {error}') from error


class Budget:
    """What one rendering may still do, and its present.  It bounds the memory and, as each step is short, the time."""

    def __init__(self):
        self.now: datetime | None = None
        self.start(0)

    def start(self, characters: int) -> None:
        self.left = WORK_LIMIT + WORK_PER_CHARACTER * characters
        self.deadline = time.monotonic() + TIME_LIMIT

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0 or time.monotonic() > self.deadline:
            raise ChatTemplateError('the chat template does far more work than any conversation needs; it was stopped')

    def counted(self, value):
        """The value, if there is still room for its text."""
        self.spend(1 + size(value, self.left))
        return value


def size(value, limit: int) -> int:
    """Characters and items in a value, each counted wherever it occurs; counting stops above `limit`."""
    total, todo = 0, [value]
    while todo and total <= limit:
        value = todo.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += len(value)
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | type({}.keys()) | type({}.values()) | type({}.items())):
            total += len(value)
            todo += value
        else:
            total += 1
    return total


# ---- filters in which a small argument gives a large text

@jinja2.pass_context  # and so never evaluated while compiling
def counted(context, value):
    return context.environment.budget.counted(value)


@jinja2.pass_context
def concatenate(context, items):
    context.environment.budget.spend(size(items, context.environment.budget.left))
    return ''.join(map(str, items))


@jinja2.pass_environment
def replace(environment, text, old, new, count=-1):
    text, old, new = str(text), str(old), str(new)
    environment.budget.spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_environment
def join(environment, items, separator='', attribute=None):
    if attribute is not None:
        items = map(filters.make_attrgetter(environment, attribute), items)
    items, separator = [str(environment.budget.counted(item)) for item in items], str(separator)
    environment.budget.spend(len(items) * len(separator))
    return separator.join(items)


@jinja2.pass_environment
def indent(environment, text, width=4, first=False, blank=False):
    text = str(text)
    lines = text.count('\n') + 1
    environment.budget.spend(len(text) + lines * (width if isinstance(width, int) else len(width)))
    return filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def tojson(environment, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as transformers writes it: jinja2's own would escape < and >."""
    if isinstance(indent, int) and indent > MAX_INDENT:
        raise jinja2.TemplateError(f'tojson(indent={indent}); expected at most {MAX_INDENT}')
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return ''.join(map(environment.budget.counted, encoder.iterencode(value)))


# ---- functions that templates call

def raise_exception(message):
    raise jinja2.TemplateError(message)


@jinja2.pass_environment
def strftime_now(environment, format):
    if len(format) > 100 or re.search('%[^a-zA-Z%]{2}', format):
        raise jinja2.TemplateError('strftime_now() with a format of more than 100 characters, or with a width')
    return (environment.budget.now or datetime.now()).strftime(format)


class Namespace(jinja2.utils.Namespace):
    def __repr__(self):
        return '<namespace>'  # jinja2's would print what it holds, uncounted

    def __setitem__(self, name, value):
        if name.startswith('_'):
            raise SecurityError(f'namespace: the name {name!r} starts with "_"')
        super().__setitem__(name, value)


class Generation(ext.Extension):
    """{% generation %} marks the model's own words, for training; here they are text like any other."""

    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True)).set_lineno(line)


# ---- the sandbox

class Counting(NodeTransformer):
    """Puts the filters above around what makes values.  A template could redefine a name, but not a filter."""

    @staticmethod
    def filter(node, name='_counted'):
        return nodes.Filter(node, name, [], [], None, None)

    def visit_Output(self, node):
        node.nodes = [self.filter(self.visit(child)) for child in node.nodes]
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.filter(nodes.Const(1))))
        return node

    def visit_Concat(self, node):  # a ~ b
        return self.filter(nodes.List([self.visit(child) for child in node.nodes]), '_concatenate')

    def visit_literal(self, node):
        self.generic_visit(node)
        return self.filter(node) if getattr(node, 'ctx', 'load') == 'load' else node

    visit_List = visit_Dict = visit_Tuple = visit_literal


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with transformers' settings, filters and functions, and with every step counted."""

    intercepted_binops = frozenset(('+', '*', '**', '%'))

    def __init__(self, budget: Budget):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[ext.loopcontrols, Generation])
        self.budget = budget
        self.filters = {name: self.with_count(self.filters[name]) for name in FILTERS} | {
            '_counted': counted, '_concatenate': concatenate, 'replace': replace, 'join': join,
            'indent': self.with_count(indent), 'tojson': tojson}
        self.globals = {
            'range': self.globals['range'], 'dict': lambda *args, **kwargs: dict(*args, **kwargs),
            'namespace': Namespace, 'raise_exception': raise_exception, 'strftime_now': strftime_now}

    def with_count(self, function):
        def result(*args, **kwargs):
            return self.budget.counted(function(*args, **kwargs))

        if hasattr(function, 'jinja_pass_arg'):
            result.jinja_pass_arg = function.jinja_pass_arg
        return result

    def _generate(self, source, *args, **kwargs):
        source = Counting().visit(source)
        source.set_environment(self)
        source.set_lineno(1)  # of the nodes that have none yet
        return super()._generate(source, *args, **kwargs)

    def wrap_str_format(self, value):
        return None  # jinja2 would allow str.format, whose widths nobody counts

    def is_safe_attribute(self, obj, attr, value):
        return (not isinstance(obj, str) or attr in STRING_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator, left, right):
        if operator in '+*':
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple):
                    times = max(0, other) if operator == '*' and isinstance(other, int) else 1
                    self.budget.spend(size(one, self.budget.left) * times)
        if operator == '%' and isinstance(left, str) and re.search(r'\*|\d{3}', left):
            raise jinja2.TemplateError('a format with a width of more than 2 digits')
        if operator in ('*', '**') and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == '**' else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise jinja2.TemplateError(f'a number of more than {MAX_BITS} bits')
        return self.budget.counted(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805, as in jinja2: a template may pass self=
        owner, name = getattr(__obj, '__self__', None), getattr(__obj, '__name__', '')
        if isinstance(owner, str) and name == 'replace':
            return replace(__self, owner, *args, **kwargs)
        if isinstance(owner, str) and name == 'join':
            return join(__self, *args, separator=owner, **kwargs)
        __self.budget.spend(1)
        return __self.budget.counted(super().call(__context, __obj, *args, **kwargs))
