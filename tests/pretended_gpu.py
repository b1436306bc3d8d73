"""A GPU that is none, for machines without one: tensors that say they are on it, and refuse what a real one would refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

PLAIN = ("device", "_parse_to", "_has_compatible_shallow_copy_type", "__set__")  # naming devices, moving modules
MIXED = ("copy_", "__getitem__", "__setitem__", "to", "type_as")  # take tensors of several devices


class PretendedGPU(TorchFunctionMode):
    """Within it ``cuda`` is a device: what is moved there or made there says so, and so does all that is made of it.

    All work is done on the CPU, and gives the CPU's numbers. But an operation that mixes devices, a random draw from a
    generator of another device, and NumPy's sight of a tensor that is on the GPU are errors, as on a real one. The rules
    are checked where Python calls PyTorch, by the tensors' storage.

    What it can't show: kernels that a GPU does not have, rounding, arithmetic of half precision (``torch.autocast`` does
    nothing), loading onto the GPU (``map_location``), and several GPUs.
    """

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}  # the references keep the numbers from being given away again
        self.jvp = mock.patch("torch.func.jvp", self._jvp)
        self.name = mock.patch("torch.cuda.get_device_name", lambda device: "pretended GPU")

    def __enter__(self) -> PretendedGPU:
        self.jvp.start()
        self.name.start()
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.jvp.stop()
        self.name.stop()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor: Any) -> Any:
        """Say that a tensor is on the GPU."""
        if isinstance(tensor, Tensor):
            with torch._C.DisableTorchFunction():
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in PLAIN:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args[0])
        if name == "__deepcopy__":  # its second argument are copies of other tensors
            return self.put(func(*args)) if self.holds(args[0]) else func(*args)
        tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
        held = [self.holds(tensor) for tensor in tensors]
        if name in ("numpy", "__array__") and held[0]:
            raise TypeError("a tensor on the GPU can't be seen by NumPy: copy it to the CPU first")
        self._refuse_mixed(name, tensors, held)

        wanted = self._wanted(name, args, kwargs, held)
        on_gpu = (held[0] if name in MIXED else any(held)) if wanted is None else wanted
        generator = kwargs.get("generator")
        if generator is not None and (generator.device.type == "cuda") != on_gpu:
            raise RuntimeError(f"{name}: the generator is on another device than the numbers")
        result = func(*_map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})
        if wanted is not None:  # what is on its device already comes back as it is, all others as a copy
            result = _map(lambda x: x.clone() if isinstance(x, Tensor) and self.holds(x) != wanted else x, result)
        return _map(self.put, result) if on_gpu else result

    def _property(self, func: Any, tensor: Tensor) -> Any:
        known = {"device": self.device, "is_cuda": True, "is_cpu": False}
        if not self.holds(tensor):
            return func(tensor)
        name = func.__self__.__name__
        return known[name] if name in known else self.put(func(tensor))  # a gradient is where its parameter is

    def _refuse_mixed(self, name: str, tensors: list[Tensor], held: list[bool]) -> None:
        if name in ("__getitem__", "__setitem__"):  # a GPU takes places from the CPU, the CPU none from a GPU
            mixed = not held[0] and any(held)
        elif name in MIXED:
            mixed = False
        else:  # a number on the CPU goes everywhere, but not beside others into a new tensor
            alone = name not in ("stack", "cat")
            mixed = any(held) and not all(h or (alone and not t.ndim) for h, t in zip(held, tensors, strict=True))
        if mixed:
            raise RuntimeError(f"{name}: tensors on the CPU and on the GPU")

    def _wanted(self, name: str, args: tuple, kwargs: dict, held: list[bool]) -> bool | None:
        """Whether a result is wanted on the GPU; None if nothing is said."""
        if name in ("cpu", "cuda"):
            return name == "cuda"
        if name in ("to", "type_as"):
            if len(held) > 1:
                return held[1]
            places = [a for a in args[1:] if isinstance(a, (str, torch.device))] + [kwargs.get("device")]
        else:
            places = [kwargs.get("device")]
        return None if places[0] is None else torch.device(places[0]).type == "cuda"

    def _jvp(self, func: Any, primals: tuple, tangents: tuple) -> Any:
        """Its own tensors have no storage, so that it is looked at from outside."""
        jvp = self.jvp.temp_original
        on_gpu = any(self.holds(tensor) for tensor in primals)
        with torch._C.DisableTorchFunction():
            result = jvp(func, primals, tangents)
        return _map(self.put, result) if on_gpu else result


def _tensors(item: Any) -> Iterator[Tensor]:
    """The tensors among a function's arguments."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)


def _map(change: Callable[[Any], Any], item: Any) -> Any:
    """A function's arguments or results, each changed."""
    if type(item) in (list, tuple):
        return type(item)(_map(change, part) for part in item)
    if isinstance(item, tuple):  # a result with names, whose tensors change in place
        for part in item:
            change(part)
        return item
    return change(item)


def _on_cpu(item: Any) -> Any:
    if isinstance(item, torch.device) or (isinstance(item, str) and item.startswith("cuda")):
        return torch.device("cpu")
    return item
