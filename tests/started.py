"""Training processes that tests can hurt. They are forked from a server that has imported what they need."""

import multiprocessing
import os
import runpy
import sys
import time
import warnings

from tiny import ROOT, _free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lrpretrain.pretrain", "deepspeed", "torch.utils.tensorboard"])


class Run:
    """`python -m lrpretrain.pretrain ARGV` in some processes; what they print goes to files in `folder`.

    `before`, a function of a module, is called in each of them first.
    """

    def __init__(self, n_procs, argv, folder, before=None, **env):
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.outputs = [folder / f"output{proc}.txt" for proc in range(n_procs)]
        self.processes = []
        for proc, output in enumerate(self.outputs):
            output.write_text("")
            env = {"DS_ACCELERATOR": "cpu"} | env
            if n_procs > 1:
                env |= dict(RANK=proc, WORLD_SIZE=n_procs, LOCAL_RANK=proc)
                env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            process = _context.Process(target=_main, args=(argv, str(output), env, before))
            process.start()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()

    def send(self, number, proc=0):
        os.kill(self.processes[proc].pid, number)

    def said(self, proc=0):
        return self.outputs[proc].read_text()

    def wait_for(self, happened, timeout_s=60):
        """Return once process 0 has printed a text, or a function returns something true."""
        until = time.monotonic() + timeout_s
        while not (happened in self.said() if isinstance(happened, str) else happened()):
            ended = [process.exitcode for process in self.processes]
            assert any(code is None for code in ended), f"{happened} did not come: {ended}\n{self.said()}"
            assert time.monotonic() < until, f"{happened} did not come in {timeout_s} s\n{self.said()}"
            time.sleep(0.002)

    def end(self, timeout_s=60, procs=None):
        """Return the exit codes of the (first) processes."""
        until = time.monotonic() + timeout_s
        for process in self.processes[:procs]:
            process.join(max(until - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes[:procs]]
        said = "\n".join(self.said(proc) for proc in range(len(codes)))
        assert None not in codes, f"processes {codes} are alive after {timeout_s} s\n{said}"
        return codes


def _main(argv, output, env, before):
    os.chdir(ROOT)
    os.environ.update({key: str(value) for key, value in env.items()})
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        before()
    sys.argv = ["pretrain", *map(str, argv)]
    warnings.filterwarnings("ignore")  # that the module was imported before it runs, for one
    runpy.run_module("lrpretrain.pretrain", run_name="__main__", alter_sys=True)
