"""Keep ``torch.compile`` out of the library: its calls work on addresses, which a trace would take for constants.

Torch is not imported for it, and a call costs nothing more. Dynamo, which does the tracing, looks in two places:

- at a function that a traced one calls, for the attribute ``_torchdynamo_disable``, which ``torch.compiler.disable``
  sets as well: it breaks the graph there, or refuses with its own error under ``fullgraph=True``;
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

_codes: list[types.CodeType] = []


def untraced(what: _T) -> _T:
    """Decorate a function, or a class for all functions and properties in its body, so that Dynamo runs it as it is."""
    if isinstance(what, type):
        for member in vars(what).values():
            for function in _functions_of(member):
                _mark(function)
    else:
        _mark(what)
    return what


def _functions_of(member: Any) -> list[Any]:
    if isinstance(member, property):
        return [function for function in (member.fget, member.fset) if function is not None]
    function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return [function] if isinstance(function, types.FunctionType) else []


def _mark(function: Any) -> None:
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = _REASON
    if _DYNAMO in sys.modules:
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


if _DYNAMO not in sys.modules:
    sys.meta_path.insert(0, _DynamoImport())
