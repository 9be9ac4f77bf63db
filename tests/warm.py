"""A process that has imported what the scripts import, and runs each one asked for in a fork of it.

An import of torch and transformers takes some 4 s; a fork takes none. A line of standard input is a
job; the first line of standard output that answers it is the fork's process id, the second the exit
code of its script. Several ranks are forks, too, which torchrun's own agent makes in place of new
processes.
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch


def becomes(job):
    """Of a fork: all that a script sees of the process that it was started in."""
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY) for path in (job["stdout"], job["stderr"])]
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"])
    signal.alarm(job["limit"])  # seconds
    sys.argv = job["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))


def next_job():
    """Wait for jobs. Returns in a fork for each, with the job; at their end None."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            job = json.loads(line)
            becomes(job)
            return job
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def run_script(path):
    # after a fork torch makes its thread pool anew, and of two threads at it one may find none
    torch.set_num_threads(torch.get_num_threads())
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from transformers import Qwen2VLImageProcessorPil  # noqa: F401  all that is slow to import

    import eval  # noqa: F401
    import train  # noqa: F401
    from model import load_vlm

    # at a first load transformers imports the model, and compiles a thousand patterns
    load_vlm(Path(__file__).parent.parent / "toy" / "base")
    gc.freeze()  # else a fork walks, and so copies, all that is loaded as it ends: 0.8 s each

    job = next_job()
    if job and job["ranks"] == 1:
        run_script(job["argv"][0])
    elif job:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job["ranks"],
            run_id=str(os.getpid()),
            rdzv_backend="c10d",  # these two as torchrun --standalone
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, run_script)(job["argv"][0])
