"""A process that has imported what the scripts import, and runs each one asked for in a fork of it.

An import of torch and transformers takes some 4 s; a fork takes none. A line of standard input is a
job, a line of standard output the exit code of its script.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path


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


def next_script():
    """Wait for jobs. Returns in a fork for each, with its script; at their end None."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            becomes(json.loads(line))
            return sys.argv[0]
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import eval  # noqa: F401  all that is slow to import
    import train  # noqa: F401

    script = next_script()
    if script:
        runpy.run_path(script, run_name="__main__")
