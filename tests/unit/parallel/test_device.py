"""Which device, which compute type, how much memory."""

from __future__ import annotations

import psutil
import pytest
import torch

from fullrank.errors import UsageError
from fullrank.parallel import device as devices


def there(patch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, bf16: bool = False) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: cuda)
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, chosen: str) -> None:
    there(monkeypatch, cuda=cuda, mps=mps)
    assert devices.choose("auto").type == chosen
    assert devices.choose("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch, mps=True)
    with pytest.raises(UsageError, match=r"cuda is not available here \(available: mps, cpu\)"):
        devices.choose("cuda")


def test_precision_is_bf16_only_where_the_device_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    there(monkeypatch, cuda=True, bf16=True)
    assert devices.resolve_precision("auto", cuda)[0] == "bf16-mixed"
    precision, why = devices.resolve_precision("auto", cpu)
    assert precision == "fp32" and "does not multiply bf16" in why
    assert devices.resolve_precision("fp32", cuda) == ("fp32", "")
    assert devices.resolve_precision("bf16-stochastic", cpu) == ("bf16-stochastic", "")  # widened to compute
    there(monkeypatch, cuda=True, bf16=False)
    assert devices.resolve_precision("auto", cuda)[0] == "fp32", "emulated bf16 is slower than fp32"
    for device in (cpu, cuda):
        with pytest.raises(UsageError, match="bf16-mixed needs a CUDA device"):
            devices.resolve_precision("bf16-mixed", device)


def test_the_cpu_has_a_name_and_the_machines_memory() -> None:
    cpu = torch.device("cpu")
    assert devices.name(cpu)
    total, free = devices.memory_bytes(cpu)
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total
    assert devices.device_peak_bytes(cpu) is None
