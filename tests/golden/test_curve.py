"""The loss curve of a fixed run is what it was when it was last looked at.

Tolerance 1e-6, relative: processors sum matrix products in their own order, so fp32 losses differ in the last digits; twenty
steps at a small rate do not amplify that beyond this. A change of seed, order, schedule, clipping or optimizer is orders larger.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def test_the_curve_is_the_golden_one(tmp_path: Path) -> None:
    path = Path(__file__).with_name("make.py")
    spec = importlib.util.spec_from_file_location("golden_make", path)
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    golden = [
        tuple(float(number) for number in line.split()[1:])
        for line in make.CURVE.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    threads = torch.get_num_threads()
    try:
        found = make.curve(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == len(golden) == 20
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in golden], rel=1e-6)
    # A norm adds up squares of some 36,000 gradients that differ in their last digits.
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in golden], rel=1e-5)
