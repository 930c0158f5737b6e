"""``python -m cpq_lightning`` is the command ``cpq``."""

from cpq_lightning.cli import main

if __name__ == "__main__":
    main()
