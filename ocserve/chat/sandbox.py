"""The sandbox in which chat templates run, and the only user of Jinja.

Templates come with model files, so they are code from outside: they run in Jinja's immutable sandbox, narrowed to
listed filters and methods, and every loop turn, call, comparison, operator and piece of output is counted against a
`Budget`. What the sandbox has no hook for (loop bodies, `~`, slices, comparisons, text between tags) is rewritten in
the syntax tree to pass through one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ocserve.chat import operations
from ocserve.chat.budget import Budget, BudgetExceeded
from ocserve.errors import InvalidRequest

# The longest template known is 17 KB; compiling is not counted against a budget, so the source is bounded.
MAX_SOURCE_CHARS = 128 * 1024
_MAX_REASON_CHARS = 300

# Jinja's own, because they look things up in the environment. What they iterate over is bounded already.
_LENT_FILTERS = ("d", "default", "first", "last", "map", "reject", "rejectattr", "select", "selectattr")
_LENT_COMPARING_FILTERS = ("max", "min", "sort", "unique")
# fmt: off
_LENT_TESTS = (
    "boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sameas",
    "sequence", "string", "true", "undefined",
)
_COMPARING_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne",
)
_LOOP_ATTRIBUTES = frozenset({
    "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
    "revindex", "revindex0",
})
# fmt: on


def rendering_budget(*, messages: int = 0, input_bytes: int = 0) -> Budget:
    """What the runs of one rendering may spend together. `input_bytes` is the size of what a client wrote."""
    return Budget(messages=messages, input_bytes=input_bytes, textless=(Undefined,))


class TemplateUnusable(Exception):
    """The template cannot be compiled; the model cannot serve chat messages with it."""


class _Refused(Exception):
    """The template called `raise_exception`."""


class Program:
    """A compiled template. Threads may share it; runs take turns."""

    def __init__(self, source: str) -> None:
        """Raises TemplateUnusable for a source that does not compile."""
        self._environment = _Environment()
        self._template, self._literals = _compile(self._environment, source)
        self._turn = threading.Lock()

    def run(self, variables: Mapping[str, object], budget: Budget) -> str:
        """The rendered text. Raises InvalidRequest, without the client's text, where the template refuses or fails."""
        try:
            with self._turn:
                self._environment.budget = budget
                context = self._template.new_context(dict(variables))
                return "".join(self._template.root_render_func(context))
        except _Refused as refusal:
            reason = str(refusal)
            # Only the template's own words: a reason that was put together may quote the client.
            literal = f": {reason[:_MAX_REASON_CHARS]}" if reason in self._literals else "."
            message = f"The model's chat template refuses these messages{literal}"
        except BudgetExceeded:
            message = "The model's chat template takes too much time or memory for these messages."
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything, and its text may hold content
            message = f"The model's chat template cannot render these messages ({type(error).__name__})."
        raise InvalidRequest(message, param="messages") from None


