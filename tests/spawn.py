"""Run a function in several gloo processes, and bring back what it returned or raised."""

import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(function, n_procs, *args):
    """Call `function(*args)` in `n_procs` processes with a default group; return their results in order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_main, (function, n_procs, folder, args), n_procs, start_method="spawn")
        results = [torch.load(f"{folder}/{proc}.pt", weights_only=False) for proc in range(n_procs)]
    raised = [value for kind, value in results if kind == "raised"]
    if raised:  # where one fails, its peers fail for want of it
        raise AssertionError(min(raised, key=lambda text: "closed by peer" in text))
    return [value for _, value in results]


def _main(proc, function, n_procs, folder, args):
    os.environ.update(RANK=str(proc), WORLD_SIZE=str(n_procs), LOCAL_RANK=str(proc))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=proc, world_size=n_procs)
    try:
        result = ("returned", function(*args))
    except BaseException:
        result = ("raised", traceback.format_exc())
    torch.save(result, f"{folder}/{proc}.pt")
    if result[0] == "returned":
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as lrpretrain/pretrain.py does, and for the same reason
