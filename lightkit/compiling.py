"""``Trainer(compile=)``: the training step, or the blocks of the model, go through torch.compile.

The only door to torch.compile; nothing of it is imported where nothing is compiled. What a compiled
step logs is put into a list and logged when the step is over, so that it is no part of the graph,
breaks none and compiles nothing anew. Evaluations are not compiled: their batches and their mode are
others, so each would be compiled again, and ``trainer.validate`` gives what the fit has shown.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit import metric_objects
from lightkit.compile_report import MEANT, Report, frames_in, summary, user_line
from lightkit.distributed.blocks import repeated
from lightkit.errors import CompileError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from lightkit.flow import Flow
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")
#: The keys of a dict, and what their values may be.
_KEYS: dict[str, tuple[type, ...]] = {
    "mode": (str, type(None)),
    "backend": (str, Callable),  # type: ignore[dict-item]
    "dynamic": (bool, type(None)),
    "fullgraph": (bool,),
    "options": (dict, type(None)),
    "regional": (bool,),
}
#: Modes of torch.compile that record CUDA graphs.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
#: What a torchmetrics object does in a step, and is done outside of the graph.
_METHODS = ("forward", "update", "compute", "reset")
#: Where torch.compile keeps what calls a module instead of its ``forward``.
_CALL = "_compiled_call_impl"


def settings(given: Any) -> dict[str, Any] | None:
    """Returns the arguments of torch.compile that ``compile=`` means, and ``"regional"``.

    Args:
        given: What the Trainer was given.

    Returns:
        None where nothing is to be compiled.

    Raises:
        ConfigError: It is none of the values that are allowed.
    """
    if given is None or given is False:
        return None
    if given is True:
        return {}
    if given == "regional":
        return {"regional": True}
    if not isinstance(given, Mapping):
        hint = did_you_mean(str(given), ["regional"])
        if given in _GRAPH_MODES:
            hint = f" Write {{'mode': {given!r}}}."
        raise ConfigError(
            f"compile={given!r}: allowed are True, False, 'regional', or a dict with the arguments "
            f"of torch.compile ({', '.join(_KEYS)}).{hint}"
        )
    for name, value in given.items():
        if name not in _KEYS:
            raise ConfigError(
                f"compile={dict(given)!r} has the unknown key {name!r}; allowed are "
                f"{', '.join(_KEYS)}.{did_you_mean(str(name), _KEYS)}"
            )
        if not isinstance(value, _KEYS[name]):
            allowed = [{"NoneType": "None"}.get(k.__name__, k.__name__) for k in _KEYS[name]]
            raise ConfigError(
                f"compile={{{name!r}: {value!r}}}: allowed is {' or '.join(allowed).lower()}."
            )
    return dict(given)


class Notes:
    """Takes what a compiled step logs, in place of the log, and keeps it until the step is over.

    A list that is empty whenever the step begins can be traced; the log itself, whose lists grow,
    would be compiled again in every step. Tensors are copied within the graph: what is changed in
    place afterwards is logged as it was.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[bool, str | None, Any, tuple[Any, ...]]] = []

    def log(self, name: str | None, value: Any, *arguments: Any) -> None:
        """Keeps the arguments of `Recorder.log`; without a name the metrics of a collection."""
        self.calls.append((False, name, _copy(value), arguments))

    def log_alone(self, name: str | None, value: Any, *arguments: Any) -> None:
        """Keeps those of `Recorder.log_alone`."""
        self.calls.append((True, name, _copy(value), arguments))

    def members(self, dictionary: Any) -> Any:
        """Returns what ``self.log_dict`` logs; the metrics of a collection as one, for later."""
        if isinstance(dictionary, nn.ModuleDict):
            return [(None, dictionary)]
        return metric_objects.members(dictionary)

    def replay(self, log: Any, copy: bool) -> None:
        """Logs what was kept; ``copy`` takes it out of memory that the next step writes into."""
        calls = list(self.calls)
        self.calls.clear()
        for alone, name, value, arguments in calls:
            put = log.log_alone if alone else log.log
            if name is None:
                for key, metric in log.members(value):
                    put(key, metric, *arguments)
            elif copy and isinstance(value, Tensor):
                put(name, value.clone(), *arguments)
            else:
                put(name, _number(value), *arguments)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _number(value: Any) -> Any:
    """Returns a number of NumPy's as one again: graphs give an array without dimensions."""
    numpy = sys.modules.get("numpy")
    array = numpy is not None and isinstance(value, numpy.ndarray) and value.ndim == 0
    return value[()] if array else value