def _compile(environment: _Environment, source: str) -> tuple[jinja2.Template, frozenset[str]]:
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateUnusable(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
    try:
        template = environment.from_string(source)
    except TemplateUnusable:
        raise
    except Exception as error:  # noqa: BLE001 - a hostile source may break the compiler anywhere
        raise TemplateUnusable(f"the chat template does not compile ({type(error).__name__})") from None
    return template, frozenset(environment.literals)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox. `budget` belongs to the rendering under way; `literals` are the strings in the source."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    budget: Budget

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_emit,
            cache_size=0,
        )
        self.budget = Budget(textless=(Undefined,))
        self.literals: set[str] = set()
        # In place of Jinja's own, which are more than a template needs.
        self.filters.clear()
        self.filters.update(_filters())
        self.tests.clear()
        self.tests.update(_tests())
        self.globals.clear()
        self.globals.update(
            namespace=Namespace,
            raise_exception=_raise_exception,
            range=_paid(operations.bounded_range),
            strftime_now=_paid(operations.local_time),
            dict=_paid(operations.make_dict),
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.literals.update(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        _Metering().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        if isinstance(obj, LoopContext):
            return attr in _LOOP_ATTRIBUTES
        return isinstance(obj, Namespace) or attr in operations.METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if type(owner) is not str or getattr(value, "__name__", "") != "format":
            return None
        return lambda *args, **kwargs: _BudgetedFormatter(self).vformat(owner, args, kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, operations.key(argument))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return operations.binary(self.budget, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str:
            # Jinja passes variables of its own (`_loop_vars`) that are not the template's.
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}
            return operations.call_string(__self.budget, owner, __obj.__name__, args, given)
        if isinstance(owner, list | tuple | dict):
            return operations.call_container(__self.budget, owner, __obj.__name__, args)
        if isinstance(owner, LoopContext):
            operations.operand(__self.budget, args)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.budget.charge_value(result)
        return result


class _BudgetedFormatter(SandboxedFormatter):
    """`str.format` in the sandbox, with each field paid for before it is written."""

    def __init__(self, environment: _Environment) -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        operations.check_format(format_spec)
        if isinstance(value, str):
            self._budget.charge_text(value)
        else:
            operations.check_written(self._budget, value)
        return Formatter.format_field(self, value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        operations.check_written(self._budget, value)
        return Formatter.convert_field(self, value, conversion)


class _Metering(NodeTransformer):
    """Makes the syntax tree report to the budget what the sandbox would not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("_tick", nodes.Const(True), node), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_through("_tick", nodes.Const(True), node), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        # Constants pass through `finalize` at run time, text between tags does not.
        node.nodes = [
            nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("join", nodes.List(list(node.nodes), lineno=node.lineno), node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("_operand", node.expr, node)
        for part in node.ops:
            part.expr = _through("_operand", part.expr, node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _through("_slice", node.node, node, bounds)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _through("_key", node.key, node)
        return node

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("_made", node, node)

    visit_List = visit_Dict = visit_Tuple = _made  # noqa: N815

    def _unsupported(self, node: nodes.Node) -> NoReturn:
        raise TemplateUnusable(f"the chat template uses '{type(node).__name__}', which no prompt needs")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _unsupported  # noqa: N815
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = _unsupported  # noqa: N815


def _through(name: str, value: nodes.Expr, origin: nodes.Node, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(value, name, args or [], [], None, None, lineno=origin.lineno)


def _paid(operation: operations.Operation) -> Callable[..., Any]:
    """The operation as a filter, test or function of the sandbox.

    Taking the context also keeps Jinja from running it while it compiles.
    """

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        return operation(_budget(context), *args, **kwargs)

    return run


def _budget(context: Context) -> Budget:
    environment = context.environment
    assert isinstance(environment, _Environment)
    return environment.budget


@pass_context
def _emit(context: Context, value: object) -> str:
    return operations.text(_budget(context), value)


def _raise_exception(reason: object = "") -> NoReturn:
    raise _Refused(reason if isinstance(reason, str) else "")


def _lent(function: Any, *, comparing: bool) -> Callable[..., Any]:
    """One of Jinja's own filters or tests; a comparing one pays for its operands in full."""
    wants = str(getattr(function, "jinja_pass_arg", ""))

    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.tick()
        if comparing:
            value = operations.comparable(budget, value)
            for arg in args:
                operations.operand(budget, arg)
        if wants.endswith("context") and "eval" not in wants:
            return function(context, value, *args, **kwargs)
        if wants.endswith("environment"):
            return function(context.environment, value, *args, **kwargs)
        return function(value, *args, **kwargs)

    return run


@pass_context
def _join(context: Context, value: Any, glue: object = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return operations.join(_budget(context), value, glue)


def _filters() -> dict[str, Callable[..., Any]]:
    own: Mapping[str, operations.Operation] = {**operations.FILTERS, **operations.HOOKS}
    return {
        **{name: _paid(operation) for name, operation in own.items()},
        **{name: _lent(JINJA_FILTERS[name], comparing=False) for name in _LENT_FILTERS},
        **{name: _lent(JINJA_FILTERS[name], comparing=True) for name in _LENT_COMPARING_FILTERS},
        "join": _join,
    }


def _tests() -> dict[str, Callable[..., Any]]:
    return {
        **{name: _paid(operation) for name, operation in operations.TESTS.items()},
        **{name: _lent(JINJA_TESTS[name], comparing=False) for name in _LENT_TESTS},
        **{name: _lent(JINJA_TESTS[name], comparing=True) for name in _COMPARING_TESTS},
    }
