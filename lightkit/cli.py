"""The command ``lightkit``: fit, validate, test, predict from configuration files; new projects.

Only words in, words out: what a command does is a call of `lightkit.config` and of the Trainer.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import lightkit
from lightkit import console, screen
from lightkit.distributed import launched, processes, report
from lightkit.errors import ConfigError, LightkitError, UsageError, did_you_mean

if TYPE_CHECKING:
    from lightkit.config import Config, Sources
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")

COMMANDS = {
    "fit": "train a task",
    "check": "rehearse a fit and print its plan",
    "explain": "print the loop with the hooks and callbacks that stand in it",
    "validate": "run the validation loop once",
    "test": "run the test loop once",
    "predict": "predict and save the predictions",
    "demo": "train a small network on handwritten digits and draw its curves",
    "new": "start a project from a template",
    "export": "a checkpoint as a program, as weights, or (sharded) as one file",
    "replay": "run the step again at which a fit failed, and say where",
    "runs": "list past runs, or show how some of them differ",
    "prove": "measure on this machine what lightkit promises",
}
_RUN = "--config FILE [--config FILE ...] [--KEY VALUE ...]"
#: What follows a command's name; `_RUN` for the others.
_WORDS = {
    "demo": "[--KEY VALUE ...]",
    "new": "TEMPLATE FOLDER\n       lightkit new --list",
    "export": "CHECKPOINT FILE [--task module.Class]",
    "replay": "RUN [--task module.Class] [--data module.Class] [--debug]",
    "runs": "[FOLDER] [--json]\n       lightkit runs RUN RUN [RUN ...] [--json]",
    "prove": "[PROOF ...] [--json]",
}
_OPTIONS = {
    "--config FILE": "YAML with the keys trainer, data, task, ckpt_path; may be given several "
    "times, later files win",
    "--ckpt_path PATH": "the checkpoint to continue from, or whose weights to use",
    "--trainer.NAME VALUE": "an argument of the Trainer",
    "--task module.Class": "the class of the task; --task.NAME VALUE sets its argument NAME",
    "--data module.Class": "the class of the data; --data.NAME VALUE sets its argument NAME",
    "--print_config": "print the resolved configuration, which repeats the run, and stop",
    "--debug": "replay: stop in the debugger of Python where it fails",
    "--json": "runs, prove: print JSON instead of lines",
    "--output FILE": "predict: where the predictions go (<default_root_dir>/predictions.pt)",
    "--help": "print this help, with the arguments of the task and data that are given",
    "--version": "print the version",
}
_SWITCHES = ("--help", "-h", "--version", "--print_config", "--list", "--debug", "--json")
_ANYWHERE = {"--help", "-h", "--version"}


@dataclasses.dataclass
class _Words:
    """The command line, taken apart: flags in any order, no abbreviations."""

    positional: list[str] = dataclasses.field(default_factory=list)
    switches: set[str] = dataclasses.field(default_factory=set)
    given: tuple[str, ...] = ()
    files: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, str] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after ``lightkit``; by default those of this process.

    Returns:
        0, 2 for a wrong word, file or value, 1 for another error of lightkit's, 130 after Ctrl-C.

    Raises:
        Exception: What the user's code raised, as it was raised.
    """
    cwd = str(Path.cwd())
    if sys.path[:1] != [cwd]:
        sys.path.insert(0, cwd)  # the project's modules, however the command was started
    try:
        return _run(_split(sys.argv[1:] if argv is None else argv))
    except LightkitError as error:
        if _passes_through_user_code(error):
            raise
        from lightkit.distributed.told import is_rank_zeros

        if not is_rank_zeros(error):  # else it is there already
            start = f"rank {launched().rank}: " if launched().rank else ""
            text = "\n".join([f"{start}error: {error}", *getattr(error, "__notes__", ())])
            sys.stderr.write(screen.fold(f"{text}\n", sys.stderr))
        report(error)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has gone, as in "lightkit --help | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _split(argv: Sequence[str]) -> _Words:
    words = _Words(given=tuple(argv))
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if word in _SWITCHES:
            words.switches.add(word)
        elif not word.startswith("-"):
            words.positional.append(word)
        elif not word.startswith("--"):
            known = ", ".join(_OPTIONS)
            raise ConfigError(f"command line: unknown flag {word}\n  allowed: {known}")
        elif not equals and (not rest or rest[0].startswith("--")):
            hint = did_you_mean(key, _SWITCHES)
            allowed = f"{key} VALUE or {key}=VALUE"
            text = f"command line: {key} needs a value\n  allowed: {allowed}\n {hint}"
            raise ConfigError(text.rstrip())
        else:
            value = value if equals else rest.pop(0)
            if key == "--config":
                words.files.append(value)
            else:
                words.values[key[2:]] = value
    return words


