"""What ``torch.compile`` makes of the library: some calls become operators in its graphs, the others stay outside.

Calls work on addresses, which a trace would take for constants. So Dynamo, which does the tracing, must not look into
them. Torch is not imported for it, and a call costs nothing more. Dynamo looks in three places:

- at a function that a traced one calls, for the attribute ``_torchdynamo_inline``, as a compiled function has it: the
  function to trace in its place;
- there, too, for ``_torchdynamo_disable``, which ``torch.compiler.disable`` sets as well: it breaks the graph, or
  refuses with its own error under ``fullgraph=True``;
- at the code of a function that is about to run, for a strategy. Ours says to run it, and whatever it calls, as it is.
  Strategies are set when Dynamo is imported, which is before it can trace anything.
"""

import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from typing import Any, TypeVar

_DYNAMO = "torch._dynamo"
_REASON = "kvtoolkit works on the addresses of arrays"
_T = TypeVar("_T", bound=Callable[..., Any] | type)

_traceable: set[Any] = set()
_codes: list[types.CodeType] = []
_waiting: list[Callable[[], None]] = []


def is_dynamo_loaded() -> bool:
    """Whether anything can be traced in this process."""
    return _DYNAMO in sys.modules


def is_traced() -> bool:
    """True where Dynamo traces the caller, False where it runs."""
    return False


def traceable(method: _T) -> _T:
    """Decorate a method that asks `is_traced`, so that Dynamo may look into it although its class is `untraced`."""
    _traceable.add(method)
    return method


def untraced(what: _T) -> _T:
    """Decorate a function, or a class for all functions and properties in its body, so that Dynamo runs it as it is."""
    if isinstance(what, type):
        for member in vars(what).values():
            for function in _functions_of(member):
                _mark(function)
    else:
        _mark(what)
    return what


def traced_as(function: Any, form: Callable[..., Any]) -> None:
    """Let Dynamo trace ``form`` wherever a traced function calls ``function``, which runs as it is elsewhere.

    Args:
        function: a function, not a method: Dynamo would lose its object where it breaks a graph.
        form: with the same parameters.
    """
    function._torchdynamo_inline = form
    vars(function).pop("_torchdynamo_disable", None)


def when_dynamo_loads(call: Callable[[], None]) -> None:
    """Call something before Dynamo can trace anything: at once if it is loaded already."""
    if is_dynamo_loaded():
        call()
    else:
        _waiting.append(call)


def _functions_of(member: Any) -> list[Any]:
    if isinstance(member, property):
        return [function for function in (member.fget, member.fset) if function is not None]
    function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return [function] if isinstance(function, types.FunctionType) else []


def _mark(function: Any) -> None:
    if function not in _traceable:
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = _REASON
    if is_dynamo_loaded():
        _run_as_it_is(function.__code__)
    else:
        _codes.append(function.__code__)


def _run_as_it_is(code: types.CodeType) -> None:
    eval_frame: Any = sys.modules["torch"]._C._dynamo.eval_frame
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))


class _DynamoImport(MetaPathFinder):
    """Finds no module; it is there to be asked for Dynamo."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None) -> None:
        if name == _DYNAMO:
            while _codes:
                _run_as_it_is(_codes.pop())
            while _waiting:
                _waiting.pop()()


if not is_dynamo_loaded():
    sys.meta_path.insert(0, _DynamoImport())


def _in_a_trace() -> bool:
    return True


traced_as(is_traced, _in_a_trace)
