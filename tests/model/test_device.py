"""The devices that --device names."""

from __future__ import annotations

import pytest
import torch

from quantkit.base.errors import InputError, MachineError
from quantkit.model.device import resolve_devices


def test_several_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    both = (torch.device("cuda:0"), torch.device("cuda:2"))
    assert resolve_devices("cuda:0,2") == resolve_devices("cuda:0,cuda:2") == both
    assert resolve_devices("cuda:1") == (torch.device("cuda:1"),)
    with pytest.raises(MachineError, match="torch sees 3 CUDA devices"):
        resolve_devices("cuda:0,3")


@pytest.mark.parametrize("name", ["cuda,cuda", "cpu,cpu", "cuda:0,", "0,1", "cuda:0,cpu", "gpu,1"])
def test_other_lists_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="doesn't name CUDA devices") as caught:
        resolve_devices(name)
    assert "cuda:0,1" in str(caught.value.fix)


def test_a_device_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="names a device twice"):
        resolve_devices("cuda:1,0,1")
