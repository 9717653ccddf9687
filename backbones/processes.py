"""How processes that train together part."""

import gc

import torch.distributed as dist


def leave_process_group() -> None:
    """Leave the other processes, and wait for the threads that talked to them.

    A thread of gloo that still frees a tensor when Python ends aborts the process. They end with the last reference to
    the group, and a model and its run, which hold some, refer to themselves.
    """
    gc.collect()
    dist.destroy_process_group()
