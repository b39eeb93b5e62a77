"""The command line: `survfuse COMMAND ...`.

A command's module is imported when it is called for, so that `survfuse --help` is quick and
`survfuse doctor` works where nothing but torch and numpy is installed.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
import warnings
from collections.abc import Sequence

# command -> (module, function, what it does)
COMMANDS = {
    "doctor": ("survfuse.cli.doctor", "doctor_command", "what this installation can do, and why"),
    "encode": ("survfuse.cli.encode", "encode_command", "whole-slide images into bags of patches"),
    "pack": ("survfuse.cli.pack", "pack_command", "many feature files into one fast store"),
    "train": ("survfuse.cli.train", "train_command", "train and test a model as a file says"),
    "evaluate": ("survfuse.cli.evaluate", "evaluate_command", "report on runs and compare them"),
    "compare": ("survfuse.cli.compare", "compare_command", "several models on one cohort"),
    "ablate": ("survfuse.cli.compare", "ablate_command", "every variant of a model's ablation"),
    "predict": ("survfuse.cli.predict", "predict_command", "a run on patients it has never seen"),
    "explain": ("survfuse.cli.explain", "explain_command", "what the models of a run look at"),
    "bench": ("survfuse.cli.bench", "bench_command", "the kernels against others, on this machine"),
    "demo": ("survfuse.cli.demo", "demo_command", "everything once, on a simulated cohort"),
}
HELP = """Usage: survfuse COMMAND [OPTIONS]

Survival models over very long bags of patches, and the kernels they run on.

Commands:
{commands}

Options:
  --debug    show the traceback of an error
  --version  print the version
  --help     this text; `survfuse COMMAND --help` teaches a command

A first run, five minutes, no data needed:

  survfuse demo --out demo

Slides to a trained model:

  survfuse encode slides/*.svs --out bags/        (or features of TRIDENT, CLAM, STAMP)
  survfuse pack bags/ --out cohort.h5
  survfuse train study.yaml --out runs/study
  survfuse evaluate runs/study runs/baseline

Several models on one cohort, then new patients, then what a model goes by:

  survfuse compare study.yaml --models healnet,mcat,mean_pool --out runs/three
  survfuse predict runs/study --config external.yaml --out predictions.csv
  survfuse explain runs/study --out looks.csv

Exit codes of every command:

  0    done
  1    failed though nothing was wrong with what was asked: disk full, an error of ours
  2    bad input: an option, a configuration, a file that is missing or cannot be read
  130  stopped with Ctrl-C
"""
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# what a system call says of a path that cannot be used as asked; any other number (no room, a
# broken disk) is the machine's
_BAD_PATH = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    # another process holds it
    errno.EAGAIN,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 bad input, 130 stopped by the user."""
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help(), end="")
        return 0 if arguments else BAD_INPUT
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        import survfuse

        print(f"survfuse {survfuse.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        return complain(f"{name} is not a command; {hint}", BAD_INPUT)
    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        return _call(name, rest)
    except KeyboardInterrupt:
        return complain("stopped", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return complain(describe(error), exit_code(error))
    finally:
        warnings.showwarning = shown


def _call(name: str, arguments: list[str]) -> int:
    module, function, _ = COMMANDS[name]
    command = getattr(importlib.import_module(module), function)
    if name == "doctor":
        # argparse: this command must work where typer is missing
        return command(arguments)
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    # with a callback a lone command keeps its name
    app.callback()(_group)
    app.command(name)(command)
    try:
        app([name, *arguments], prog_name="survfuse")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return 0


def _group() -> None:
    """Survival models over very long bags of patches."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, _, about) in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def describe(error: Exception) -> str:
    """The message of an error, for people."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    # typer imports pydantic by itself, before any code of ours can ask for it
    if isinstance(error, ModuleNotFoundError) and missing in ("typer", "rich", "pydantic"):
        return (
            f'needs {missing}: pip install "survfuse[train]" (`survfuse doctor` works without it)'
        )
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        # without "[Errno 17]"
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text}; --debug shows where"


def exit_code(error: Exception) -> int:
    """BAD_INPUT for what the user can mend, FAILED for a failure of ours or of the machine."""
    # errors of our own may say it themselves
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, OSError):
        # HDF5 and we ourselves refuse a file without an error number
        return BAD_INPUT if error.errno is None or error.errno in _BAD_PATH else FAILED
    return BAD_INPUT if isinstance(error, (ValueError, ImportError)) else FAILED


def complain(text: str, code: int) -> int:
    """Print an error and return `code`."""
    print(f"error: {text}", file=sys.stderr)
    return code


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