def _run(words: _Words) -> int:
    if "--version" in words.switches:
        return _say(f"lightkit {lightkit.__version__}")
    command, *others = words.positional or [""]
    wants_help = command == "help" or bool(words.switches & {"--help", "-h"})
    if command == "help":
        command, *others = others or [""]
    if not command:
        if (words.files or words.values) and not wants_help:
            raise ConfigError(f"command line: no command\n  allowed: {', '.join(COMMANDS)}")
        return _say(_help())
    if command not in COMMANDS:
        raise ConfigError(
            f"command line: unknown command {command!r}\n"
            f"  allowed: {', '.join(COMMANDS)}\n {did_you_mean(command, COMMANDS)}".rstrip()
        )
    own = {"new": "--list", "replay": "--debug", "runs": "--json", "prove": "--json"}
    allowed = {*_ANYWHERE, own.get(command, "--print_config")}
    if wrong := words.switches - allowed:
        raise ConfigError(f"command line: {command} has no flag {', '.join(wrong)}")
    if command == "new":
        return _say(_help(command)) if wants_help else _new(words, others)
    if command == "export":
        return _say(_help(command)) if wants_help else _export(words, others)
    if command == "runs":
        return _say(_help(command)) if wants_help else _runs(words, others)
    if command == "prove":
        return _say(_help(command)) if wants_help else _prove(words, others)
    if command == "replay":
        return _say(_help(command)) if wants_help else _replay(words, others)
    if others:
        is_file = others[0].endswith((".yaml", ".yml"))
        hint = f"Did you mean --config {others[0]}?" if is_file else ""
        given = f"command line: one word too many after {command!r}\n  given:   {others[0]}"
        raise ConfigError(f"{given}\n  allowed: flags, --KEY VALUE\n  {hint}".rstrip())
    return _entry_point(command, words, wants_help)


def _new(words: _Words, others: list[str]) -> int:
    from lightkit import announce
    from lightkit._share import copy_template

    if "--list" in words.switches:
        return _say("\n".join(_templates()))
    if len(others) != 2 or words.values or words.files:
        what = "no folder" if len(others) == 1 else "wrong use"
        given = shlex.join(["lightkit", *words.given])
        allowed = "lightkit new TEMPLATE FOLDER; lightkit new --list shows the templates"
        raise ConfigError(f"command line: {what}\n  given:   {given}\n  allowed: {allowed}")
    name, folder = others
    try:
        files = copy_template(name, folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}. Choose another folder.") from error
    return _say(
        f"{len(files)} files written to {folder}. To train:\n"
        f"  cd {shlex.quote(folder)}\n  {announce.program('lightkit', here=False)} fit "
        f"--config config.yaml"
    )


def _templates() -> list[str]:
    from lightkit._share import templates

    return [f"{name:16}{line}" for name, line in templates().items()]


def _export(words: _Words, others: list[str]) -> int:
    """Writes what the file's name says; any other name is that of a joined checkpoint."""
    from lightkit.checkpoint import read_checkpoint, sharded, weights
    from lightkit.export import SUFFIXES, WEIGHTS, export_weights

    if len(others) != 2 or set(words.values) - {"task"} or words.files:
        given = " ".join(["lightkit export", *others])
        allowed = (
            f"lightkit export CHECKPOINT FILE, where FILE ends in {', '.join(SUFFIXES)}; or in .ckpt "
            f"to join the checkpoint of a sharded run"
        )
        raise ConfigError(f"command line: wrong use\n  given:   {given}\n  allowed: {allowed}")
    checkpoint, file = others
    kind = SUFFIXES.get(Path(file).suffix)
    if kind is None:
        return _say(f"written: {sharded.consolidate(checkpoint, file)}")
    if kind in WEIGHTS:
        held = weights.weights_of(read_checkpoint(checkpoint), checkpoint)
        return _say(f"written: {export_weights(held, file)}")
    from lightkit.config import read_sources

    task_class = read_sources([], words.values, "command line").find_class("task")
    if task_class is None:  # a class that a file names is not imported: that could run any code
        raise ConfigError(
            f"command line: {kind} needs the class of the task, and its example_input_array\n"
            f"  allowed: lightkit export {checkpoint} {file} --task module.Class"
        )
    return _say(f"written: {task_class.load_from_checkpoint(checkpoint).export(file)}")


