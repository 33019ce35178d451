"""What all tests share: whether there is KVM, and one machine for those that only need some machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import microvm
from microvm import _microvm
from microvm.exceptions import MicrovmError

if TYPE_CHECKING:
    from collections.abc import Iterator

KVM_DEVICE = "/dev/kvm"


def reason_without_kvm() -> str | None:
    """Why nothing that needs KVM can run here, or ``None`` if it can."""
    try:
        _microvm.detect_backend()
    except MicrovmError as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``kvm`` are skipped where there is none, with the reason; a CI that has the device must run them."""
    if item.get_closest_marker("kvm") is None:
        return
    reason = reason_without_kvm()
    if reason is None:
        return
    if os.environ.get("CI") and os.path.exists(KVM_DEVICE):
        pytest.fail(f"{KVM_DEVICE} exists, and this test would be skipped: {reason}", pytrace=False)
    pytest.skip(f"no KVM: {reason}")


@pytest.fixture(scope="session")
def sandbox() -> Iterator[microvm.Sandbox]:
    """One machine for all tests that do not change it for the others."""
    with microvm.Sandbox(memory="512M") as machine:
        yield machine
