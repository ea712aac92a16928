"""FSDP (version 1) on the CPU: Lightning's strategy and torch's own code, on a device whose streams do nothing.

Both refuse the CPU, and CI has no GPU. Only checkpoints do not work so.
"""

from contextlib import nullcontext

import torch
import torch.distributed.fsdp._flat_param as flat_param
import torch.distributed.fsdp._runtime_utils as runtime
import torch.distributed.fsdp.fully_sharded_data_parallel as fully_sharded
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

from taperlit.transformer import Block


class _Idle:
    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args: self


class _Cpu:
    Stream = Event = _Idle
    current_stream = staticmethod(lambda *args: _Idle())
    stream = staticmethod(lambda stream: nullcontext())
    is_available = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)
    current_device = staticmethod(lambda: torch.device("cpu"))
    device_count = staticmethod(lambda: 1)


def _init_device_handle(state, *args):
    state._device_handle = _FSDPDeviceHandle(torch.device("cpu"), _Cpu)
    return state


class CpuFSDPStrategy(FSDPStrategy):
    def __init__(self):
        _FSDPDeviceHandle.from_device = classmethod(lambda cls, device: cls(device, _Cpu))
        fully_sharded._init_device_handle = _init_device_handle
        flat_param._no_dispatch_record_stream = runtime._no_dispatch_record_stream = lambda *args: None
        super().__init__(auto_wrap_policy={Block})
