"""CUDA tensors without numbers, on a machine without CUDA: what a GPU holds, computes, waits for.

torch's FakeTensorMode gives a tensor a device, a dtype and a shape and no storage. Without a driver
the autograd engine stops at such a tensor, autocast("cuda") turns itself off, and .item() has no
number to give. `pretend` mends these: backward walks the graph in Python, autocast stays on, and
attention takes the fused kernels that an A100 takes. With device "cpu" it counts the same code as
the CPU runs it, so that the counts can be checked against a process that does run it.

    with pretend() as gpu:
        train(…)                       # torch.cuda.is_available() is true in here
    gpu.peak, gpu.flops, gpu.waits
"""

import contextlib
import sys
import traceback
import weakref
from collections import Counter, defaultdict, deque
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ROOT = str(Path(__file__).resolve().parent.parent)
REAL_ATTENTION = nn.functional.scaled_dot_product_attention
SAME_DTYPE = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution,
              aten.convolution_backward, aten._scaled_dot_product_flash_attention}
DATA_DEPENDENT = {aten.nonzero, aten._unique2, aten.masked_select}     # shapes that the host awaits
FLOAT64 = "nearest"                # the one function that may have it: Stage A's nearest codes
NO_TRAFFIC = {aten._unsafe_view, *flop_registry}               # a view, and what `flops` counts


