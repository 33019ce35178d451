"""Builds and gathers what the wheel carries beside the extension module.

``python -m build_backend.bundle`` does only that.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "python" / "microvm" / "_bundle"
KERNEL_SOURCE = ROOT / "guests" / "kernel"
BENCH_SOURCE = ROOT / "guests" / "bench"
TARGET = "x86_64-unknown-linux-gnu"
FLAVOURS = ("ring3", "hardware")
RUST_FLAGS = ("RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS")
KERNEL_FILES = ("vmlinux", "System.map", "info.json")


def make_bundle() -> None:
    """Fills ``python/microvm/_bundle``: programs, kernel sources, kernels."""
    BUNDLE.mkdir(parents=True, exist_ok=True)
    install_program(build_vmm(), "microvm-vmm")
    install_program(build_agent(), "microvm-agent")
    copy_source(KERNEL_SOURCE, "kernel-source")
    copy_source(BENCH_SOURCE, "bench-source")
    copy_kernels()


def build_vmm() -> Path:
    """Builds the per-machine process as a static program that aborts on panic (profile ``vmm``)."""
    target_directory = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "static"
    cargo(
        ["build", "--package", "microvm-vmm", "--bin", "microvm-vmm", "--profile", "vmm", "--target", TARGET],
        ROOT,
        {"RUSTFLAGS": "-C target-feature=+crt-static", "CARGO_TARGET_DIR": str(target_directory)},
    )
    return target_directory / TARGET / "vmm" / "microvm-vmm"


def build_agent() -> Path:
    """Builds the guest agent; its own ``.cargo/config.toml`` makes it static."""
    folder = ROOT / "guests" / "agent"
    target_directory = folder / "target"
    cargo(
        ["build", "--release", "--bin", "microvm-agent", "--target", TARGET],
        folder,
        {"CARGO_TARGET_DIR": str(target_directory)},
    )
    return target_directory / TARGET / "release" / "microvm-agent"


def cargo(arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Runs cargo; its output goes to stderr, because stdout belongs to the caller of the backend."""
    print(f"microvm: cargo {' '.join(arguments)} (in {folder})", file=sys.stderr, flush=True)
    # Flags from outside would take the place of those that make these programs static.
    environment = {name: value for name, value in os.environ.items() if name not in RUST_FLAGS}
    cargo_program = os.environ.get("CARGO", "cargo")
    command = [cargo_program, *arguments, "--locked"]
    subprocess.run(command, cwd=folder, env={**environment, **variables}, stdout=sys.stderr, check=True)


def install_program(program: Path, name: str) -> None:
    """Copies a program into the bundle, executable: the wheel keeps the mode it finds. Renamed into place."""
    partial = BUNDLE / f".{name}.partial"
    strip = shutil.which("strip")
    if strip:
        subprocess.run([strip, "-o", partial, program], check=True)
    else:
        shutil.copyfile(program, partial)
    partial.chmod(0o755)
    partial.rename(BUNDLE / name)


def copy_source(source: Path, name: str) -> None:
    """Copies what is built on the user's machine, without anything that a build has left there."""
    destination = BUNDLE / name
    if destination.exists():
        shutil.rmtree(destination)
    ignored = shutil.ignore_patterns("target", "build.log", "__pycache__", "*.pyc", "*.o", "linux-*")
    shutil.copytree(source, destination, ignore=ignored)


def copy_kernels() -> None:
    """Copies the kernels for the current sources from the user's cache."""
    wanted = os.environ.get("MICROVM_BUNDLE_KERNELS", "")
    destination = BUNDLE / "kernels"
    if destination.exists():
        shutil.rmtree(destination)
    if wanted == "none":
        return
    required = tuple(word for word in wanted.split(",") if word)
    for flavour in required or FLAVOURS:
        found = find_kernel(flavour)
        if found is None:
            message = (
                f"no {flavour} kernel for these sources in the cache; build it with `microvm kernel build {flavour}`"
            )
            if required:
                raise SystemExit(f"microvm: {message}")
            print(f"microvm: the wheel carries {message}", file=sys.stderr, flush=True)
            continue
        folder = destination / flavour
        folder.mkdir(parents=True)
        for name in KERNEL_FILES:
            shutil.copyfile(found / name, folder / name)


def find_kernel(flavour: str) -> Path | None:
    """The folder in the user's cache with the kernel that the current sources make, if it was built."""
    script = str(KERNEL_SOURCE / "build")
    loader = importlib.machinery.SourceFileLoader("kernel_build", script)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    if spec is None:
        raise SystemExit(f"microvm: {script} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    found: Path | None = module.cached(flavour)
    return found


if __name__ == "__main__":
    make_bundle()
