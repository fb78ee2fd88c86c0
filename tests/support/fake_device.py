"""A device that is not there: what a step asks of a GPU, checked and counted on a machine without one.

Inside `FakeDevice` tensors on "cuda" have shapes and types and no numbers, while tensors on the CPU are computed as
always. An operation that would make the host wait for the device, or mixes devices, is an error, or, if not strict,
noted. autograd's engine needs a real device, so there is no backward pass.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sslvit.views.kernels import owners

DEVICE = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")
UNKNOWN_SHAPES = (
    "nonzero", "nonzero_static", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount",
    "repeat_interleave", "histc",
)  # fmt: skip
NO_KERNELS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias",
              "_unsafe_view", "device", "set_", "resize_", "is_pinned", "_pin_memory",
              "_record_function_enter_new", "_record_function_exit")  # fmt: skip


class Waits(AssertionError):
    """The host would wait for the device here."""


def name_of(operation: Any) -> str:
    return operation.__name__.partition(".")[0]


def is_kernel(operation: Any) -> bool:
    """Not a view, nor memory alone."""
    alias = operation._schema.returns[0].alias_info if operation._schema.returns else None
    return name_of(operation) not in NO_KERNELS and (alias is None or alias.is_write)


class Count(TorchDispatchMode):
    """Operations on real tensors, views and memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if is_kernel(operation):
            self.kernels[name_of(operation)] += 1
        return operation(*arguments, **(options or {}))


class FakeDevice(TorchDispatchMode):
    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self.kernels: Counter[str] = Counter()  # on the device, copies to and from it included
        self.host: Counter[str] = Counter()  # on the CPU
        self.events: list[str] = []  # waits that are allowed, by Fetched; tests add what else they want to see
        self.faults: list[str] = []
        self.pinned: dict[int, Any] = {}  # storages, which stay alive, so that no address is used twice
        self.around = ExitStack()

    def __enter__(self) -> "FakeDevice":
        device = self

        class Event:
            def __init__(self, *args: Any, **options: Any) -> None: ...

            def record(self, *args: Any) -> None: ...

            def synchronize(self) -> None:
                device.events.append("wait")

        def attention(q: Tensor, *given: Any, **options: Any) -> Tensor:
            """One kernel, as on a GPU, where its choice needs one; its output lies there as b n k d."""
            device.kernels["scaled_dot_product_attention"] += 1
            return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

        self.around.enter_context(mock.patch("torch.cuda.Event", Event))
        self.around.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        for name, answer in (("cuda.amp.common.amp_definitely_not_available", False), ("cuda.is_bf16_supported", True)):
            self.around.enter_context(mock.patch(f"torch.{name}", return_value=answer))
        self.around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        owners.cache_clear()  # of another's tensors
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.around.close()
        owners.cache_clear()

    def fault(self, sentence: str) -> None:
        self.faults.append(sentence)
        if self.strict:
            raise Waits(sentence)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = dict(options or {})
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        asked = options.get("device")
        if any(isinstance(tensor, FakeTensor) for tensor in tensors) or (asked and torch.device(asked).type == "cuda"):
            return self.on_device(operation, tensors, arguments, options)
        return self.on_host(operation, arguments, options)

    def on_host(self, operation: Any, arguments: tuple, options: dict[str, Any]) -> Any:
        name = name_of(operation)
        if is_kernel(operation):
            self.host[name] += 1
        with unset_fake_temporarily():
            if name == "is_pinned":
                return arguments[0].untyped_storage().data_ptr() in self.pinned
            pinned = options.pop("pin_memory", False) or name == "_pin_memory"
            result = arguments[0].clone() if name == "_pin_memory" else operation(*arguments, **options)
            if pinned:
                self.pinned[result.untyped_storage().data_ptr()] = result.untyped_storage()
            return result

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def on_device(self, operation: Any, tensors: list[Tensor], arguments: tuple, options: dict[str, Any]) -> Any:
        name = name_of(operation)
        if is_kernel(operation):
            self.kernels[name] += 1
        here = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if name in READS:
            self.fault(f"{operation} reads a number from the device")
            return 0
        if name in UNKNOWN_SHAPES or (name == "index" and self.by_mask(arguments)):
            self.fault(f"{operation} makes a shape that only the device knows")
        if name == "_to_copy" and (asked := options.get("device")) is not None:
            if torch.device(asked).type == "cpu":
                return self.to_host(operation, arguments, options)
            if here:
                return self.to_device(operation, here[0], arguments, options)
        if name == "copy_":
            return self.copied(operation, arguments, options)
        if any(tensor.ndim for tensor in here):
            self.fault(f"{operation} mixes devices: {[(tuple(each.shape), each.device.type) for each in tensors]}")
        return operation(*arguments, **options)

    def copied(self, operation: Any, arguments: tuple, options: dict[str, Any]) -> Tensor:
        to, source = arguments[:2]
        waits = not (arguments[2] if len(arguments) > 2 else options.get("non_blocking", False))
        if not isinstance(to, FakeTensor):
            if waits or not self.is_pinned(to):
                self.fault(f"a copy of {tuple(source.shape)} to the CPU waits for the device")
            with unset_fake_temporarily():
                return to.zero_()
        if not isinstance(source, FakeTensor) and source.ndim and (waits or not self.is_pinned(source)):
            self.fault(f"a copy of {tuple(source.shape)} to the device waits for what it does")
        return operation(*arguments, **options)

    @staticmethod
    def by_mask(arguments: tuple) -> bool:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in arguments[1])

    def to_host(self, operation: Any, arguments: tuple, options: dict[str, Any]) -> Tensor:
        self.fault(f"a copy of {tuple(arguments[0].shape)} to the CPU waits for the device")
        with unset_fake_temporarily():
            kind = options.get("dtype") or arguments[0].dtype
            return torch.zeros(tuple(arguments[0].shape), dtype=kind)

    def to_device(self, operation: Any, source: Tensor, arguments: tuple, options: dict[str, Any]) -> Any:
        if not options.get("non_blocking", False) or not self.is_pinned(source):
            self.fault(f"a copy of {tuple(source.shape)} to the device waits for what it does")
        return operation(*arguments, **options)


def moved(module: nn.Module) -> nn.Module:
    """The module on the device, whose numbers are lost. To be called inside FakeDevice, which does not check this."""
    with mock.patch.object(FakeDevice, "fault"):
        return module.to(DEVICE)


def on_device(values: Any) -> Any:
    """Tensors of these shapes on the device."""
    return tree_map(
        lambda x: torch.empty(x.shape, dtype=x.dtype, device=DEVICE) if isinstance(x, Tensor) else x, values
    )