def _runs(words: _Words, others: list[str]) -> int:
    from lightkit.runs import report

    _refuse_keys(words, "lightkit runs [FOLDER]; lightkit runs RUN RUN")
    return _say(report(others, as_data="--json" in words.switches))


def _prove(words: _Words, others: list[str]) -> int:
    from lightkit.prove import report

    _refuse_keys(words, "lightkit prove [PROOF ...]")
    return report(others, as_data="--json" in words.switches)


def _refuse_keys(words: _Words, allowed: str) -> None:
    if wrong := [*words.values, *words.files]:
        raise ConfigError(f"command line: wrong use\n  given:   {wrong[0]}\n  allowed: {allowed}")


def _replay(words: _Words, others: list[str]) -> int:
    from lightkit.replay import from_words

    console.install()
    return from_words(others, words.values, debug="--debug" in words.switches)


def _entry_point(command: str, words: _Words, wants_help: bool) -> int:
    from lightkit.config import build, read_sources, resolve

    output = words.values.pop("output", None)
    if output is not None and command != "predict":
        raise ConfigError(f"command line: --output is for predict only\n  given:   {command}")
    if demo := command == "demo":
        words.files.insert(0, _demo_config())
    sources = read_sources(words.files, words.values, "command line")
    if demo:
        _find_anywhere(sources)
    if wants_help:
        return _say(_help(command, sources))
    if demo:
        import torch

        command = "fit"
        # More threads gain nothing with so small a network; on a busy machine each waits for all.
        torch.set_num_threads(1)
    config = resolve(sources)
    if "--print_config" in words.switches:
        return _say(config.to_yaml())
    if not launched().launched and command != "explain":
        _launch(config, words)
    console.install(launched().rank)
    run = build(config)
    if command in ("check", "explain"):
        told = getattr(run.trainer, command)(run.task, datamodule=run.data)
        text = str(told) if command == "explain" else screen.fold(str(told), sys.stdout)
        return _say(text) if run.trainer.is_global_zero else 0
    if command != "fit" and config.ckpt_path is None:
        _log.warning("untrained weights: no ckpt_path was given.%s", _checkpoint_near(words.files))
    if demo:
        run.trainer.on("fit_end", _draw, rank_zero=True)
    call = getattr(run.trainer, command)
    result = call(run.task, datamodule=run.data, ckpt_path=config.ckpt_path)
    if command == "predict" and run.trainer.is_global_zero:
        from lightkit.checkpoint import save_file

        path = Path(output or Path(run.trainer.default_root_dir) / "predictions.pt")
        save_file(result, path)
        _say(f"predictions: {path}")
    return 0


def _demo_config() -> str:
    """Returns the configuration of the demo, which is that of the template digits."""
    from lightkit._share import share_dir

    if find_spec("sklearn") is None:
        raise ConfigError(
            "lightkit demo trains on the digits of scikit-learn: pip install 'lightkit[examples]'"
        )
    return str(share_dir("configs") / "digits.yaml")


def _find_anywhere(sources: Sources) -> None:
    """Changes class paths of templates to those that can be imported in any folder."""
    from lightkit._share import share_dir

    if share_dir("templates").parent.name == "_shared":  # inside the package
        for section in ("task", "data"):
            spec = sources.tree.get(section)
            if isinstance(spec, dict) and str(spec.get("class_path")).startswith("templates."):
                spec["class_path"] = f"lightkit._shared.{spec['class_path']}"


def _draw(trainer: Trainer) -> None:
    """Draws the curves of a fit."""
    width = shutil.get_terminal_size().columns
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    _say(trainer.history.sketch(width, ascii_only=ascii_only))