class Compilation:
    """What is compiled in one fit.

    Args:
        how: What `settings` returned.
        task: The task.
        flow: Tells whether a group of batches has begun.
        device: The device of this process.
    """

    def __init__(
        self, how: Mapping[str, Any], task: TaskModule, flow: Flow, device: torch.device
    ) -> None:
        how = dict(how)
        self._regional = how.pop("regional", False)
        self._how, self._task, self._flow = how, task, flow
        # What a CUDA graph returns lies where its next replay writes.
        self._overwrites = device.type == "cuda" and _records_graphs(how)
        self._calls: list[tuple[nn.Module, Any]] = []  # the blocks, and what calls them
        self._undo = contextlib.ExitStack()
        self._report = Report()

    def begin(self) -> None:
        """Compiles the blocks where these are asked for; before they are sharded.

        Raises:
            ConfigError: There are none, or torch.compile refuses its arguments.
        """
        import torch._dynamo.config as config

        # What torch's compiler does to itself: imports of deprecated parts, and a look at .grad
        # behind a graph break, which it hides from all but the filter "error".
        self._undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
        if hasattr(config, "allow_unspec_int_on_nn_module"):
            # Else each value of self.global_step would be compiled by itself.
            name = "allow_unspec_int_on_nn_module"
            self._undo.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, True)
        self._undo.enter_context(_metrics_outside(self._task, self._overwrites))
        if not self._regional:
            return
        blocks = repeated(self._task)
        if not blocks:
            raise ConfigError(
                f"compile='regional' compiles the repeated blocks of a model, but "
                f"{type(self._task).__name__} has no ModuleList with two of one type. Say what its "
                f"blocks are (configure_sharding(self) returns them), or use compile=True."
            )
        for block in blocks:
            if getattr(block, _CALL, None) is None:  # else the user has compiled it by himself
                # What Module.compile() does, which passes over modules of torch's own.
                with _refused(self._how):
                    call = torch.compile(_within(block), **self._how)
                block.__dict__[_CALL] = call
                self._undo.callback(block.__dict__.pop, _CALL, None)
                self._calls.append((block, call))

    def check(self, *, automatic: bool, sharded: bool) -> None:
        """Raises `ConfigError` for steps that no graph can hold.

        Args:
            automatic: Whether the loop differentiates, and not the step.
            sharded: Whether the blocks of the model are put together one at a time.
        """
        if self._regional:
            return
        if sharded:
            raise ConfigError(
                "compile=True compiles training_step as a whole, but a sharded model is put "
                "together block by block within it. Use compile='regional', which compiles the "
                "blocks."
            )
        if not automatic:
            raise ConfigError(
                "compile=True compiles training_step, which in manual optimization differentiates "
                "and steps by itself. Use compile='regional' (the blocks of the model), or compile "
                "its networks: self.net.compile() in configure_model."
            )

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the step compiled, or as it is where blocks are compiled."""
        if self._regional:
            return step
        with _refused(self._how):
            return torch.compile(_of_its_own(step), **self._how)

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a step whose logging stays outside of the graph."""
        link, flow, notes, overwrites = self._task._link, self._flow, Notes(), self._overwrites
        report = self._report
        report.begin()

        def noting(*arguments: Any) -> Any:
            if overwrites and not flow.group_open:
                # Gradients of a group lie in the memory of the graphs until the optimizer's step.
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            log, link.metrics = link.metrics, notes  # type: ignore[assignment]
            try:
                outputs = step(*arguments)
            except BaseException:
                notes.calls.clear()
                raise
            finally:
                link.metrics = log
            if notes.calls:
                notes.replay(log, overwrites)
            if report.is_due():
                report.say()
            return _copied(outputs) if overwrites else outputs

        return noting

    def eager(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a step of an evaluation, within which the blocks run as they are."""
        calls = self._calls
        if not calls:
            return step

        def uncompiled(*arguments: Any) -> Any:
            for block, _ in calls:
                block.__dict__.pop(_CALL, None)
            try:
                return step(*arguments)
            finally:
                for block, call in calls:
                    block.__dict__[_CALL] = call

        return uncompiled

    def explained(self, error: BaseException) -> BaseException:
        """Returns an error of torch.compile as one that says what to do; others as they are."""
        exc = sys.modules.get("torch._dynamo.exc")
        if exc is None or not isinstance(error, exc.TorchDynamoException):
            return error
        what = "A block" if self._regional else "training_step"
        place = user_line(frames_in(str(error)))
        return CompileError(
            f"{what} of {type(self._task).__name__} could not be compiled"
            f"{f' ({place})' if place else ''}: {type(error).__name__}: {summary(str(error))} "
            f"Trainer(compile=False) runs it as it is; where the code itself is wrong, that shows it."
        )

    def describe(self) -> str:
        """Returns what is compiled, for the start lines."""
        what = "training_step"
        if self._regional:
            kinds = sorted({type(block).__name__ for block, _ in self._calls})
            what = f"{len(self._calls)} blocks ({', '.join(kinds)})"
        how = ", ".join(f"{k}={v!r}" for k, v in self._how.items() if isinstance(v, (str, bool)))
        return f"{what}{f' with {how}' if how else ''}; the first step takes longer"

    def end(self) -> None:
        """Leaves the task as it was."""
        self._undo.close()


def _of_its_own(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step with a code object of its own.

    Graphs are kept with the code, and all fits of a program together would have no more of them than
    torch allows for one. So they go with the fit.
    """
    function = getattr(step, "__func__", None)
    if not isinstance(step, types.MethodType) or not isinstance(function, types.FunctionType):
        return step
    code, names = function.__code__.replace(), function.__globals__
    copy = types.FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(copy, step.__self__)


def _within(block: nn.Module) -> Callable[..., Any]:
    """Returns what calls a block with its hooks; for one of torch's own a function that is not."""
    call: Callable[..., Any] = block._call_impl
    if not type(block).__module__.startswith("torch."):
        return call

    def block_of_torch(*arguments: Any, **options: Any) -> Any:
        return call(*arguments, **options)

    return block_of_torch


@contextlib.contextmanager
def _refused(how: Mapping[str, Any]) -> Iterator[None]:
    """Raises what torch.compile says of its arguments as `ConfigError`."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"compile={dict(how)!r}: torch.compile refuses it: {error}") from error


def _records_graphs(how: Mapping[str, Any]) -> bool:
    """Tells whether arguments of torch.compile ask for CUDA graphs."""
    options = how.get("options") or {}
    return (
        how.get("mode") in _GRAPH_MODES
        or how.get("backend") == "cudagraphs"
        or bool(options.get("triton.cudagraphs"))
    )


def _copied(value: Any) -> Any:
    """Returns what a step returned, with copies of its tensors; the loss stays differentiable."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


@contextlib.contextmanager
def _metrics_outside(task: nn.Module, copy: bool) -> Iterator[None]:
    """Keeps the torchmetrics objects of a task out of graphs: they count in Python, in every step.

    Their update is a function of each object, which they themselves leave out of copies; the rest
    are methods of their classes, so that a copy of the task keeps nothing of this.

    Args:
        task: The task.
        copy: Whether they get copies of tensors, of which some keep those of all batches.
    """
    metrics = [module for module in task.modules() if metric_objects.is_metric(module)]
    with contextlib.ExitStack() as stack:
        for owner in [*metrics, *{type(metric) for metric in metrics}]:
            for name in _METHODS:
                if name in vars(owner) or isinstance(owner, type):
                    stack.callback(_put, owner, name, vars(owner).get(name))
                    _put(owner, name, _outside(getattr(owner, name), copy))
        yield


def _outside(function: Callable[..., Any], copy: bool) -> Callable[..., Any]:
    """Returns a function that is called outside of graphs, with all that it calls itself."""

    @functools.wraps(function)
    def given_copies(*arguments: Any, **options: Any) -> Any:
        return function(*_copied(arguments), **_copied(options))

    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    chosen = given_copies if copy else function
    if "reason" in inspect.signature(disable).parameters:  # not in older versions
        return disable(chosen, reason=MEANT)
    return disable(chosen)


def _put(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object or a class past what guards it; None removes it."""
    if isinstance(owner, type):
        delattr(owner, name) if value is None else setattr(owner, name, value)
    else:
        vars(owner)[name] = value
