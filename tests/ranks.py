"""Run a function on several processes that can talk to each other."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback

import torch
import torch.distributed as dist

# A rank that waits for another in vain ends with an error, long before the test would be ended.
PATIENCE = datetime.timedelta(seconds=60)


def on_ranks(number, function, *arguments):
    """What `function(*arguments)` returns on each of so many ranks, by rank.

    Ranks are forks of this process: nothing is imported again, and functions may be closures.
    Raises AssertionError with the traceback of the first rank that fails.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(number):
            ours, theirs = context.Pipe(duplex=False)
            # daemons, so that none outlives a test that is ended
            process = context.Process(
                target=_run,
                args=(theirs, f"file://{folder}/store", rank, number, function, arguments),
                daemon=True,
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        answers = []
        for process, ours in started:
            try:
                answers.append(pickle.loads(ours.recv_bytes()))
            except EOFError:
                answers.append((False, "the process ended without an answer"))
            process.join()
    for rank, (is_fine, answer) in enumerate(answers):
        assert is_fine, f"rank {rank} of {number}: {answer}"
    return [answer for _, answer in answers]


def _run(pipe, store, rank, number, function, arguments):
    torch.set_num_threads(1)  # threads of the parent do not exist here
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=number, timeout=PATIENCE
        )
        answer = True, function(*arguments)
    except BaseException:  # noqa: BLE001  # whatever it is, the parent has to hear of it
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
