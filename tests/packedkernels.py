"""Builds of the packed products for a CPU, and what they are compared with."""

import ctypes
import ctypes.util
import mmap
import platform

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from edkm.compressed import cpu
from edkm.compressed.linear import packed_linear
from edkm.core import native

# -O1 and few variants: building one takes seconds.
VARIANTS = {"native": (), "portable": ("-DPORTABLE", "-O1")}
if platform.machine() == "x86_64":
    VARIANTS["avx2"] = ("-mno-avx512f", "-DBYTES=0", "-O1")
    VARIANTS["bytes"] = ("-mno-avx512f", "-DBYTES=1", "-O1")
    VARIANTS["sse"] = ("-mno-avx", "-O1")


def built(variant):
    """The kernels in one of their forms."""
    library = native.library(cpu._SOURCE, *cpu._FLAGS, *VARIANTS[variant])
    if library is None:
        pytest.skip("no C compiler")
    return cpu.declare(library)


def check(x, packed, weight):
    """As exact as torch in float32, then rounded to the dtype of x."""
    out = packed_linear(x, packed)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], len(weight))
    truth = x.double() @ weight.double().T
    plain = linear(x.float(), weight.float()).to(x.dtype)
    size = x.double().abs() @ weight.double().abs().T
    epsilon = torch.finfo(torch.float32).eps
    assert ((out - truth).abs() <= 1.01 * (plain - truth).abs() + 8 * epsilon * size + torch.finfo(x.dtype).eps * truth.abs()).all()
    # and in all, without the leeway of rounding
    assert (out - truth).norm() <= 1.5 * (plain - truth).norm() + epsilon * size.norm()


class Fenced:
    """Copies of tensors that end where a page without access begins."""

    def __init__(self):
        self.kept = []
        self.protect = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True).mprotect

    def __call__(self, tensor):
        data = tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
        whole = -(-data.size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        view = np.frombuffer(memory, np.uint8)
        assert not self.protect(ctypes.c_void_p(view.ctypes.data + whole), ctypes.c_size_t(mmap.PAGESIZE), 0)
        self.kept.append(memory)
        view[whole - data.size : whole] = data
        part = torch.from_numpy(view[whole - data.size : whole])
        return part.view(tensor.dtype).view(tensor.shape)
