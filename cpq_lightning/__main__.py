"""The command ``cpq``; ``python -m cpq_lightning`` is the same."""

from cpq_lightning.extras import require


def main() -> None:
    """Run the command, where there is what its parser needs."""
    try:
        require("The command cpq", "cli")
    except ImportError as error:
        raise SystemExit(str(error)) from None
    from cpq_lightning.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