def _launch(config: Config, words: _Words) -> None:
    """Goes on under torch's own launcher where the configuration asks for several processes.

    Does not return then: the launcher takes the place of this process, and starts the same command
    in each of its own.
    """
    given = config.trainer.arguments
    where = (given.get("accelerator", "auto"), given.get("devices", "auto"), given.get("gpus"))
    number = processes(*where, given.get("num_nodes"))
    if number < 2:
        return
    words_after = ["-m", "lightkit", *words.given]
    text = f"starting: torchrun --standalone --nproc-per-node {number} {shlex.join(words_after)}"
    _say(screen.fold(text, sys.stdout, " \\"))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    os.execv(sys.executable, [sys.executable, *run, *words_after])  # noqa: S606  this very command


def _checkpoint_near(files: list[str]) -> str:
    """Proposes the checkpoint of the run whose saved configuration is used."""
    for file in reversed(files):
        folder = Path(file).parent / "checkpoints"
        for name in ("best", "last"):
            found = sorted(folder.glob(f"{name}.*"))
            if found:
                return f" This run has one: --ckpt_path {found[0]}"
    return ""


def _help(command: str = "", sources: Sources | None = None) -> str:
    """Returns the help: of all commands, or of one, with the arguments that it takes."""
    if not command:
        runs = "|".join(name for name in COMMANDS if name not in _WORDS)
        lines = [f"usage: lightkit {runs} {_RUN}"]
        lines += [f"       lightkit {name} {words}" for name, words in _WORDS.items()]
        lines += ["", "commands:", *(f"  {name:10}{line}" for name, line in COMMANDS.items())]
        each = "lightkit COMMAND --help shows more, as every argument of the Trainer."
        return "\n".join([*lines, "", *_flags(_OPTIONS), "", each])
    lines = [f"usage: lightkit {command} {_WORDS.get(command, _RUN)}", "", COMMANDS[command], ""]
    if command == "new":
        return "\n".join([*lines, "templates:", *(f"  {line}" for line in _templates())])
    if command == "export":
        from lightkit.export import SUFFIXES

        lines += ["FILE ends in:", *(f"  {end:14}{kind}" for end, kind in SUFFIXES.items())]
        return "\n".join([*lines, "  .ckpt         a sharded checkpoint as one file"])
    if command == "prove":
        from lightkit.prove import PROOFS

        lines += ["proofs:", *(f"  {name:14}{claim}" for name, (claim, _) in PROOFS.items()), ""]
    if command in ("runs", "prove"):
        return "\n".join([*lines, *_entry("--json", _OPTIONS["--json"])])
    if command == "replay":
        flags = ("--task module.Class", "--data module.Class", "--debug")
        return "\n".join([*lines, *_flags(flags)])
    own = {"--output FILE": "predict", "--debug": "replay", "--json": "runs"}
    lines += _flags([flag for flag in _OPTIONS if own.get(flag, command) == command])
    assert sources is not None
    classes: list[tuple[str, Any]] = [("trainer", lightkit.Trainer)]
    classes += [(section, sources.find_class(section)) for section in ("task", "data")]
    for section, cls in classes:
        if cls is not None:
            lines += ["", f"arguments of {cls.__name__}:", *_arguments(section, cls)]
    return "\n".join(lines)


def _flags(names: Iterable[str]) -> list[str]:
    lines = ["flags, in any order (--KEY=VALUE works too; a value is read as YAML):"]
    for flag in names:
        lines += _entry(flag, _OPTIONS[flag])
    return lines


def _arguments(section: str, cls: Any) -> list[str]:
    from lightkit.config_types import describe, plain, shown
    from lightkit.signatures import MISSING, arguments

    lines = []
    for name, argument in arguments(cls)[0].items():
        required = argument.default is MISSING
        state = "required" if required else f"default: {shown(plain(argument.default))}"
        head = f"--{section}.{name}  {describe(argument.annotation)} ({state})"
        lines += _entry(head, argument.text)
    return lines


def _entry(head: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {head}", *wrapped]


def _say(text: str) -> int:
    encoding = sys.stdout.encoding or "utf-8"  # which may lack letters of a name or an error
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    sys.stdout.write(shown.rstrip("\n") + "\n")
    sys.stdout.flush()
    return 0


def _passes_through_user_code(error: BaseException) -> bool:
    """Tells whether code that is neither ours nor a library's stands in the traceback."""
    known = sys.stdlib_module_names | {"lightkit", "torch", "torchmetrics", "tensorboard", "rich"}
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(name.partition(".")[0] not in known for name in modules)
