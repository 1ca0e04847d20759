"""torch's semi-structured operators on the CPU, as far as they are called: the same arguments, checks and results.

A packed tensor here is the dense one with the pruned weights at zero, and its metadata the mask it was made under.
"""

import torch


def _two_of_four(rows):
    assert (rows.reshape(rows.shape[0], -1, 4).ne(0).sum(-1) <= 2).all(), "more than 2 of 4 along a row"


def _check_dense(right, dtype):
    assert right.dim() == 2 and right.dtype == dtype
    assert right.shape[0] % 8 == 0 and right.shape[1] % 8 == 0, "16 bytes at a time"
    assert right.is_contiguous() or right.t().is_contiguous()


class FakeOperators:
    """Counts what is called in ``calls``; ``spoil`` multiplies what every product returns."""

    def __init__(self):
        self.calls, self.spoil = [], 1.0

    def install(self, monkeypatch, backend):
        """Let CPU tensors run ``backend`` (a class of ops.semi_structured) on these."""
        from pysparse_ticket.ops import semi_structured

        for name in (
            "_sparse_semi_structured_tile",
            "_sparse_semi_structured_apply",
            "_sparse_semi_structured_mm",
            "_sparse_semi_structured_addmm",
            "_cslt_compress",
            "_cslt_sparse_mm",
        ):
            monkeypatch.setattr(torch, name, getattr(self, name[1:]))
        monkeypatch.setattr(semi_structured, "backend", lambda device: backend)
        return self

    def count(self, *names):
        return sum(name in names for name in self.calls)

    def sparse_semi_structured_tile(self, values):
        self.calls.append("tile")
        assert values.dtype in (torch.float16, torch.bfloat16) and values.is_contiguous() and values.shape[1] % 32 == 0
        kept = torch.zeros(values.shape, dtype=torch.bool)
        for r in range(0, values.shape[0], 4):
            for c in range(0, values.shape[1], 4):
                block = values[r : r + 4, c : c + 4].float()
                rows, cols = [0] * 4, [0] * 4
                for at in block.flatten().argsort(descending=True, stable=True).tolist():
                    i, j = divmod(at, 4)
                    if rows[i] < 2 and cols[j] < 2:
                        rows[i], cols[j] = rows[i] + 1, cols[j] + 1
                        kept[r + i, c + j] = True
        return values * kept, kept, (values * kept).t().contiguous(), kept.t().contiguous(), kept

    def sparse_semi_structured_apply(self, values, threads):
        self.calls.append("compress")
        assert values.dim() == 2 and values.stride(1) == 1 and values.stride(0) % 8 == 0 and values.shape[1] % 32 == 0
        return values * threads, (values * threads).t().contiguous()

    def _mm(self, packed, right, bias):
        self.calls.append("product")
        _check_dense(right, packed.dtype)
        assert packed.shape[1] == right.shape[0]
        result = packed.float() @ right.float()
        if bias is not None:
            assert bias.dtype == packed.dtype and bias.shape == (packed.shape[0],)
            result += bias.float()[:, None]
        return (result * self.spoil).to(packed.dtype)

    def sparse_semi_structured_mm(self, packed, meta, right):
        assert not (packed.ne(0) & ~meta).any()
        return self._mm(packed, right, None)

    def sparse_semi_structured_addmm(self, bias, packed, meta, right):
        assert not (packed.ne(0) & ~meta).any()
        return self._mm(packed, right, bias)

    def cslt_compress(self, values):
        self.calls.append("compress")
        assert values.dim() == 2 and values.is_contiguous() and not any(size % 16 for size in values.shape)
        _two_of_four(values)
        return values.clone()

    def cslt_sparse_mm(self, packed, right, bias=None, transpose_result=False):
        result = self._mm(packed, right, bias)
        return result.t().contiguous() if transpose_result else result
