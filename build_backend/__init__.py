"""PEP 517 backend: maturin's, after the programs that the wheel carries have been built.

A wheel of this project is more than an extension module. It also carries, in ``microvm/_bundle``:

* ``microvm-vmm``, the per-machine process, and ``microvm-agent``, the guest's first process: static programs,
  because the one runs in a jail without libraries and the other in an image we know nothing about;
* ``kernel-source``, what is needed to build a guest kernel on the user's machine;
* ``kernels/<flavour>``, the guest kernels for the current sources that this machine has built before, if any.

``MICROVM_BUNDLE_KERNELS`` says which kernels must be there: a list such as ``hardware,ring3`` (missing ones are
an error), or ``none``; unset packs what there is.
"""

from __future__ import annotations

from typing import Any

import maturin

from build_backend.bundle import make_bundle

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable
build_sdist = maturin.build_sdist


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Makes the bundle, then the wheel around it."""
    make_bundle()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Makes the bundle in the source tree, where the editable installation finds it."""
    make_bundle()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
