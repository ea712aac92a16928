"""Kernels are counted by hand on small functions, and in code whose kernels are known."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from taperlit.bench.kernels import called_in, compiled, dispatched
from taperlit.errors import TaperlitError

x = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda: x.view(4, 4).t()[1:].unsqueeze(0).expand(3, 3, 4), 0),
        (lambda: torch.empty(3), 0),
        (lambda: x.add(1).mul(2), 2),
        (lambda: x.clone().add_(1), 2),
        (lambda: torch.addmm(x, torch.eye(2), x), 2),
        (lambda: x.detach().reshape(4, 4).contiguous(), 0),
        (lambda: x.t().contiguous(), 1),
        (lambda: F.linear(x, torch.eye(8)), 2),
        (lambda: F.layer_norm(x, (8,)), 1),
    ],
)
def test_operations_that_compute_something_are_counted(call, count):
    assert len(dispatched(call)) == count


def test_what_torch_makes_of_several_operations_is_several():
    with torch.inference_mode():
        names = dispatched(lambda: F.rms_norm(x, (8,), torch.ones(8)))
    assert len(names) >= 4
    assert any("rsqrt" in name for name in names)


GENERATED = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['const float*'], r'''extern "C" void kernel() {}''')
class Runner:
    def call(self, args):
        arg0_1, = args
        args.clear()
        assert_size_stride(arg0_1, (2, 8), (8, 1))
        buf0 = empty_strided_cpu((2, 8), (8, 1), torch.float32)
        cpp_fused_add_0(arg0_1, buf0)
        buf1 = empty_strided_cpu((2, 8), (8, 1), torch.float32)
        extern_kernels.mm(reinterpret_tensor(buf0, (2, 8), (8, 1), 0), arg0_1, out=buf1)
        buf2 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf0, buf0, buf1)
        buf3 = buf2[0]
        assert_size_stride(buf3, (2, 8), (8, 1), 'torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default')
        triton_poi_fused_1.run(buf3, 16, stream=stream0)
        del buf0
        return (buf3, )
"""


def test_kernels_are_read_from_the_code_that_was_written():
    assert list(called_in(GENERATED)) == [
        "cpp_fused_add_0",
        "extern_kernels.mm",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
        "triton_poi_fused_1.run",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_are_counted():
    def chain(count):
        def f(x):
            for _ in range(count):
                x = torch.mm(x.sin() + 1, x.t() @ x)
            return x

        torch.compiler.reset()
        return compiled(lambda: torch.compile(f, dynamic=False)(x))

    with torch.no_grad():
        one, two = chain(1), chain(2)
        assert sum("mm" in name for name in one) == 2
        assert len(two) - len(one) == 3  # two products, and one kernel for what is between them
        assert chain(2) == two  # from the disk, where torch keeps what it compiled


def test_nothing_compiled_is_no_zero():
    with pytest.raises(TaperlitError, match="wrote no code"):
        compiled(lambda: None)
