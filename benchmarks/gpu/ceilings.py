"""What this GPU can do at all: the rate of a large dense matmul and the bandwidth of a copy, for shares of a peak.

python -m gpu.ceilings [--tiny --device cpu]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu.program import BF16, Recorder, options
from gpu.record import Row
from gpu.timing import prepare, timed
from pysparse_ticket.same_function import strict_float32


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    recorder = Recorder("ceilings", chosen)
    n = 64 if chosen.tiny else 8192
    size = 1 << 16 if chosen.tiny else 1 << 30
    with strict_float32():
        for name, dtype in (("bf16", BF16), ("fp32, no TF32", torch.float32)):
            a, b = (torch.randn(n, n, device=chosen.device).to(dtype) for _ in range(2))
            found = timed({"dense": prepare(lambda a=a, b=b: lambda: a @ b, chosen.device)}, chosen.device, 1.0)
            rate = 2 * n**3 / found["dense"].median / 1e12
            recorder.add(Row("", f"{n}x{n}x{n}", f"dense matmul, {name}", 0.0, "rate", "TFLOP/s", rate))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=chosen.device)
    target = torch.empty_like(source)
    found = timed({"copy": prepare(lambda: lambda: target.copy_(source), chosen.device)}, chosen.device, 1.0)
    rate = 2 * size / found["copy"].median / 1e9
    recorder.add(Row("", f"{size >> 20} MiB", "copy, bytes read and written", 0.0, "rate", "GB/s", rate))
    return recorder


if __name__ == "__main__":
    main()
