"""Run code in a process that has imported torch and transformers, and nothing of the package.

A new interpreter needs ten seconds to import them. Here one process does so once, and each call is
a fork of it.
"""

import contextlib
import io
import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

PRELOADED = ["torch._dynamo", "transformers.modeling_utils"]


def warm_python(code: str, blocked: Sequence[str] = ()) -> str:
    """What `code` prints; a failure shows its traceback.

    Modules named in `blocked` cannot be imported there, as if they were not installed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, code, blocked))
    process.start()
    theirs.close()
    try:
        is_fine, printed = ours.recv()
    except EOFError:
        is_fine, printed = False, "it ended without an answer"
    process.join()
    assert is_fine, f"the fresh process failed:\n{printed}"
    return printed.strip()


def _run(answer: Connection, code: str, blocked: Sequence[str]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in blocked:
            sys.modules[name] = None
    sys.modules.update(dict.fromkeys(blocked))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__", "sys": sys})
    except BaseException:  # noqa: BLE001  # whatever it is, the parent has to hear of it
        answer.send((False, traceback.format_exc()))
    else:
        answer.send((True, printed.getvalue()))