class FakeGPU(FakeTensorMode):
    """Follows the tensors of one device. Bytes are rounded up to 512, as torch's allocator does.

    now, peak    bytes of living storages, and the most since `peak` was set last
    flops        {dtype: operations}; a multiply-add is two
    traffic      {name of an operation: bytes read and written}, but for matrix products and views
    waits        {(kind, "file:line code"): times the host would wait}
    It raises at float64, but for FLOAT64, and where two dtypes meet in a matrix product: fake
    tensors let that pass.
    """

    avoid_device_init = True                              # of FakeTensorMode: asks no driver

    def __init__(self, device):
        super().__init__(allow_non_fake_inputs=True)
        self.device, self.now, self.peak, self.living, self.depth = device, 0, 0, {}, 0
        self.flops, self.traffic, self.waits = Counter(), Counter(), Counter()

    def here(self, x):
        return isinstance(x, FakeTensor) and x.fake_device.type == self.device

    def hold(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.living:
            self.living[key] = size, weakref.ref(storage, lambda _: self.free(key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key):
        self.now -= self.living.pop(key)[0]

    def wait(self, kind):
        """The host waits: at which line of the project, or of a package if none is on the stack."""
        frames = [one for one in traceback.extract_stack() if one.filename != __file__]
        ours = [one for one in frames if one.filename.startswith(ROOT)
                and ".venv" not in one.filename and "/tests/" not in one.filename]
        last = (ours or frames)[-1]
        self.waits[kind, f"{Path(last.filename).name}:{last.lineno} {last.line}"] += 1

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            if self.here(args[0]):
                self.wait("item")
            known, real = args[0].constant, args[0].is_floating_point()
            return known.item() if known is not None else 1.0 if real else 1
        if packet in (aten._to_copy, torch.ops.prims.device_put) and not self.depth:
            target = kwargs.get("device") or args[1:] and args[1]
            kinds = {args[0].device.type, torch.device(target).type} if target else set()
            at_once = kwargs.get("non_blocking") or args[2:] == (True,)
            if len(kinds) == 2 and "cuda" in kinds and not at_once:
                self.wait("copy")
        if packet in DATA_DEPENDENT and not self.depth:
            self.wait(str(packet))
        self.depth += 1               # a miss of FakeTensorMode's cache comes back with the parts
        try:
            out = super().dispatch(func, types, args, kwargs)
        finally:
            self.depth -= 1
        if not self.depth:
            self.count(func, packet, args, kwargs, out)
        return out

    def count(self, func, packet, args, kwargs, out):
        flat = [x for one in (*args, *kwargs.values(), *(out if isinstance(out, (tuple, list))
                                                         else (out,)))
                for x in (one if isinstance(one, (tuple, list)) else (one,)) if self.here(x)]
        for x in flat:
            self.hold(x)
            assert x.dtype is not torch.float64 or any(
                one.name == FLOAT64 for one in traceback.extract_stack()
            ), f"{func} has a tensor of float64"
        if not flat:
            return
        if not (func.is_view or func.namespace == "prim" or packet in NO_TRAFFIC):
            self.traffic[str(packet)[5:]] += sum(x.numel() * x.element_size() for x in flat)
        if packet in SAME_DTYPE:
            dtypes = {x.dtype for x in args if self.here(x) and x.is_floating_point()}
            assert len(dtypes) == 1, f"{func} is given {dtypes}"
        if packet in flop_registry:
            self.flops[flat[0].dtype] += work(packet, args, kwargs, out)


def work(packet, args, kwargs, out):
    """Operations of one call. torch's formula for a convolution's backward forgets its groups."""
    if packet is not aten.convolution_backward:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    grad, x, weight, transposed, wanted = *args[:3], args[7], args[10]
    each = 2 * weight.numel() * (x if transposed else grad)[:, 0].numel()
    return each * (wanted[0] + wanted[1])


def backward(loss):
    """Tensor.backward without the engine in C++: a node after all that use it, then it is freed."""
    root = loss.grad_fn
    users, stack, seen = Counter(), [root], {root}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                users[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    arrived, ready = defaultdict(dict, {root: {0: torch.ones_like(loss)}}), deque([root])
    # The engine empties each node; here its last owner must let go, as the names of scalars
    for kept in (loss, *sys._getframe(1).f_locals.values()):
        if isinstance(kept, torch.Tensor) and kept.ndim == 0 and kept.grad_fn is not None:
            kept.detach_()
    del root, seen, kept
    with torch.no_grad():
        while ready:
            node = ready.pop()
            grads, children = arrived.pop(node, {}), node.next_functions
            if hasattr(node, "variable"):                                 # AccumulateGrad: a leaf
                leaf = node.variable
                if grads:
                    assert grads[0].device == leaf.device and grads[0].shape == leaf.shape
                    leaf.grad = grads[0].to(leaf.dtype) if leaf.grad is None else \
                        leaf.grad.add_(grads[0])
                continue
            given = [grads.get(i) for i in range(len(node._input_metadata))]
            results = node(*given) if grads else (None,) * len(children)
            results = results if isinstance(results, tuple) else (results,)
            del node, grads, given
            for (child, place), grad in zip(children, results):
                if child is None:
                    continue
                if grad is not None:                                      # as the engine validates
                    expected = child._input_metadata[place]
                    assert grad.device == expected.device, (child.name(), grad.device)
                    grad = grad.sum_to_size(expected.shape).to(expected.dtype)
                    slots = arrived[child]
                    slots[place] = slots[place] + grad if place in slots else grad
                    del slots
                users[child] -= 1
                if not users[child]:
                    del users[child]
                    ready.append(child)
            del results, children, grad, child
    for kept in sys._getframe(1).f_locals.values():       # checkpointing needed these until now
        if isinstance(kept, torch.Tensor) and kept.grad_fn is not None:
            kept.detach_()


def apply(module, fn, recurse=True):
    """nn.Module._apply that makes new parameters: a fake one cannot be swapped in place."""
    for child in module.children():
        child._apply(fn)
    for name, one in module._parameters.items():
        if one is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(fn(one), one.requires_grad)
    for name, one in module._buffers.items():
        if one is not None:
            module._buffers[name] = fn(one)
    return module


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """The kernel that torch chooses on an A100: flash in half precision, the efficient one else."""
    if q.device.type != "cuda":
        return REAL_ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled() and q.requires_grad, dropout_p, is_causal)[0]


def copied(tensor, memo):
    """Tensor.__deepcopy__, which would copy a storage that is not there."""
    return memo.setdefault(id(tensor), tensor.detach().clone())


def read(tensor):
    """Tensor.tolist of one dimension: zeros, which Run.finite takes for a finite gradient."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode.here(tensor):
        mode.wait("tolist")
    return [0.0] * tensor.numel()


@contextlib.contextmanager
def pretend(device="cuda"):
    """-> a FakeGPU; everything within makes and counts fake tensors."""
    patch, mode = mock.patch.object, FakeGPU(device)
    patches = [patch(torch.Tensor, "backward", backward), patch(nn.Module, "_apply", apply),
               patch(FakeTensor, "tolist", read), patch(torch.Tensor, "__deepcopy__", copied),
               patch(torch._C, "_current_graph_task_id", lambda: 0)]      # for checkpointing
    if device == "cuda":
        patches += [
            patch(torch.cuda, "is_available", lambda: True),
            patch(torch.cuda, "set_device", lambda device: None),
            patch(torch.cuda, "current_device", lambda: 0),
            patch(torch.cuda, "get_rng_state", lambda device=None: None),
            patch(torch.cuda, "is_bf16_supported", lambda *a, **k: True),
            patch(torch.Tensor, "pin_memory", lambda x, device=None: x),
            patch(nn.functional, "scaled_dot_product_attention", attention),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)]
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        try:
            with mode:
                yield mode
        finally:
            torch.set_float32_matmul_precision(precision)
