"""``python -m microvm`` is the ``microvm`` command."""

from microvm.cli import main

if __name__ == "__main__":
    main()
