"""`microdit`, and python -m microdit, as torchrun starts it: ready for a spot notice before anything large is imported."""

import sys

from microdit.training.preemption import restart_when_asked


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        restart_when_asked()
    from microdit.cli.main import main as run_command  # imports PyTorch, for seconds

    run_command()


if __name__ == "__main__":
    main()
